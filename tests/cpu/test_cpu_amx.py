"""Products of many columns in tiles of bf16. Processors without AMX emulate its instructions; the
packing, the order of the work and what is written are the same."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml.backends.cpu.linear.columns import DEPTH
from pyggml.backends.cpu.linear.inner import Inner
from pyggml.backends.cpu.native import isa
from pyggml.dtypes import TYPES
from pyggml.parity import running
from pyggml.parity.cases import cases
from pyggml.parity.tolerance import CLASSES, nmse
from pyggml.parity.values import stored

#: One and two scales in a group, and minima. All types share the decoder of products in f32, whose
#: test has all of them.
NAMES = ("q8_0", "q3_K", "q4_K")
BOUND = CLASSES["bf16"]

Program = Callable[[], None]


def weight(name: str, *shape: int) -> gg.Node:
    rng = np.random.default_rng(0)
    return gg.constant(stored(TYPES[name], rng.standard_normal(shape), rng), dtype=name)


def compare(outputs: dict[str, gg.Node], bound: float = BOUND, **inputs: np.ndarray) -> None:
    """Every column of every output is near NumPy's, and its error is that of bf16: neither that of
    f32 nor of 8-bit activations."""
    got, want = (gg.compile(outputs, backends=[name]).run(**inputs) for name in ("cpu", "numpy"))
    for name in outputs:
        m = want[name].shape[-1]
        for one, other in zip(got[name].reshape(-1, m), want[name].reshape(-1, m)):
            assert nmse(one, other) < (bound if m > 8 else 20 * bound)
        assert bound / 40 < nmse(got[name], want[name]) < bound


def blocks() -> None:
    """Sizes on and off blocks of 16 and parts of `DEPTH`."""
    for name in NAMES:
        k = DEPTH + max(64, TYPES[name].block)
        for m, n in ((16, 16), (37, 17), (300, 33), (64, 64)):
            x = np.random.default_rng(1).standard_normal((n, k)).astype(np.float32)
            compare({"y": gg.mul_mat(weight(name, m, k), gg.input("b", "f32", ne=(k, n)))}, b=x)


def floats() -> None:
    """Rows of any length, activations of any type, results in f32 and f16."""
    for name in ("f16", "bf16"):
        for m, n, k, b_type in ((16, 16, 64, "f32"), (37, 33, DEPTH + 33, "f16"),
                                (20, 50, 2 * DEPTH, "bf16"), (33, 17, 31, "f32")):  # fmt: skip
            w, b = weight(name, m, k), gg.input("b", b_type, ne=(k, n))
            rng = np.random.default_rng(1)
            x = stored(TYPES[b_type], rng.standard_normal((n, k)), rng)
            outputs = {"y": gg.mul_mat(w, b), "half": gg.mul_mat(w, b, dtype="f16")}
            if name == b_type == "bf16":  # nothing is rounded
                got, want = (
                    gg.compile(outputs, backends=[place]).run(b=x) for place in ("cpu", "numpy")
                )
                assert nmse(got["y"], want["y"]) < 1e-10
            else:
                compare(outputs, b=x)


def items() -> None:
    """Items share matrices, activations are in another order, more columns than a thread takes."""
    n, k = 17, 96
    w = weight("q4_0", 3, 2, 20, k)
    x = np.random.default_rng(1).standard_normal((6, n, 4, k)).astype(np.float32)
    b = gg.permute(gg.input("b", "f32", ne=(k, 4, n, 6)), axes=(0, 2, 1))
    compare({"y": gg.mul_mat(w, b)}, b=x)
    turned = np.ascontiguousarray(x[0, :, 0].T)
    b = gg.transpose(gg.input("b", "f32", ne=(n, k)))
    compare({"y": gg.mul_mat(weight("q4_0", 20, k), b)}, b=turned)
    many = np.random.default_rng(1).standard_normal((1100, k)).astype(np.float32)
    compare({"y": gg.mul_mat(weight("q4_0", 20, k), gg.input("b", "f32", ne=(k, 1100)))}, b=many)


def gated() -> None:
    up, gate = weight("q8_0", 150, 768), weight("q6_K", 150, 768)
    x = np.random.default_rng(1).standard_normal((3, 2, 19, 768)).astype(np.float32)
    b = gg.input("b", "f32", ne=x.shape[::-1])
    compare({"y": gg.fused_up_gate(up, gate, b)}, 2 * BOUND, b=x)


def experts() -> None:
    """Pairs of 0 to 60 tokens an expert, slots with an activation of their own, and without any."""
    rng = np.random.default_rng(3)
    n_tokens, n_used, k = 60, 3, 544
    for type_, n_b in (("q4_0", 1), ("q4_0", 3), ("f16", 1)):
        x = rng.standard_normal((n_tokens, n_b, k)).astype(np.float32)
        up, gate = weight(type_, 5, 150, k), weight(type_, 5, 150, k)
        b, ids = gg.input("b", "f32", ne=(k, n_b, n_tokens)), gg.input("ids", "i32", ne=(3, 60))
        one, two = gg.mul_mat_id(up, b, ids), gg.moe_up_gate(up, gate, b, ids)
        chosen = np.argsort(rng.random((n_tokens, 3)) + [0.0, 0.3, 0.6])[:, :n_used]
        chosen = np.where(chosen == 1, 4, chosen).astype(np.int32)  # none for experts 1 and 3
        chosen[5, 1] = chosen[7, 0] = -1
        outputs = {"one": one, "two": two}
        got, want = (
            gg.compile(outputs, backends=[name]).run(b=x, ids=chosen) for name in ("cpu", "numpy")
        )
        for name in outputs:
            assert not got[name][5, 1].any() and not got[name][7, 0].any()
            for y, other in zip(got[name], want[name]):
                assert nmse(y, other) < BOUND
            assert nmse(got[name], want[name]) > BOUND / 40


def numbers_that_are_not_finite() -> None:
    k = 64
    x = np.random.default_rng(1).standard_normal((16, k)).astype(np.float32)
    x[1, 40], x[2, 3] = np.nan, np.inf
    y = gg.mul_mat(weight("iq4_nl", 20, k), gg.input("b", "f32", ne=(k, 16)))
    got = gg.compile({"y": y}, backends=["cpu"]).run(b=x)["y"]
    assert np.isnan(got[1]).all() and not np.isfinite(got[2]).any()
    assert np.isfinite(np.delete(got, [1, 2], axis=0)).all()


def classes() -> None:
    """What has few columns, is in f32 or is no weight is not rounded to bf16."""
    w, f32, cpu = weight("q4_0", 20, 32), weight("f32", 20, 32), gg.backends.get("cpu")
    from pyggml.backends.cpu.linear.operands import MANY

    many, few = (gg.input("b", "f32", ne=(32, n)) for n in (MANY, MANY - 1))
    state = gg.input("a", "f16", ne=(32, 20))
    expected = {
        "bf16": (gg.mul_mat(w, many), gg.fused_up_gate(w, w, many)),
        "quantized": (gg.mul_mat(w, few),),
        "f32": (gg.mul_mat(w, many, prec="f32"), gg.mul_mat(f32, many), gg.mul_mat(state, many)),
    }
    for name, nodes in expected.items():
        assert {cpu.numeric(node) for node in nodes} == {name}


def grid(*types: str) -> None:
    """Cases of the grid with weights of these types, whatever the number of columns."""
    from pyggml.backends.cpu.linear import experts, kernels, operands

    number: Counter[str] = Counter()

    def counted(add: Callable[..., None]) -> Callable[..., None]:
        def run(call: Any, *rest: Any) -> None:
            number[call.node.op.name] += 1
            add(call, *rest)

        return run

    operands.MANY = operands.MANY_FLOATS = 1
    kernels.add_dense = counted(kernels.add_dense)
    experts.add_by_expert = counted(experts.add_by_expert)
    ops = {"mul_mat", "mul_mat_id", "fused_up_gate", "moe_up_gate"}
    for case in cases():
        kinds = {source.type for source in case.sources if source is not None}
        if case.op in ops and kinds & set(types) and kinds <= {*types, "f32", "i32"}:
            outcome = running.tested(case, "cpu")
            assert outcome.status != "fail", (outcome.case, outcome.why)
    assert number.keys() == ops and number.total() > 50, number


def a_sample_of_the_grid() -> None:
    grid("q8_0", "q4_K")


def instructions() -> None:
    """Kernels compile for a processor with AMX, and multiply in tiles."""
    target = isa.Isa("amx", "sapphirerapids", isa.TILE_FEATURES, True, True, True, False)
    from pyggml.backends.cpu.native import compiler

    isa.isa = compiler.isa = lambda: target  # type: ignore[assignment]
    from pyggml.backends.cpu.linear.amx import products

    for up in (Inner("q4_K", "quantized"), Inner("f16", "rows")):
        code = compiler._compile(products.dense(up, None, "", "f32"))
        assert len(re.findall(rb"\xc4\xe2.\x5c[\xc0-\xff]", code)) >= 6, "no tdpbf16ps"


PROGRAMS: tuple[Program, ...] = (
    blocks, floats, items, gated, experts, numbers_that_are_not_finite, classes,
    a_sample_of_the_grid, instructions,
)  # fmt: skip


START = """
from pyggml.backends.cpu.linear import operands
from tests.cpu import test_cpu_amx as t
operands.MANY = 16
"""


def run(program: str, **environment: str) -> str:
    """The output of a program in a process of its own: the instruction set is chosen once. AMX is
    used from 16 columns on."""
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", START + program], cwd=root,
        env={**os.environ, "PYGGML_CPU_ISA": isa.EMULATED, **environment}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_emulated_tiles(program: Program) -> None:
    run(f"t.{program.__name__}()")


def digest() -> None:
    import hashlib

    w = weight("q4_K", 600, 768)
    x = np.random.default_rng(1).standard_normal((40, 768)).astype(np.float32)
    y = gg.mul_mat(w, gg.input("b", "f32", ne=(768, 40)))
    result = gg.compile({"y": y}, backends=["cpu"]).run(b=x)["y"]
    print(hashlib.sha256(result.tobytes()).hexdigest())


@pytest.mark.skipif(sys.platform != "linux", reason="one thread elsewhere")
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    assert run("t.digest()", PYGGML_THREADS="1") == run("t.digest()", PYGGML_THREADS="3")


# -- which processors -----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    answers = isa.has_tiles, isa.multiplies_tiles
    yield
    for answer in answers:
        answer.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
@pytest.mark.parametrize("answer", [0, -1])
@pytest.mark.parametrize("flags", ["amx_tile amx_bf16", "amx_tile"])
def test_the_kernel_is_asked_for_tiles(
    answer: int, flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def syscall(*values: Any) -> int:
        asked.append([value.value for value in values])
        return answer

    text = f"processor : 0\nflags\t\t: fpu {flags} avx512_bf16 avx512_vnni\n"
    monkeypatch.setattr(isa.Path, "read_text", lambda path: text)
    monkeypatch.setattr(isa.ctypes, "CDLL", lambda name: SimpleNamespace(syscall=syscall))
    monkeypatch.delenv("PYGGML_CPU_ISA", raising=False)
    isa.has_tiles.cache_clear()
    isa.multiplies_tiles.cache_clear()
    assert isa.multiplies_tiles() is (answer == 0 and "amx_bf16" in flags)
    assert asked == ([[158, 0x1023, 18]] if "amx_bf16" in flags else [])


def test_less_than_amx_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "has_tiles", lambda: True)
    for name, uses in (("vnni", False), ("amx", True), ("", True)):
        isa.multiplies_tiles.cache_clear()
        monkeypatch.setenv("PYGGML_CPU_ISA", name)
        assert isa.multiplies_tiles() is uses

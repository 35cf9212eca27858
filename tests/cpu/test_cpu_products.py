"""Products with weights in tiles, and rows of such weights, for every type that has a form."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pyggml as gg
from pyggml.backends.cpu.linear.operands import BLOCK
from pyggml.backends.cpu.native.isa import LEVELS, best
from pyggml.backends.host_tiles import FORMS, LAYOUT, tiles_of
from pyggml.dtypes import TYPES
from pyggml.ops.rules import Precision
from pyggml.parity.tolerance import nmse
from pyggml.parity.values import stored
from pyggml.quants import decode_rows

K = 512
Array = NDArray[Any]


def weight(name: str, *shape: int) -> Array:
    """Random rows of K weights, as a file stores them."""
    rng = np.random.default_rng(0)
    return stored(TYPES[name], rng.standard_normal((*shape, K)), rng)


def activations(*shape: int) -> Array:
    return np.random.default_rng(1).standard_normal((*shape, K)).astype(np.float32)


def plan_of(name: str, rows: Array, x: Array, prec: Precision = "default") -> gg.Plan:
    w, b = gg.constant(rows, dtype=name), gg.input("b", "f32", ne=x.shape[::-1])
    return gg.compile({"y": gg.mul_mat(w, b, prec=prec)}, backends=["cpu"])


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("m, n", [(16, 2), (37, 4), (33, 11)])
def test_a_product_is_within_the_bound_of_quantized_activations(name: str, m: int, n: int) -> None:
    rows, x = weight(name, m), activations(n)
    want = x.astype(np.float64) @ decode_rows(name, rows).T.astype(np.float64)
    plan = plan_of(name, rows, x)
    assert plan.memory.devices[0].weights == tiles_of(TYPES[name], (K, m, 1, 1)).nbytes
    got = plan.run(b=x)["y"]
    assert plan.addresses[plan.steps[0].node["a"]].layout == LAYOUT
    # Above 0: activations were quantized; rounding them toward zero gives 9e-5. 32 results vary.
    assert 0 < nmse(got, want) < (7e-5 if m * n > 100 else 2e-4)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("m, n", [(16, 1), (37, 3), (33, 13)])
def test_a_product_in_f32_reads_exact_weights(name: str, m: int, n: int) -> None:
    """Its error is that of f32 sums, for one column, up to 4 and up to 8."""
    rows, x = weight(name, m), activations(n)
    plan = plan_of(name, rows, x, "f32")
    assert plan.memory.devices[0].weights == tiles_of(TYPES[name], (K, m, 1, 1)).nbytes
    want = x.astype(np.float64) @ decode_rows(name, rows).T.astype(np.float64)
    assert nmse(plan.run(b=x)["y"], want) < 1e-12


@pytest.mark.parametrize("prec", ["default", "f32"])
@pytest.mark.parametrize("type_", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(
    "shape", ["heads", "heads in order", "one column each", "shared", "shared in one"]
)
def test_every_item_has_its_matrix_and_its_columns(prec: Precision, type_: str, shape: str) -> None:
    """Items of two dimensions share matrices, and activations are in another order in memory."""
    heads = (1, 1) if shape.startswith("shared") else (2, 3)
    n, sequences = (1 if shape == "one column each" else 5), (1 if shape == "shared in one" else 6)
    w = gg.constant(weight("q5_1", *heads[::-1], 20), dtype="q5_1")
    x = np.random.default_rng(1).standard_normal((sequences, n, 4, K))
    x = stored(TYPES[type_], x, np.random.default_rng(2))
    b = gg.permute(gg.input("b", type_, ne=(K, 4, n, sequences)), axes=(0, 2, 1))
    b = gg.cont(b) if shape == "heads in order" else b
    y = {"y": gg.mul_mat(w, b, prec=prec)}
    got, want = (gg.compile(y, backends=[name]).run(b=x)["y"] for name in ("cpu", "numpy"))
    for one, other in zip(got.reshape(-1, n, 20), want.reshape(-1, n, 20)):
        assert nmse(one, other) < (2e-4 if prec == "default" else 1e-12)


@pytest.mark.parametrize("prec", ["default", "f32"])
def test_every_item_of_a_gated_product_has_its_columns(prec: Precision) -> None:
    up, gate = (gg.constant(weight(name, 37), dtype=name) for name in ("q8_0", "q6_K"))
    x = activations(3, 2, 13)
    b = gg.input("b", "f32", ne=x.shape[::-1])
    y = {"y": gg.fused_up_gate(up, gate, b, prec=prec)}
    got, want = (gg.compile(y, backends=[name]).run(b=x)["y"] for name in ("cpu", "numpy"))
    for one, other in zip(got.reshape(6, 13, 37), want.reshape(6, 13, 37)):
        assert nmse(one, other) < (2e-4 if prec == "default" else 1e-12)


@pytest.mark.parametrize("type_", ["f32", "f16", "bf16", "q4_0"])
@pytest.mark.parametrize("prec", ["default", "f32"])
@pytest.mark.parametrize("n_b", [1, 3])
def test_every_pair_has_its_expert_and_its_row(type_: str, prec: Precision, n_b: int) -> None:
    """20 tokens of 4 experts: rows by 8, by 4 and alone. Some slots have no expert."""
    rng = np.random.default_rng(3)
    n_tokens, n_used, x = 20, 3, activations(20, n_b)
    w = {
        name: gg.constant(stored(TYPES[type_], rng.standard_normal((4, 37, K)), rng), dtype=type_)
        for name in ("up", "gate")
    }
    b = gg.input("b", "f32", ne=x.shape[::-1])
    ids = gg.input("ids", "i32", ne=(n_used, n_tokens))
    y = {
        "one": gg.mul_mat_id(w["up"], b, ids, prec=prec),
        "two": gg.moe_up_gate(w["up"], w["gate"], b, ids, prec=prec),
    }
    chosen = np.argsort(rng.random((n_tokens, 4)))[:, :n_used].astype(np.int32)
    chosen[5, 1] = chosen[7, 0] = -1
    got, want = (gg.compile(y, backends=[name]).run(b=x, ids=chosen) for name in ("cpu", "numpy"))
    exact = prec == "f32" or type_ != "q4_0"
    for name in y:
        assert not got[name][5, 1].any() and not got[name][7, 0].any()
        for one, other in zip(got[name], want[name]):
            assert nmse(one, other) < (1e-11 if exact else 4e-4)


def test_one_of_many_weights_shows_which_is_read() -> None:
    """In f32, a column with a single 1 gives the weights themselves."""
    for name in FORMS:
        rows = weight(name, 19)
        w, b = gg.constant(rows, dtype=name), gg.input("b", "f32", ne=(K, K))
        plan = gg.compile({"y": gg.mul_mat(w, b, prec="f32")}, backends=["cpu"])
        got = plan.run(b=np.eye(K, dtype=np.float32))["y"]
        np.testing.assert_allclose(got, decode_rows(name, rows).T, rtol=1e-6, atol=1e-7)


#: Sizes of a weight [K, m, heads], and a view of it that is in whole tiles.
VIEWS: dict[str, tuple[tuple[int, int], Callable[[gg.Node], gg.Node]]] = {
    "matrices as one": ((32, 3), lambda w: gg.reshape(w, ne=(K, 96))),
    "one matrix as several": ((96, 1), lambda w: gg.reshape(w, ne=(K, 32, 3))),
    "the first rows of heads": ((48, 3), lambda w: gg.view(w, ne=(K, 16, 3))),
    "the last rows of heads": ((48, 3), lambda w: gg.view(w, ne=(K, 30, 3), start=(0, 16))),
    "rows of the last head": ((20, 3), lambda w: gg.view(w, ne=(K, 4), start=(0, 16, 2))),
    "every other head": ((20, 5), lambda w: gg.view(w, ne=(K, 20, 3), step=(1, 1, 2))),
    "heads in two dimensions": ((20, 6), lambda w: gg.reshape(w, ne=(K, 20, 2, 3))),
    "a view of a reshape": (
        (96, 1),
        lambda w: gg.view(gg.reshape(w, ne=(K, 32, 3)), ne=(K, 16, 3), start=(0, 16)),
    ),
}
#: The same for views that need the file's layout.
OTHER_VIEWS: dict[str, tuple[tuple[int, int], Callable[[gg.Node], gg.Node]]] = {
    "tiles that end in another matrix": ((24, 2), lambda w: gg.reshape(w, ne=(K, 48))),
    "rows from the middle of a tile": ((32, 2), lambda w: gg.view(w, ne=(K, 16, 2), start=(0, 8))),
    "matrices that begin in a tile": ((48, 1), lambda w: gg.reshape(w, ne=(K, 24, 2))),
    "half of each row": ((32, 2), lambda w: gg.view(w, ne=(K // 2, 32, 2))),
    "every other row": ((32, 2), lambda w: gg.view(w, ne=(K, 16, 2), step=(1, 2))),
}


def layout(plan: gg.Plan) -> str:
    """How the one weight of a plan is stored."""
    [name] = {at.layout for node, at in plan.addresses.items() if node.dtype.block > 1}
    return name


@pytest.mark.parametrize("name", ["q4_0", "q6_K"])
@pytest.mark.parametrize("view", [*VIEWS, *OTHER_VIEWS])
def test_a_product_of_a_view_of_a_weight(name: str, view: str) -> None:
    (m, heads), show = (VIEWS | OTHER_VIEWS)[view]
    rows = weight(name, heads, m)
    w = gg.constant(rows, dtype=name)
    part = show(w)
    x = activations(*part.ne[:1:-1], 5)[..., : part.ne[0]]
    b = gg.input("b", "f32", ne=x.shape[::-1])
    plan = gg.compile({"y": gg.mul_mat(part, b)}, backends=["cpu"])
    decoded = gg.constant(decode_rows(name, rows))
    plain = gg.compile({"y": gg.mul_mat(show(decoded), b)}, backends=["numpy"])
    want = plain.run(b=x)["y"]
    assert nmse(plan.run(b=x)["y"], want) < 2e-4
    assert (layout(plan) == LAYOUT) == (view in VIEWS)


def test_a_view_of_a_weight_that_is_an_output_keeps_the_file_layout() -> None:
    rows, x = weight("q4_0", 32), activations(2)
    w, b = gg.constant(rows, dtype="q4_0"), gg.input("b", "f32", ne=x.shape[::-1])
    half = gg.view(w, ne=(K, 16))
    plan = gg.compile({"half": half, "y": gg.mul_mat(half, b)}, backends=["cpu"])
    assert np.array_equal(plan.run(b=x)["half"], decode_rows("q4_0", rows)[:16])
    assert layout(plan) == "plain"


def test_more_columns_than_a_block() -> None:
    """Threads share the columns of a long prompt too; the last block has fewer."""
    rows, x = weight("q8_0", 20), activations(2 * BLOCK // (K // 32 * 48) + 11)
    want = x.astype(np.float64) @ decode_rows("q8_0", rows).T.astype(np.float64)
    assert nmse(plan_of("q8_0", rows, x).run(b=x)["y"], want) < 2e-4


@pytest.mark.parametrize("type_", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("b_type", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("m, n, k", [(16, 1, 40), (37, 3, 33), (20, 13, 64)])
def test_products_of_floats(type_: str, b_type: str, turned: bool, m: int, n: int, k: int) -> None:
    """Of rows and of columns, with results in f32 and f16."""
    rng = np.random.default_rng(0)
    w = gg.constant(
        stored(TYPES[type_], rng.standard_normal((k, m) if turned else (m, k)), rng), dtype=type_
    )
    x = stored(TYPES[b_type], rng.standard_normal((n, k)), rng)
    a, b = gg.transpose(w) if turned else w, gg.input("b", b_type, ne=(k, n))
    outputs = {"f32": gg.mul_mat(a, b), "f16": gg.mul_mat(a, b, dtype="f16")}
    got = gg.compile(outputs, backends=["cpu"]).run(b=x)
    want = gg.compile(outputs, backends=["numpy"]).run(b=x)
    assert nmse(got["f32"], want["f32"]) < 1e-12
    assert got["f16"].dtype == np.float16 and nmse(got["f16"], want["f16"]) < 1e-6


@pytest.mark.parametrize("name", FORMS)
def test_rows_of_weights_in_tiles_are_those_of_the_file(name: str) -> None:
    """A weight that a product and get_rows read is stored once, in tiles."""
    rows, x = weight(name, 3, 21), activations(3, 2)
    w, b = gg.constant(rows, dtype=name), gg.input("b", "f32", ne=x.shape[::-1])
    ids = gg.input("ids", "i32", ne=(5, 3))
    plan = gg.compile({"y": gg.mul_mat(w, b), "rows": gg.get_rows(w, ids)}, backends=["cpu"])
    chosen = np.array([[0, 20, -1, 15, 16], [3, 3, 1, 2, 4], [20, 19, 18, -5, 0]], np.int32)
    got = plan.run(b=x, ids=chosen)["rows"]
    assert plan.addresses[plan.steps[0].node["a"].root].layout == LAYOUT
    want = np.take_along_axis(decode_rows(name, rows), np.maximum(chosen, 0)[..., None], axis=1)
    want[chosen < 0] = 0
    assert np.array_equal(got, want)


def test_a_weight_that_other_ops_read_stays_as_in_the_file() -> None:
    rows, x = weight("q4_0", 20), activations(1)
    w, b = gg.constant(rows, dtype="q4_0"), gg.input("b", "f32", ne=(K, 1))
    plan = gg.compile({"y": gg.mul_mat(w, b), "w": gg.cast(w, dtype="f32")}, backends=["cpu"])
    got = plan.run(b=x)
    assert np.array_equal(got["w"], decode_rows("q4_0", rows))
    assert nmse(got["y"], x @ decode_rows("q4_0", rows).T) < 1e-10  # NumPy computes it in f32


def test_two_backends_of_the_host_share_a_weight_as_in_the_file() -> None:
    rows, x = weight("q4_0", 20), activations(1)
    w, b = gg.constant(rows, dtype="q4_0"), gg.input("b", "f32", ne=(K, 1))
    outputs = {"p": gg.label(gg.mul_mat(w, b), "p"), "q": gg.label(gg.mul_mat(w, b + b), "q")}
    plan = gg.compile(outputs, backends=["cpu", "numpy"], pins={"^q$": "numpy"})
    got = plan.run(b=x)
    assert {plan.place_of(step.node) for step in plan.steps} == {"cpu", "numpy"}
    want = x @ decode_rows("q4_0", rows).T
    assert nmse(got["p"], want) < 1e-10 and nmse(got["q"], 2 * want) < 1e-10


@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_activations_that_are_not_finite_make_their_column_nan(special: float) -> None:
    rows, x = weight("iq4_nl", 20), activations(3)
    x[1, 100] = special
    got = plan_of("iq4_nl", rows, x).run(b=x)["y"]
    assert np.isnan(got[1]).all() and np.isfinite(got[[0, 2]]).all()


def test_a_column_of_zeros() -> None:
    rows, x = weight("q6_K", 20), np.zeros((2, K), np.float32)
    assert not plan_of("q6_K", rows, x).run(b=x)["y"].any()


PROGRAM = """
import hashlib
from pyggml.backends.cpu.linear.operands import BLOCK
from pyggml.backends.cpu.native.isa import isa
from pyggml.backends.host_tiles import FORMS
from tests.cpu.test_cpu_products import *
print(isa().name, pool_size())
for name in FORMS:
    rows, x = weight(name, 600), activations(7)
    want = x.astype(np.float64) @ decode_rows(name, rows).T.astype(np.float64)
    y = plan_of(name, rows, x).run(b=x)["y"]
    exact = name in ("q5_1", "q3_K", "q4_K", "iq4_xs", "mxfp4")  # every kind of code and scale
    z = plan_of(name, rows, x, "f32").run(b=x)["y"] if exact else want
    right = nmse(y, want) < 2e-4 and nmse(z, want) < 1e-12
    print(name, right, *(hashlib.sha256(r.tobytes()).hexdigest() for r in (y, z)))
for name in ("f32", "f16", "bf16"):
    for turned in (False, True):
        test_products_of_floats(name, "f16", turned, 37, 3, 33)
"""


def pool_size() -> int:
    from pyggml.backends.cpu.native.pool import pool

    return pool().threads


def results(**environment: str) -> list[str]:
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=root, env={**os.environ, **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="one thread elsewhere")
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    one, three = results(PYGGML_THREADS="1"), results(PYGGML_THREADS="3")
    assert one[0].endswith(" 1") and three[0].endswith(" 3")
    assert one[1:] == three[1:]


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_is_within_the_bound(level: str) -> None:
    top = best()
    assert top is not None
    if list(LEVELS).index(level) > list(LEVELS).index(top):
        pytest.skip(f"this processor has only {top}")
    first, *lines = results(PYGGML_CPU_ISA=level)
    assert first.startswith(level)
    assert len(lines) == len(FORMS) and all(line.split()[1] == "True" for line in lines)

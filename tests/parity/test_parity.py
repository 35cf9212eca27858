"""The parity command: its grids, mutants that must fail in them, and its options."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import Any, cast

import pytest

import pyggml as gg
from pyggml import backends, ops
from pyggml.backends import get
from pyggml.backends.numpy import table
from pyggml.cli import main
from pyggml.operation import cost_of
from pyggml.parity import running
from pyggml.parity.case import Case, build
from pyggml.parity.cases import cases
from pyggml.parity.grid import all_cases
from tests.mutants.hunt import MUTANTS, Fate, hunt

ROOT = Path(__file__).parent.parent.parent
Streams = pytest.CaptureFixture[str]
Parity = Callable[..., tuple[int, str]]


@pytest.fixture
def parity(capsys: Streams) -> Parity:
    """`parity(*words)` -> (exit status, output)."""

    def run(*words: str) -> tuple[int, str]:
        status = main(["parity", *words])
        return status, capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def fates() -> list[Fate]:
    return list(hunt())


# -- the grids ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numpy", "null"])
def test_the_small_grid_passes(parity: Parity, backend: str) -> None:
    status, out = parity("--quick", "-b", backend, "-j", "2")
    failures = [line for line in out.splitlines() if line.endswith(" FAIL")]
    tests = re.search(r"^  (\d+)/(\d+) tests passed$", out, re.MULTILINE)
    assert status == 0 and not failures and tests and tests[1] == tests[2] == str(len(cases()))
    assert len(cases()) >= 1500
    for line in ("Testing 1 device", f"Backend 1/1: {backend}", f"  Backend {backend}: OK"):
        assert f"{line}\n" in out
    assert out.endswith("1/1 backends passed\nOK\n")


def test_a_sample_of_the_large_grid_passes(parity: Parity) -> None:
    sample = all_cases()[len(cases()) :: 331]
    assert len(sample) > 50
    for case in sample:
        status, out = parity("-b", "numpy", "-o", str(case))
        assert status == 0, out


# -- it can fail --------------------------------------------------------------------------------


def test_every_mutant_is_killed(fates: list[Fate]) -> None:
    alive = [fate for fate in fates if not fate.killed]
    assert not alive and len(fates) == len(MUTANTS) >= 30
    # They must fail by their results or writes, not by an exception.
    assert not [fate for fate in fates if fate.why.startswith("raised")]


def test_mutants_are_of_every_family() -> None:
    def families(names: set[str]) -> set[str]:
        return {getattr(ops, name).__module__ for name in names}

    views = {"pyggml.ops.views"}  # these have no kernels
    assert families({mutant.op for mutant in MUTANTS}) == families({c.op for c in cases()}) - views


@pytest.mark.parametrize(
    ("op", "what", "why"),
    [
        ("sqr", "into the source", "it changed its source s0"),
        ("tanh", "past the end", "it wrote next to its result"),
        ("scale", "past its scratch", "it wrote past its scratch"),
        (
            "soft_max_ext",
            "its scratch's old contents",
            "a second run over other memory gave other bits",
        ),
        ("silu", "drops the tail", "NaN"),
        ("mul", "clears its result first", "in place of s0"),
        ("exp", "its result as if contiguous", "it wrote next to its result"),
        ("set_rows", "rows that it does not write", "0.0 for"),
        ("causal_mask", "-65504 for -inf", "-inf at"),
        ("glu", "in its meaning, halves swapped", "NMSE"),
        ("mul_mat", "in weights, rows in reverse", "NMSE"),
        ("rms_norm", "counts bytes with 31 bits", "NMSE"),
    ],
)
def test_failures_say_what_is_wrong(fates: list[Fate], op: str, what: str, why: str) -> None:
    (fate,) = [fate for fate in fates if fate.op == op and what in fate.what]
    assert why in fate.why


# -- the command --------------------------------------------------------------------------------

KERNELS = """
import numpy as np
from pyggml import ops
from pyggml.backends.numpy.table import kernel

def right(out, a): np.maximum(a, 0, out=out)
def wrong(out, a): np.abs(a, out=out)
def broken(out, a): raise ZeroDivisionError("oh")

@kernel(ops.relu, types={"f32"})
def narrow(out, a): np.maximum(a, 0, out=out)
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(KERNELS)
    return str(path)


def test_a_users_kernel(parity: Parity, file: str) -> None:
    table = get("numpy")
    words = ("--quick", "-o", "relu", "--kernel")
    assert parity(*words, f"{file}:right")[0] == 0
    assert parity(*words, f"{file}:right", "-j", "2")[0] == 0
    status, out = parity(*words, f"{file}:wrong")
    assert status == 1 and "1/1 backends passed" not in out and out.endswith("FAIL\n")
    assert "NMSE" in out and "Failing tests:" in out
    (line, *_) = re.findall(r"^  pyggml (parity .*)$", out, re.MULTILINE)
    again = shlex.split(line)
    status, out = parity(*again[1:])  # the line is enough to rerun it
    assert status == 1 and "0/1 tests passed" in out
    assert "raised ZeroDivisionError: oh" in parity(*words, f"{file}:broken")[1]
    # The table is restored afterwards. A kernel that declares its types refuses the others.
    status, out = parity(*words, f"{file}:narrow")
    assert status == 0 and "not supported [numpy]: relu does not take f16\n" in out
    assert re.search(r"^  (\d+)/\1 tests passed, \d+ not supported$", out, re.MULTILINE)
    assert table.supports(build(Case.parse("relu(f16[3])")).node) is None


def test_choosing_cases(parity: Parity) -> None:
    status, out = parity("--mode", "list", "-o", "mul_mat", "-p", r"type_a=iq4_nl.*ne_b=\[256,1\]")
    lines = out.splitlines()
    assert status == 0 and lines and all("mul_mat(iq4_nl" in line for line in lines)
    status, out = parity("--mode", "list", "-o", "rope_ext", "-p", "mode='neox'", "--json")
    assert status == 0 and all("neox" in text for text in json.loads(out)["cases"])
    status, out = parity("-o", "relu(f32[3,2]@step)", "-b", "numpy")
    assert status == 0 and "  relu(f32[3,2]@step): OK\n" in out


def test_a_second_device(parity: Parity) -> None:
    case, device = "relu(f32[3,2]@step)", cast(Any, get("null", 1))
    status, out = parity("-o", case, "-b", "null:1")
    assert status == 0 and f"Backend 1/1: null:1\n  {case}: OK\n" in out
    device.limit = 1  # byte: now an error shows that this device runs the case
    try:
        status, out = parity("-o", case, "-b", "null:1")
        assert status == 1 and "OutOfMemoryError" in out and f"-b null:1 -o '{case}'" in out
        assert parity("-o", case, "-b", "null:0")[0] == 0
    finally:
        device.limit = None


def test_other_modes(parity: Parity, file: str) -> None:
    words = ("--quick", "-o", "relu", "-p", r"\[1\]", "-b", "numpy")
    status, out = parity(*words, "--mode", "support", "--kernel", f"{file}:narrow")
    assert status == 0 and "relu(f32[1]): SUPPORTED\n" in out
    assert "relu(f16[1]): NOT SUPPORTED (relu does not take f16)\n" in out
    status, out = parity("-o", "relu(f32[64,5])", "-b", "numpy", "--mode", "perf")
    assert status == 0 and re.search(r"\): \d+ runs - [\d.]+ us/run - .* GFLOPS - .* GB/s\n", out)
    status, out = parity("-o", "relu(f32[64,5])", "--mode", "perf")
    assert status == 0 and "numpy" in out and "null" not in out  # null runs only if named
    status, out = parity(*words, "--json")
    data = json.loads(out)
    assert status == 0 and data["mode"] == "test" and data["backends"][0]["backend"] == "numpy"
    assert {row["status"] for row in data["backends"][0]["cases"]} == {"ok"}


def test_a_device_with_a_queue_is_measured_in_time(
    parity: Parity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work is queued much faster than it runs."""
    row = table.KERNELS[ops.relu]

    def slow(*args: Any, **kwargs: Any) -> None:
        sleep(0.01)
        row.run(*args, **kwargs)

    monkeypatch.setitem(table.KERNELS, ops.relu, replace(row, run=slow))
    monkeypatch.setattr(running, "MEASURED", 0.2)
    status, out = parity("-o", "relu(f32[64,5])", "-b", "null", "--mode", "perf")
    line = re.search(r"\): (\d+) runs - ([\d.]+) us/run", out)
    assert status == 0 and line is not None
    runs, us = int(line[1]), float(line[2])
    assert us >= 10_000 and runs <= 20


def test_stand_ins_are_the_last_backends(parity: Parity) -> None:
    names = ["cpu", "cuda", "numpy", "null"]
    assert list(backends.available()) == names
    status, out = parity("-o", "relu(f32[3])", "--mode", "support")
    assert status == 0 and re.findall(r"Backend \d/4: (\w+)", out) == names


def test_costs_of_rows_do_not_count_the_whole_table() -> None:
    table = gg.state("table", "q8_0", ne=(64, 1000))
    ids = gg.input("ids", "i32", ne=(3,))
    rows = gg.get_rows(table, ids)
    assert cost_of(rows).nbytes == 3 * 68 + 3 * 4 + 3 * 64 * 4
    assert cost_of(gg.set_rows(table, rows, ids)).nbytes == 3 * 64 * 4 + 3 * 4 + 3 * 68
    part = gg.view(gg.state("s", "f32", ne=(64, 1000)), ne=(64, 3))
    assert cost_of(gg.cpy(rows, part)).nbytes == 2 * 3 * 64 * 4


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("-o", "nothing"), "no cases of nothing"),
        (("-o", "Op(f32[3])"), "there is no op 'Op'"),
        (("-o", "relu(f32[3]@odd)"), "is not a source"),
        (("-o", "relu(f32[3]@far)"), "only inputs and states of several rows"),
        (("-o", "relu(f32[3,2]@weight@far)"), "only inputs and states of several rows"),
        (("-o", "relu.means(f32[3])"), "relu has no meaning"),
        (("-o", "relu(f32[3]"), "is not a case"),
        (("-o", "scale(f32[3], s=x)"), "'x' is not a value"),
        (("-o", "flash_attn_ext(f32[3,1], f32[3,2], f32[2,2]=4+1, scale=1.0)"), "is a view of"),
        (("-o", "mul_mat(f32[3], f32[4])"), "inner dimensions differ"),
        (("-o", "relu", "-p", "q8_0"), "matches no case"),
        (("-b", "null:0:1GiB"), "null:0:1GiB is a description of a device"),
        (("--markdown",), "--mode support"),
        (("--kernel", "missing.py:f", "-o", "relu"), "there is no file missing.py"),
        (("--kernel", "FILE", "-o", "relu"), "expected file.py:function"),
        (("--kernel", "FILE:", "-o", "relu"), "expected file.py:function"),
        (("--kernel", "FILE:f", "-o", "relu"), "has no function 'f'"),
        (("--kernel", "FILE:right"), "name one with -o"),
    ],
)
def test_errors_are_one_line(capsys: Streams, file: str, words: tuple[str, ...], why: str) -> None:
    assert main(["parity", *(word.replace("FILE", file) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert not out and why in err and err.startswith("pyggml: error: ") and err.count("\n") == 1


def test_wrong_usage() -> None:
    for words in (["-j", "0"], ["-j", "x"], ["--mode", "grad"], ["--json", "--markdown"]):
        assert main(["parity", *words]) == 2


# -- documents ----------------------------------------------------------------------------------


def test_the_table_of_ops_is_current(parity: Parity) -> None:
    """If it fails: pyggml parity --mode support --markdown > docs/ops.md"""
    words = ("--mode", "support", "--markdown", "-j", "2")
    assert parity(*words) == (0, (ROOT / "docs/ops.md").read_text())


def test_the_documents_kernel_end_to_end(parity: Parity, tmp_path: Path) -> None:
    text = (ROOT / "docs/parity.md").read_text()
    kernel, model = re.findall(r"^```py\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    command = re.search(r"^pyggml parity (--kernel my_kernel.*type_a=iq4_nl)$", text, re.MULTILINE)
    assert command
    path = tmp_path / "my_kernel.py"
    words = shlex.split(command[1].replace("my_kernel.py", str(path)))
    path.write_text(kernel)
    status, out = parity(*words)
    assert status == 0 and re.search(r"^  (\d\d+)/\1 tests passed$", out, re.MULTILINE)
    path.write_text(kernel.replace("i2 // (b2 // a2)", "i2 % a2"))
    assert parity(*words)[0] == 1
    path.write_text(kernel)
    (tmp_path / "model.py").write_text(model)
    env = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, tmp_path / "model.py"], env=env, capture_output=True, text=True
    )
    assert result.stdout == "(4, 256)\n", result.stderr

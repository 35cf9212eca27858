"""The parts of the tests on a GPU, tried without one: processes, cases, reports."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pyggml import backends
from pyggml.backends.cuda.launch import Launch
from pyggml.errors import DeviceError
from pyggml.parity.case import build
from pyggml.parity.cases import cases
from tests.cuda.conftest import Machine
from tests.cuda.test_recording import records_of
from tests.gpu import test_gpu_arrays as arrays
from tests.gpu import test_gpu_faults as faults
from tests.gpu.attention_cases import attentions, forced
from tests.gpu.away import Process
from tests.gpu.programs import python
from tests.gpu.test_gpu_attention import judged
from tests.gpu.test_gpu_parity import Counts, grid
from tests.gpu.test_gpu_products import GROUPS, of
from tests.gpu.test_gpu_sanitize import MANY, Verdict, run, spread

# -- processes ----------------------------------------------------------------------------------


def add(a: int, b: int) -> int:
    return a + b


def fails() -> None:
    raise AssertionError("why it failed")


def skips() -> None:
    pytest.skip("why it was skipped")


def loses() -> None:
    raise DeviceError("this process can no longer use the GPU")


def test_a_function_runs_in_the_other_process() -> None:
    process = Process()
    here = process.call(os.getpid).value
    assert here != os.getpid() and process.call(add, 1, b=2) == ("ok", 3)
    status, text = process.call(fails)
    assert status == "fail" and "why it failed" in text and "line" in text
    assert process.call(skips) == ("skip", "why it was skipped")
    assert process.call(os.getpid).value == here
    process.close()


@pytest.mark.parametrize(
    ("function", "args", "patience", "why"),
    [
        (os.abort, (), 60, "the process died: SIGABRT"),
        (os._exit, (3,), 60, "the process died: exit status 3"),
        (time.sleep, (60,), 2, "no answer within 2 s"),
        (loses, (), 60, "can no longer use the GPU"),
    ],
    ids=["dies", "ends", "hangs", "loses the GPU"],
)
def test_the_next_call_starts_another_process(
    function: Any, args: Any, patience: float, why: str
) -> None:
    process = Process()
    first = process.call(os.getpid).value
    process.patience = patience
    status, text = process.call(function, *args)
    assert status == "fail" and why in text
    process.patience = 60
    assert process.call(os.getpid).value not in (first, os.getpid())
    process.close()


def test_a_program_is_stopped_with_its_children() -> None:
    code = "import subprocess; subprocess.run(['sleep', '60'])"
    begin = time.monotonic()
    result = python("-c", code).wait(1)
    assert result.status is None and time.monotonic() - begin < 30
    result = python("-c", "import sys; print(sys.stdin.read()); sys.exit(3)", text="given").wait(60)
    assert (result.status, result.out) == (3, "given\n")


# -- the tests on a GPU -------------------------------------------------------------------------


def test_every_attention_uses_its_kernel() -> None:
    for case in attentions():
        with forced(case.route):
            records = records_of(case.node())
        files = {record.file for record in records if isinstance(record, Launch)}
        assert not case.route or f"attention_{case.route}.cu" in files, case


def test_attentions_are_right_on_numpy() -> None:
    small = [case for case in attentions() if case.route]
    assert {str(case): fault for case in small[::17] if (fault := judged(case, "numpy"))} == {}


def test_a_wrong_attention_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in attentions() if case.mask == "window" and case.n_kv > 99)
    assert not judged(case, "numpy")
    monkeypatch.setattr(type(case), "window", property(lambda self: self.n_kv // 2))
    node = case.node()
    monkeypatch.undo()
    monkeypatch.setattr(type(case), "node", lambda self: node)
    assert "NOT within" in judged(case, "numpy")


@pytest.mark.parametrize("group", GROUPS)
def test_every_product_has_a_kernel(group: str) -> None:
    device = backends.get("cuda")
    refusals = {str(c): device.supports(build(c, values=False).node) for c in of(group)}
    assert len(refusals) > 100 and not any(refusals.values())


def test_the_tests_of_faults_pass_on_a_fake_gpu(machine: Machine) -> None:
    machine("gpu")
    faults.test_wrong_index()
    faults.test_memory_full()
    with pytest.raises(pytest.skip.Exception, match="there is one GPU here"):
        arrays.needs_two()
    machine("gpus")
    arrays.needs_two()


@pytest.mark.parametrize(("words", "status"), [((), 0), (("-m", "gpu"), 1)])
def test_without_a_gpu_none_passes(words: tuple[str, ...], status: int) -> None:
    """They are skipped with the reason, and fail if `-m gpu` selects them."""
    file = "tests/gpu/test_gpu_fusions.py"
    result = python("-m", "pytest", "-rs", *words, file, CUDA_VISIBLE_DEVICES="").wait(120)
    assert result.status == status and "passed" not in result.out, result
    assert "needs pycuda" in result.out or "no GPU can be used" in result.out


# -- the grid -----------------------------------------------------------------------------------


def test_cases_are_counted_in_the_output_of_the_command() -> None:
    result = grid("-o", "relu,add", "--quick", seconds=300, backend="numpy")
    number = sum(case.op in ("relu", "add") for case in cases())
    assert result.status == 0 and Counts.of(result.out) == (number, 0, 0)


def test_failures_and_refusals_are_counted(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel.py"
    kernel.write_text("def wrong(a, *, out=None, **named):\n    out[...] = 7\n")
    words = ("--kernel", f"{kernel}:wrong", "-o", "relu", "--quick")
    result = grid(*words, seconds=300, backend="numpy")
    number = sum(case.op == "relu" for case in cases())
    assert result.status == 1 and Counts.of(result.out) == (0, number, 0), result
    unsupported = "  mul_mat(q1_0[256,7], f32[256,5]): not supported [cuda]: no kernel\n"
    assert Counts.of(unsupported) == (0, 0, 1)


# -- compute-sanitizer --------------------------------------------------------------------------

SANITIZER = """
import json, pathlib, sys
words = sys.argv[1:]
assert words[:2] == ["--tool", "memcheck"] and words[-2:] == ["tests.gpu.sanitized", "5"], words
report = pathlib.Path(words[words.index("--log-file") + 1])
for line in sys.stdin:
    print(json.dumps([line.strip(), "ok", ""]))
report.write_text("========= Invalid __global__ read\\n" * {errors} + {end!r})
"""


@pytest.mark.parametrize(
    ("errors", "end", "expected"),
    [(0, "========= ERROR SUMMARY: 0 errors", 0), (2, "ERROR SUMMARY: 2 errors", 2), (1, "", None)],
    ids=["right", "two errors", "no end"],
)
def test_the_report_of_a_sanitizer_is_read(
    tmp_path: Path, errors: int, end: str, expected: int | None
) -> None:
    tool = tmp_path / "sanitizer"
    tool.write_text(f"#!{sys.executable}\n" + SANITIZER.format(errors=errors, end=end))
    tool.chmod(0o755)
    lines = ["relu(f32[4])", "abs(f32[4])"]
    verdict: Verdict = run(str(tool), "memcheck", lines, 5, tmp_path / "report")
    assert [row[0] for row in verdict.outcomes] == lines and verdict.errors == expected
    assert ("Invalid" in verdict.complaints) == bool(errors)


def test_the_spread_alternates_between_ops() -> None:
    lines = [str(case) for case in cases()]
    order = list(spread(lines))
    assert len(order) == len(set(order)) and set(order) <= set(lines)
    assert not any("@far" in line or ".means(" in line for line in order)
    ops = [line.partition("(")[0] for line in order]
    first = len(set(ops)) + 2 * len(MANY)
    assert set(ops[:first]) == set(ops)

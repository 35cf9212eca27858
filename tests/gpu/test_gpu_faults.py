"""Failures on a GPU. Each must raise a clear error, leak nothing, and leave the process usable if
the driver allows it. Tests that need no GPU are in tests/cuda/test_faults.py."""

from __future__ import annotations

import gc
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from pyggml.errors import DeviceError, OutOfMemoryError
from tests.gpu.checks import apart, refused
from tests.gpu.programs import Program, python


def test_wrong_index() -> None:
    y = {"y": gg.relu(gg.input("x", ne=(4,)))}
    plan = gg.compile(y, backends=["cuda:99"])
    refused(DeviceError, plan.bind, "cuda:99", "GPUs here: cuda:0", "Choose one of these")


def test_memory_full() -> None:
    device = backends.get("cuda")
    y = {"y": gg.relu(gg.input("x", ne=(1 << 21, 1 << 20)))}
    plan = gg.compile(y, backends=["cuda"])
    refused(OutOfMemoryError, lambda: device.alloc(1 << 45), "are free")
    refused(OutOfMemoryError, plan.bind, "are free", "Pin weights", "the plan needs:\ndevice")


def everything() -> tuple[dict[str, gg.Node], np.ndarray[Any, Any]]:
    """A graph with weights for cuBLAS and for pyggml's kernels, a state, an input and scratch; and
    the input's values."""
    rng = np.random.default_rng(0)
    x, state = gg.input("x", ne=(256, 40)), gg.state("s", ne=(256, 40))
    norm = gg.constant(np.ones(256, np.float32), name="norm")
    y = gg.mul(gg.rms_norm(gg.sub(x, state), eps=1e-6), norm)
    for dtype in ("f16", "q8_0"):
        w = rng.standard_normal((256, 256)).astype(np.float32) / 16
        y = gg.mul_mat(gg.constant(w, dtype=dtype, name=f"w_{dtype}"), y)
    return {"y": y}, rng.standard_normal((40, 256)).astype(np.float32)


def test_every_allocation() -> None:
    """Let the n-th allocation fail, for every n. The error shows the plan's memory; afterwards the
    plan can run, and deleting it frees everything."""
    from tests.cuda.allocations import ALLOCATIONS, fail_allocation

    outputs, x = everything()
    expected = gg.compile(outputs).run(x=x)["y"]
    device: Any = backends.get("cuda")
    ALLOCATIONS.watch(device.context.driver)
    before, number, complete = None, 0, False
    while not complete:
        for name in ("staging", "cublas"):  # the device keeps these for the next plan
            vars(device).pop(name, None)
        gc.collect()
        if before is None:
            before = ALLOCATIONS.blocks, ALLOCATIONS.nbytes
        assert (ALLOCATIONS.blocks, ALLOCATIONS.nbytes) == before, f"memory leaked after {number}"
        number += 1
        plan = gg.compile(outputs, backends=["cuda"])
        with fail_allocation(number):
            try:
                plan.run(x=x)
                complete = True
            except OutOfMemoryError as error:
                assert "the plan needs:\ndevice" in str(error), f"{number}: no table in {error}"
        for _ in range(3):  # launched, captured, replayed
            error_after = apart(plan.run(x=x)["y"], expected)
            assert error_after < 1e-2, f"after {number}: relative error {error_after}"
        del plan
    # Three weights, a state, an input, arena, ring, cuBLAS.
    assert number == 9, f"{number - 1} allocations, expected 8"


def test_bad_kernel() -> None:
    from pyggml.backends.cuda.device import compiler

    refused(
        compiler.CompileError,
        lambda: compiler.compile_instance("norm.cu", "rms_norm<float>", "90a"),
        "kernels/norm.cu",
        "rms_norm<float>",
        "error",
    )


# -- in other processes ------------------------------------------------------------------

#: Runs `everything` on the GPU and on NumPy; prints the outcome and the number of warnings.
PROGRAM = """
import warnings
import numpy as np, pyggml as gg
from tests.gpu.test_gpu_faults import everything
outputs, x = everything()
expected = gg.compile(outputs).run(x=x)["y"]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        y = gg.compile(outputs, backends=["cuda"]).run(x=x)["y"]
        error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
        print("RIGHT" if error < 1e-2 else f"WRONG by {error:.2e}")
    except gg.DeviceError as error:
        print("RAISED", error)
        print("NUMPY", np.array_equal(gg.compile(outputs).run(x=x)["y"], expected))
print("WARNINGS", sum("PYGGML_CACHE" in str(warning.message) for warning in caught))
"""
#: Time limit of a program, in seconds.
PATIENCE = 120


def start(program: str = PROGRAM, **variables: str) -> Program:
    return python("-c", program, **variables)


def expect(program: Program, *words: str) -> None:
    """Assert that it succeeds and prints these words."""
    result = program.wait(PATIENCE)
    missing = [word for word in words if word not in result.out]
    assert result.status == 0 and not missing, f"no {missing} in: {result}"


def test_hidden_gpu() -> None:
    program = start(CUDA_VISIBLE_DEVICES="")
    expect(program, "RAISED no GPU can be used", "CUDA_VISIBLE_DEVICES", "NUMPY True")


def test_two_processes_fill_an_empty_cache_at_once() -> None:
    with TemporaryDirectory() as folder:
        for program in [start(PYGGML_CACHE=folder) for _ in range(2)]:
            expect(program, "RIGHT", "WARNINGS 0")
        assert {path.suffix for path in Path(folder, "cuda").iterdir()} == {".cubin"}


def test_corrupt_cache() -> None:
    with TemporaryDirectory() as folder:
        expect(start(PYGGML_CACHE=folder), "RIGHT", "WARNINGS 0")
        files = {path: path.read_bytes() for path in Path(folder, "cuda").iterdir()}
        assert len(files) > 3
        for i, (path, data) in enumerate(files.items()):
            path.write_bytes((data[: len(data) // 2], b"", b"\x00" * 999, data + b"x")[i % 4])
        expect(start(PYGGML_CACHE=folder), "RIGHT", "WARNINGS 0")
        # Compare sizes only: NVRTC need not produce the same bytes twice.
        assert all(len(path.read_bytes()) > len(data) // 2 for path, data in files.items())


def test_unwritable_cache() -> None:
    with TemporaryDirectory() as folder:
        Path(folder, "file").touch()  # a file in place of the folder
        expect(start(PYGGML_CACHE=f"{folder}/file"), "RIGHT", "WARNINGS 1")


#: Loses the GPU by an illegal address in a step of a plan.
LOSS = """
import os, sys
import numpy as np, pyggml as gg
from pyggml import backends
from pyggml.backends.cuda import recording
from pyggml.backends.cuda.launch import Operand
x = gg.input("x", ne=(64,))
plan = gg.compile({"y": gg.relu(x)}, backends=["cuda"])
assert callable(recording.operand_at)  # else the next line would change nothing
recording.operand_at = lambda at, spec: Operand(1 << 50, spec.ne, spec.nb, spec.dtype)
for word in ("FIRST", "AGAIN"):
    try: plan.run(x=np.ones(64))
    except gg.DeviceError as error: print(word, error)
try: backends.get("cuda").alloc(1 << 20)
except gg.DeviceError as error: print("ALLOC", error)
print("NUMPY", gg.compile({"y": gg.relu(x)}).run(x=np.ones(64))["y"].sum())
del plan
"""


@pytest.mark.parametrize(
    ("debug", "words"),
    [("", ["PYGGML_CUDA_DEBUG=1"]), ("1", ["FIRST relu(x): "])],
    ids=["usual", "debug"],
)
def test_sticky_error(debug: str, words: list[str]) -> None:
    """The error says that the GPU is lost and how to find the cause. NumPy still works, and the
    process ends normally."""
    always = ("FIRST", "AGAIN", "ALLOC", "can no longer use the GPU", "NUMPY 64")
    expect(start(LOSS, PYGGML_CUDA_DEBUG=debug), *always, *words)

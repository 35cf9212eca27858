"""What may go wrong on a GPU, tried: each must be a named error, leave nothing behind, and the
process usable where the driver allows. What needs no GPU is in tests/cuda/test_faults.py."""

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
    """Weights for cuBLAS and for our kernels, a state, an input, scratch; and an input's values."""
    rng = np.random.default_rng(0)
    x, state = gg.input("x", ne=(256, 40)), gg.state("s", ne=(256, 40))
    norm = gg.constant(np.ones(256, np.float32), name="norm")
    y = gg.mul(gg.rms_norm(gg.sub(x, state), eps=1e-6), norm)
    for kind in ("f16", "q8_0"):
        w = rng.standard_normal((256, 256)).astype(np.float32) / 16
        y = gg.mul_mat(gg.constant(w, dtype=kind, name=f"w_{kind}"), y)
    return {"y": y}, rng.standard_normal((40, 256)).astype(np.float32)


def test_every_allocation() -> None:
    """For every n the n-th fails: a named error with the plan's table, nothing left once the plan
    is gone, and before that the same plan can be run."""
    from tests.cuda.allocations import ALLOCATIONS, fail_allocation

    outputs, given = everything()
    want = gg.compile(outputs).run(x=given)["y"]
    device: Any = backends.get("cuda")
    ALLOCATIONS.watch(device.context.driver)
    before, number, done = None, 0, False
    while not done:
        for kept in ("staging", "cublas"):  # which a device keeps for the next plan
            vars(device).pop(kept, None)
        gc.collect()
        if before is None:
            before = ALLOCATIONS.blocks, ALLOCATIONS.nbytes
        assert (ALLOCATIONS.blocks, ALLOCATIONS.nbytes) == before, f"blocks stay after {number}"
        number += 1
        plan = gg.compile(outputs, backends=["cuda"])
        with fail_allocation(number):
            try:
                plan.run(x=given)
                done = True
            except OutOfMemoryError as error:
                assert "the plan needs:\ndevice" in str(error), f"{number}: no table in {error}"
        for _ in range(3):  # by launches, then by graphs
            error_after = apart(plan.run(x=given)["y"], want)
            assert error_after < 1e-2, f"after {number}: relative error {error_after}"
        del plan
    # Three weights, a state, an input, arena, ring, cuBLAS.
    assert number == 9, f"there were {number - 1} allocations, not 8"


def test_bad_kernel() -> None:
    from pyggml.backends.cuda.device import compiler

    refused(
        compiler.CompileError,
        lambda: compiler.compile_instance("norm.cu", "rms_norm<float>", "90a"),
        "kernels/norm.cu",
        "rms_norm<float>",
        "error",
    )


# -- in processes of their own ------------------------------------------------------------------

#: Runs `everything` on the GPU and on NumPy; prints what came of it, and how many warnings.
PROGRAM = """
import warnings
import numpy as np, pyggml as gg
from tests.gpu.test_gpu_faults import everything
outputs, given = everything()
want = gg.compile(outputs).run(x=given)["y"]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        got = gg.compile(outputs, backends=["cuda"]).run(x=given)["y"]
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        print("RIGHT" if error < 1e-2 else f"WRONG by {error:.2e}")
    except gg.DeviceError as error:
        print("RAISED", error)
        print("NUMPY", np.array_equal(gg.compile(outputs).run(x=given)["y"], want))
print("WARNINGS", sum("PYGGML_CACHE" in str(one.message) for one in caught))
"""
#: Seconds that a program may take.
PATIENCE = 120


def start(program: str = PROGRAM, **variables: str) -> Program:
    return python("-c", program, **variables)


def expect(program: Program, *words: str) -> None:
    """It ended well, and printed these words."""
    done = program.wait(PATIENCE)
    missing = [word for word in words if word not in done.out]
    assert done.status == 0 and not missing, f"no {missing} in: {done}"


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
        # Code is looked at by its hash alone: NVRTC need not give the same bytes twice.
        assert all(len(path.read_bytes()) > len(data) // 2 for path, data in files.items())


def test_unwritable_cache() -> None:
    with TemporaryDirectory() as folder:
        Path(folder, "file").touch()  # where the folder would be
        expect(start(PYGGML_CACHE=f"{folder}/file"), "RIGHT", "WARNINGS 1")


#: Loses the GPU by a bad address, in a launch and then in a plan's step.
LOST = """
import os, sys
import numpy as np, pyggml as gg
from pyggml import backends
from pyggml.backends.cuda import runner
from pyggml.backends.cuda.launch import Operand
x = gg.input("x", ne=(64,))
plan = gg.compile({"y": gg.relu(x)}, backends=["cuda"])
runner.operand_at = lambda at, spec: Operand(1 << 50, spec.ne, spec.nb, spec.dtype)
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
    """It says that the GPU is lost and how to find out why; NumPy goes on, and the process ends as
    it should."""
    always = ("FIRST", "AGAIN", "ALLOC", "can no longer use the GPU", "NUMPY 64")
    expect(start(LOST, PYGGML_CUDA_DEBUG=debug), *always, *words)

"""What may go wrong on a GPU, tried: each must be a named error, leave nothing behind, and the
process usable where the driver allows. What needs no GPU is in tests/cuda/test_faults.py."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import pyggml as gg
from pyggml import backends
from pyggml.errors import DeviceError, OutOfMemoryError


def raises(kind: type[Exception], call: Callable[[], object], *words: str) -> str:
    try:
        call()
    except kind as error:
        missing = [word for word in words if word not in str(error)]
        return f"says nothing of {missing}: {error}" if missing else ""
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    return "nothing was raised"


# -- in this process ----------------------------------------------------------------------------


def _wrong_index() -> str:
    y = {"y": gg.relu(gg.input("x", ne=(4,)))}
    plan = gg.compile(y, backends=["cuda:99"])
    return raises(DeviceError, plan.bind, "cuda:99", "GPUs here: cuda:0", "Choose one of these")


def _memory_full() -> str:
    device = backends.get("cuda")
    y = {"y": gg.relu(gg.input("x", ne=(1 << 21, 1 << 20)))}
    plan = gg.compile(y, backends=["cuda"])
    return raises(OutOfMemoryError, lambda: device.alloc(1 << 45), "are free") or raises(
        OutOfMemoryError, plan.bind, "are free", "Pin weights", "the plan needs:\ndevice"
    )


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


def _every_allocation() -> str:
    """For every n the n-th fails: a named error with the plan's table, nothing left once the plan
    is gone, and before that the same plan can be run."""
    from tests.cuda.allocations import ALLOCATIONS, fail_allocation

    outputs, given = everything()
    want = gg.compile(outputs).run(x=given)["y"]
    device: Any = backends.get("cuda")
    ALLOCATIONS.watch(device.context.driver)
    before, number = None, 0
    while True:
        for kept in ("staging", "cublas"):  # which a device keeps for the next plan
            vars(device).pop(kept, None)
        gc.collect()
        if before is None:
            before = ALLOCATIONS.blocks, ALLOCATIONS.nbytes
        if (ALLOCATIONS.blocks, ALLOCATIONS.nbytes) != before:
            return f"allocation {number}: {ALLOCATIONS.blocks - before[0]} blocks stay"
        number += 1
        plan = gg.compile(outputs, backends=["cuda"])
        with fail_allocation(number):
            try:
                plan.run(x=given)
                done = True
            except OutOfMemoryError as error:
                done = False
                if "the plan needs:\ndevice" not in str(error):
                    return f"allocation {number}: no table in {error}"
        for _ in range(3):  # by launches, then by graphs
            got = plan.run(x=given)["y"]
            error = np.linalg.norm(got - want) / np.linalg.norm(want)
            if not error < 1e-2:
                return f"allocation {number}: relative error {error} afterwards"
        del plan
        if done:  # three weights, a state, an input, arena, ring, cuBLAS
            return "" if number == 9 else f"there were {number - 1} allocations, not 8"


def _bad_kernel() -> str:
    from pyggml.backends.cuda.device import compiler

    return raises(
        compiler.CompileError,
        lambda: compiler.compile_instance("norm.cu", "rms_norm<float>", "90a"),
        "kernels/norm.cu",
        "rms_norm<float>",
        "error",
    )


# -- in processes of their own ------------------------------------------------------------------

#: Runs `everything` on the GPU and on NumPy; prints what went wrong and how many warnings came.
PROGRAM = """
import sys, warnings
sys.path.insert(0, {here!r})
import numpy as np, pyggml as gg
from gpu_faults import everything
outputs, given = everything()
want = gg.compile(outputs).run(x=given)["y"]
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    try:
        got = gg.compile(outputs, backends=["cuda"]).run(x=given)["y"]
        print("ERROR %.3g" % (np.linalg.norm(got - want) / np.linalg.norm(want)))
    except gg.DeviceError as error:
        print("RAISED", error)
        print("NUMPY", np.array_equal(gg.compile(outputs).run(x=given)["y"], want))
print("WARNINGS", sum("PYGGML_CACHE" in str(one.message) for one in told))
"""


def begun(program: str = PROGRAM, **variables: str) -> subprocess.Popen[str]:
    text = program.replace("{here!r}", repr(str(Path(__file__).parent)))
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", text],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
    )


def told(process: subprocess.Popen[str], *words: str) -> str:
    """What is wrong with what a process prints, which must hold these words; and with its end."""
    out, err = process.communicate(timeout=120)
    missing = [word for word in words if word not in out]
    if not missing and process.returncode == 0:
        return ""
    return f"status {process.returncode}, no {missing} in: {out[-600:]} {err[-600:]}"


def _hidden_gpu() -> str:
    process = begun(CUDA_VISIBLE_DEVICES="")
    return told(process, "RAISED no GPU can be used", "CUDA_VISIBLE_DEVICES", "NUMPY True")


def _two_processes() -> str:
    """They fill an empty cache at once."""
    with TemporaryDirectory() as folder:
        both = [begun(PYGGML_CACHE=folder) for _ in range(2)]
        wrong = "".join(told(one, "ERROR", "WARNINGS 0") for one in both)
        files = [path.suffix for path in Path(folder, "cuda").iterdir()]
        return wrong or ("" if set(files) == {".cubin"} else f"there are {files}")


def _corrupt_cache() -> str:
    with TemporaryDirectory() as folder:
        wrong = told(begun(PYGGML_CACHE=folder), "ERROR", "WARNINGS 0")
        files = {path: path.read_bytes() for path in Path(folder, "cuda").iterdir()}
        for i, (path, data) in enumerate(files.items()):
            path.write_bytes((data[: len(data) // 2], b"", b"\x00" * 999, data + b"x")[i % 4])
        wrong = wrong or told(begun(PYGGML_CACHE=folder), "ERROR", "WARNINGS 0")
        # Code is looked at by its hash alone: NVRTC need not give the same bytes twice.
        whole = all(len(path.read_bytes()) > len(data) // 2 for path, data in files.items())
        return wrong or ("" if whole and len(files) > 3 else "the files were not made again")


def _unwritable_cache() -> str:
    with TemporaryDirectory() as folder:
        Path(folder, "file").touch()  # where the folder would be
        return told(begun(PYGGML_CACHE=f"{folder}/file"), "ERROR", "WARNINGS 1")


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


def _sticky_error() -> str:
    """It says that the GPU is lost and how to find out why; NumPy goes on, and the process ends as
    it should."""
    words = ("FIRST", "AGAIN", "ALLOC", "can no longer use the GPU", "NUMPY 64")
    wrong = told(begun(LOST), *words, "PYGGML_CUDA_DEBUG=1")
    return wrong or told(begun(LOST, PYGGML_CUDA_DEBUG="1"), *words, "FIRST relu(x): ")


def report(kind: str, checks: Sequence[Callable[[], str]], log: list[str]) -> bool:
    """Run checks, each of which says what is wrong, and print a line of each."""
    fine = True
    for check in checks:
        try:
            wrong = check()
        except Exception as error:
            log.append(traceback.format_exc())
            wrong = f"raised {type(error).__name__}: {error}"
        fine &= not wrong
        print(f"{kind} {check.__name__[1:]:20} {'FAIL ' + wrong[:600] if wrong else 'ok'}")
    return fine


def faults(log: list[str]) -> bool:
    checks = (
        _wrong_index,
        _memory_full,
        _every_allocation,
        _bad_kernel,
        _hidden_gpu,
        _two_processes,
        _corrupt_cache,
        _unwritable_cache,
        _sticky_error,
    )
    return report("fault", checks, log)

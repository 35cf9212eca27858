"""What may go wrong on a GPU, tried: each must be a named error, and leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence

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


def _wrong_index() -> str:
    far = backends.get("cuda", 99)
    return raises(DeviceError, lambda: far.alloc(16), "cuda:99", "GPUs here")


def _memory_full() -> str:
    device = backends.get("cuda")
    return raises(OutOfMemoryError, lambda: device.alloc(1 << 45), "are free")


def _every_allocation() -> str:
    from pyggml.backends.cuda.memory import ALLOCATIONS, fail_allocation

    x = gg.input("x", ne=(64, 8))
    state = gg.state("s", ne=(64, 8))
    weight = gg.constant(np.ones((8, 64), np.float32), name="w")
    y = gg.add(gg.mul(gg.rms_norm(x, eps=1e-6), weight), state)
    given = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    before, number = ALLOCATIONS.blocks, 0
    while True:
        number += 1
        plan = gg.compile({"y": y}, backends=["cuda"])
        try:
            with fail_allocation(number):
                plan.run(x=given)
            done = True
        except OutOfMemoryError:
            done = False
        del plan
        if ALLOCATIONS.blocks != before:
            return f"allocation {number}: {ALLOCATIONS.blocks - before} blocks stay"
        if done:
            return "" if number > 4 else f"there were but {number - 1} allocations"


def _bad_kernel() -> str:
    from pyggml.backends.cuda import compiler

    return raises(
        compiler.CompileError,
        lambda: compiler.compile_instance("norm.cu", "rms_norm<float>", "90a"),
        "norm.cu",
        "error",
    )


def _sticky_error() -> str:
    """In a process of its own, whose GPU is lost by a bad address."""
    program = (
        "import pyggml as gg, numpy as np\n"
        "from pyggml import backends\n"
        "from pyggml.backends.cuda.launch import Launch, Operand, pack\n"
        "d = backends.get('cuda')\n"
        "d.alloc(16)\n"
        "from pyggml.dtypes import F32\n"
        "bad = Operand(1 << 50, (64, 1, 1, 1), (4, 256, 256, 256), F32)\n"
        "args = pack([bad.tensor] * 3 + [np.float32(0)])\n"
        "one = Launch('norm.cu', 'rms_norm<1, 1, false>', (1, 1, 1), (64, 1, 1), args)\n"
        "with d.context: d.context.load([one]); d.context.start(one)\n"
        "try: d.synchronize()\n"
        "except gg.DeviceError as e: print('NAMED', 'PYGGML_CUDA_DEBUG' in str(e), e)\n"
        "try: d.alloc(1 << 20)\n"
        "except gg.DeviceError as e: print('AGAIN', e)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    fine = "NAMED True" in ran.stdout and "AGAIN" in ran.stdout and ran.returncode == 0
    return "" if fine else f"status {ran.returncode}: {ran.stdout[-300:]} {ran.stderr[-500:]}"


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
    checks = (_wrong_index, _memory_full, _every_allocation, _bad_kernel, _sticky_error)
    return report("fault", checks, log)

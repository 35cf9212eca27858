"""The cpu backend: native kernels for processors with AVX2, in the memory of the NumPy backend.

Kernels are compiled by numba on first use and kept in a cache folder. Ops without one run by
NumPy's kernels, in the same memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

from pyggml.backends.base import Finding
from pyggml.errors import DeviceError

if TYPE_CHECKING:
    from pyggml.backends.cpu.backend import CpuBackend

FIX = 'pip install "pyggml[cpu]"'


@cache
def device(index: int) -> CpuBackend:
    """The host, which has index 0.

    Errors: DeviceError for any other index, and if this machine cannot run the kernels.
    """
    if index:
        raise DeviceError(f"cpu:{index}: there is only one host; use 'cpu'")
    for finding in findings():
        if finding.state == "absent":
            fix = f"; to fix it: {finding.fix}" if finding.fix else ""
            raise DeviceError(f"the cpu backend needs {finding.what}: {finding.text}{fix}")
    from pyggml.backends.cpu.backend import CpuBackend

    return CpuBackend()


def present() -> bool:
    """Whether this machine can compile and run the kernels."""
    return all(finding.state == "ok" for finding in findings())


def findings() -> Iterator[Finding]:
    """The status of everything the backend needs, for `pyggml doctor`."""
    from importlib import metadata, util

    if util.find_spec("numba") is None or util.find_spec("llvmlite") is None:
        yield Finding(
            "numba", "not installed; products run by NumPy, many times slower", FIX, "absent"
        )
        return
    yield Finding("numba", metadata.version("numba"))
    from pyggml.backends.cpu.native import isa

    level = isa.best()
    if level is None:
        text = "no AVX2, FMA and F16C; products run by NumPy, many times slower"
        yield Finding("processor", text, "", "absent")
    else:
        yield Finding("processor", f"kernels use {level}")

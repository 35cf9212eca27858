"""The cpu backend: native kernels for processors with AVX2, in the memory of the NumPy backend.

Kernels are compiled by numba on first use and kept in a cache folder. Ops without one run by
NumPy's kernels, in the same memory. Planning needs no numba; `bind` does. `pyggml doctor` says what
is missing.
"""

from __future__ import annotations

from functools import cache

from pyggml.backends.cpu.backend import CpuBackend
from pyggml.backends.cpu.doctor import findings
from pyggml.backends.cpu.table import kernel


@cache
def device(index: int) -> CpuBackend:
    """The host (0), or one of several parts of it for `shard=`."""
    return CpuBackend(index)


def present() -> bool:
    """Whether this machine can compile and run the kernels."""
    return all(finding.state == "ok" for finding in findings())


__all__ = ["CpuBackend", "device", "findings", "kernel", "present"]

"""The CUDA backend: kernels of our own, compiled by NVRTC for the GPU at hand, and cuBLAS.

Planning for a GPU needs neither one nor pycuda and CuPy; `bind` does. `pyggml doctor` says what is
missing.
"""

from __future__ import annotations

from collections.abc import Iterator

from pyggml.backends.base import Finding
from pyggml.backends.cuda.backend import CudaBackend, device
from pyggml.backends.cuda.table import kernel

__all__ = ["CudaBackend", "device", "findings", "kernel"]


def findings() -> Iterator[Finding]:
    """What the backend finds on this machine, for `pyggml doctor`."""
    from pyggml.backends.cuda import doctor  # it imports what a plan does not need

    return doctor.findings()

"""The CUDA backend: its own kernels, compiled by NVRTC for the GPU present, and cuBLAS.

Planning for a GPU needs no GPU, pycuda or CuPy; `bind` needs all three. `pyggml doctor` lists what
is missing.
"""

from __future__ import annotations

from collections.abc import Iterator

from pyggml.backends.base import Finding
from pyggml.backends.cuda.backend import CudaBackend, device
from pyggml.backends.cuda.table import kernel

__all__ = ["CudaBackend", "device", "findings", "kernel", "present"]


def present() -> bool:
    """Whether this machine has a GPU and the packages that `bind` needs."""
    from pyggml.backends.cuda import doctor

    return doctor.present()


def findings() -> Iterator[Finding]:
    """The status of everything the backend needs on this machine, for `pyggml doctor`."""
    from pyggml.backends.cuda import doctor  # imports packages that plans do not need

    return doctor.findings()

"""The CUDA backend: kernels of our own, compiled by NVRTC for the GPU at hand, and cuBLAS.

Planning for a GPU needs neither one nor pycuda and CuPy; `bind` does. `pyggml doctor` says what is
missing.
"""

from __future__ import annotations

from pyggml.backends.cuda.backend import CudaBackend, device
from pyggml.backends.cuda.table import kernel

__all__ = ["CudaBackend", "device", "kernel"]

"""Products by cuBLAS: CuPy's library and handle, called directly.

CuPy refuses its own cuBLAS calls while a stream is captured; cuBLAS itself does not, as long as it
works in memory that it was given.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial
from typing import Any
from weakref import ref

from pyggml.backends.cuda.device.driver import Context, guarded, imported
from pyggml.backends.cuda.device.install import extra
from pyggml.backends.cuda.device.memory import Buffer
from pyggml.backends.cuda.launch import WORKSPACE, Gemm
from pyggml.errors import DeviceError

#: cudaDataType_t.
_TYPES = {"f32": 0, "f16": 2, "bf16": 14}
_COMPUTE_32F = 68
#: cublasGemmAlgo_t: the library's choice; cublasMath_t: f32 products are not rounded to tf32.
_DEFAULT_ALGORITHM = -1
_DEFAULT_MATH = 0


@cache
def _library() -> Any:
    # It loads the library that CuPy was built for.
    ours = imported("cupy_backends.cuda.libs.cublas")
    with guarded("starting cuBLAS"):
        major = ours.getVersion(_handle()) // 10000
    for name in (f"libcublas.so.{major}", "libcublas.so.13", "libcublas.so.12"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise DeviceError(f"CuPy loaded no cuBLAS that can be found: {extra('cuda')}")


def _handle() -> int:
    """CuPy's handle of the current device and thread."""
    return int(imported("cupy").cuda.device.get_cublas_handle())


class Cublas:
    """A GPU's cuBLAS, and the one block of memory that it works in."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._workspace: ref[Buffer] | None = None

    def ready(self) -> Callable[[Gemm], None]:
        """What puts a product into the stream. It keeps the block, which all that are made while
        one is kept share, so it is asked for when a plan is bound."""
        _library()
        found = None if self._workspace is None else self._workspace()
        if found is None:
            found = Buffer(self.context, WORKSPACE)
            self._workspace = ref(found)
        return partial(self._start, found)

    def _start(self, held: Buffer, one: Gemm) -> None:
        library, handle = _library(), ctypes.c_void_p(_handle())
        _check(library.cublasSetStream_v2(handle, ctypes.c_void_p(self.context.stream.handle)))
        workspace, size = ctypes.c_void_p(held.ptr), ctypes.c_size_t(held.nbytes)
        _check(library.cublasSetWorkspace_v2(handle, workspace, size))
        _check(library.cublasSetMathMode(handle, _DEFAULT_MATH))
        operands: list[Any] = []
        for ptr, kind, leading, stride in zip(one.ptrs, one.types, one.leading, one.strides):
            operands += [
                ctypes.c_void_p(ptr),
                _TYPES[kind],
                leading,
                ctypes.c_longlong(stride),
            ]
        alpha, beta = ctypes.c_float(1), ctypes.c_float(0)
        _check(
            library.cublasGemmStridedBatchedEx(
                handle,
                int(one.transposed[0]),
                int(one.transposed[1]),
                one.m,
                one.n,
                one.k,
                ctypes.byref(alpha),
                *operands[:8],
                ctypes.byref(beta),
                *operands[8:],
                one.batch,
                _COMPUTE_32F,
                _DEFAULT_ALGORITHM,
            )
        )


def _check(status: int) -> None:
    if status:
        raise DeviceError(f"cuBLAS refused a product: cublasStatus_t {status}")

"""Products by cuBLAS, with CuPy's library and handle but called directly.

CuPy refuses its cuBLAS calls during stream capture; cuBLAS itself allows them if it has a
user-provided workspace.

cuBLAS's workspace is one block per device. Products run one after another in a queue, so all
plans share it. As scratch, its 32 MiB would be added to every arena and hide the score peak that
the attention budget bounds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial
from typing import Any
from weakref import ref

from pyggml.backends.cuda.device.context import Context
from pyggml.backends.cuda.device.driver import guarded, imported
from pyggml.backends.cuda.device.memory import Buffer
from pyggml.backends.cuda.launch import WORKSPACE, Gemm
from pyggml.errors import DeviceError
from pyggml.extras import install_command

#: cudaDataType_t.
_TYPES = {"f32": 0, "f16": 2, "bf16": 14}
_COMPUTE_32F = 68
#: cublasGemmAlgo_t: the library chooses; cublasMath_t: f32 operands are not rounded to tf32.
_DEFAULT_ALGORITHM = -1
_DEFAULT_MATH = 0


@cache
def _library() -> Any:
    # Importing it loads the library that CuPy was built for.
    bindings = imported("cupy_backends.cuda.libs.cublas")
    with guarded("starting cuBLAS"):
        major = bindings.getVersion(_handle()) // 10000
    for name in (f"libcublas.so.{major}", "libcublas.so.13", "libcublas.so.12"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    fix = install_command("cuda")
    raise DeviceError(f"cannot find the cuBLAS that CuPy loaded; install it: {fix}")


def _handle() -> int:
    """CuPy's handle of the current device and thread."""
    return int(imported("cupy").cuda.device.get_cublas_handle())


class Cublas:
    """A GPU's cuBLAS and its workspace."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._workspace: ref[Buffer] | None = None

    def ready(self) -> Callable[[Gemm], None]:
        """A function that queues a product. It keeps the workspace alive, which all such functions
        share; call this when a plan is bound, because it may allocate."""
        _library()
        workspace = None if self._workspace is None else self._workspace()
        if workspace is None:
            workspace = Buffer(self.context, WORKSPACE)
            self._workspace = ref(workspace)
        return partial(self._start, workspace)

    def _start(self, workspace: Buffer, gemm: Gemm) -> None:
        library, handle = _library(), ctypes.c_void_p(_handle())
        _check(library.cublasSetStream_v2(handle, ctypes.c_void_p(self.context.stream.handle)))
        ptr, size = ctypes.c_void_p(workspace.ptr), ctypes.c_size_t(workspace.nbytes)
        _check(library.cublasSetWorkspace_v2(handle, ptr, size))
        _check(library.cublasSetMathMode(handle, _DEFAULT_MATH))
        operands: list[Any] = []
        for address, name, leading, stride in zip(
            gemm.ptrs, gemm.types, gemm.leading, gemm.strides
        ):
            operands += [
                ctypes.c_void_p(address),
                _TYPES[name],
                leading,
                ctypes.c_longlong(stride),
            ]
        alpha, beta = ctypes.c_float(1), ctypes.c_float(0)
        _check(
            library.cublasGemmStridedBatchedEx(
                handle,
                int(gemm.transposed[0]),
                int(gemm.transposed[1]),
                gemm.m,
                gemm.n,
                gemm.k,
                ctypes.byref(alpha),
                *operands[:8],
                ctypes.byref(beta),
                *operands[8:],
                gemm.batch,
                _COMPUTE_32F,
                _DEFAULT_ALGORITHM,
            )
        )


def _check(status: int) -> None:
    if status:
        raise DeviceError(f"cuBLAS refused a product: cublasStatus_t {status}")

"""The kernel table of the CUDA backend.

A kernel is called as `fn(call)` when a step is bound, and records the step's launches (see
`launch.Call`). Addresses do not change afterwards, so every run replays the same records. The
launches fill `call.out`, which may be strided, and write nothing else except scratch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyggml.backends.cuda.weights.formats import FORMATS
from pyggml.backends.table import Kernel, KernelTable
from pyggml.node import Node

#: Bytes; every tensor and every block of scratch starts at a multiple of it.
ALIGNMENT = 256

#: An estimate: a CUDA context, cuBLAS, kernels and recorded graphs. It depends on the GPU and the
#: driver; one H100 with driver 580.159 used 750 MiB for a small model and 870 MiB for V2-Lite.
DRIVER_BYTES = 896 << 20

#: The types that most kernels accept: floats and integers, no block types.
PLAIN = frozenset({"f32", "f16", "bf16", "i32", "i64"})


def _no_cublas(node: Node) -> bool:
    return False


def _unread_blocks(node: Node) -> str | None:
    """Why the kernels cannot run the node: a block type that only the host can decode."""
    for tensor in (node, *node.src):
        if tensor is not None and tensor.dtype.block > 1 and tensor.dtype.name not in FORMATS:
            return f"no kernel for blocks of {tensor.dtype}"
    return None


@dataclass(frozen=True, slots=True)
class CudaKernel(Kernel):
    """A row of the table; `cublas` returns whether the kernel calls `gemm` for a node."""

    cublas: Callable[[Node], bool] = _no_cublas


KERNELS = KernelTable(CudaKernel, PLAIN, refuses=_unread_blocks)
kernel = KERNELS.kernel

"""Activations for products on the tensor cores: f16 or bf16, scaled by row (linear_prepare.cu)."""

from __future__ import annotations

import numpy as np

from pyggml.backends.cuda.geometry import C_TYPES, threads_for
from pyggml.backends.cuda.launch import Call, Operand
from pyggml.backends.cuda.linear.common import PREPARE, aligned, rows_in
from pyggml.dtypes import DType
from pyggml.spec import Ne

#: Values of k that a tile takes per step.
DEPTH = 64
#: Precision class by the C++ type that holds a decoded weight.
CLASS = {"__half": "f16", "__nv_bfloat16": "bf16"}


def half_of(dtype: DType) -> str:
    """The C++ type that holds a decoded weight on the tensor cores."""
    return "__nv_bfloat16" if dtype.name in ("mxfp4", "bf16") else "__half"


def padded(k: int) -> int:
    return -(-k // DEPTH) * DEPTH


def to_halves(call: Call, b: Operand, half: str) -> tuple[np.uint64, np.uint64]:
    """The addresses of b's scaled rows and of their scales, for `tile`: call["halves"] if an
    earlier step prepared them."""
    halves = call.get("halves")
    if halves is None:
        ptr = call.scratch(tile_scratch(b.ne))
        launch_halves(call, b, ptr, half)
    else:
        ptr = halves.ptr
    return np.uint64(ptr), np.uint64(ptr + _scales_at(b.ne))


def launch_halves(call: Call, b: Operand, ptr: int, half: str) -> None:
    """Record the conversion of b for `tile`: its rows, then their scales."""
    adjacent = b.nb[0] == b.dtype.nbytes and b.aligned(16)
    call.launch(
        PREPARE,
        f"to_halves<{C_TYPES[b.dtype.name]}, {half}, {str(adjacent).lower()}>",
        grid=rows_in(b.ne),
        block=threads_for(padded(b.ne[0]) // 16),
        args=[
            b.tensor,
            np.uint64(ptr),
            np.uint64(ptr + _scales_at(b.ne)),
            np.int32(padded(b.ne[0])),
        ],
    )


def _scales_at(b: Ne) -> int:
    return aligned(rows_in(b) * padded(b[0]) * 2)


def tile_scratch(b: Ne) -> int:
    return _scales_at(b) + aligned(rows_in(b) * 4)

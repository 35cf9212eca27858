"""Activations for products on the tensor cores: f16 or bf16, scaled by row (linear_prepare.cu)."""

from __future__ import annotations

import ctypes

import numpy as np

from pyggml.backends.cuda.argument import Struct
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


class Places(Struct):
    """The struct `Places` of linear_prepare.cu."""

    _fields_ = (
        ("places", ctypes.c_uint64),
        ("are_long", ctypes.c_uint64),
        ("n_used", ctypes.c_int32),
        ("n_b", ctypes.c_int32),
    )


IN_PLACE = Places(places=0, are_long=0, n_used=1, n_b=1)


def to_halves(call: Call, b: Operand, half: str) -> tuple[np.uint64, np.uint64]:
    """The addresses of b's scaled rows and of their scales, for `tile`: call["halves"] if an
    earlier step prepared them."""
    halves = call.get("halves")
    if halves is None:
        return launch_halves(call, b, call.scratch(tile_scratch(b.ne)), half)
    return rows_and_scales(b.ne, halves.ptr)


def rows_and_scales(b: Ne, ptr: int) -> tuple[np.uint64, np.uint64]:
    """The addresses of the scaled rows of b, and of their scales."""
    return np.uint64(ptr), np.uint64(ptr + _scales_at(b))


def launch_halves(
    call: Call, b: Operand, ptr: int, half: str, places: Places = IN_PLACE, rows: int = 0
) -> tuple[np.uint64, np.uint64]:
    """Record the conversion of b: its rows, or `rows` in `places`, then their scales. Returns the
    addresses of both."""
    adjacent = b.nb[0] == b.dtype.nbytes and b.aligned(16)
    k = padded(b.ne[0])
    written = rows_and_scales((k, rows or rows_in(b.ne), 1, 1), ptr)
    call.launch(
        PREPARE,
        f"to_halves<{C_TYPES[b.dtype.name]}, {half}, {str(adjacent).lower()}>",
        grid=rows_in(b.ne),
        block=threads_for(k // 16),
        args=[b.tensor, *written, np.int32(k), places],
    )
    return written


def _scales_at(b: Ne) -> int:
    return aligned(rows_in(b) * padded(b[0]) * 2)


def tile_scratch(b: Ne) -> int:
    return _scales_at(b) + aligned(rows_in(b) * 4)

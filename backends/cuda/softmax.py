"""Softmax of rows."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

from pyggml import ops
from pyggml.backends.cuda.argument import Struct
from pyggml.backends.cuda.geometry import C_TYPES, threads_for
from pyggml.backends.cuda.launch import ABSENT, Call, Operand
from pyggml.backends.cuda.table import kernel
from pyggml.dtypes import I32

#: Scores of a thread in a round: EACH in softmax.cu.
EACH = 32
#: A window that hides nothing.
NO_WINDOW = 2**31 - 1


class Softmax(Struct):
    """The struct `Softmax` of softmax.cu: addresses, byte strides, sizes; an absent tensor is 0."""

    _fields_ = (
        ("a", ctypes.c_uint64),
        ("mask", ctypes.c_uint64),
        ("sinks", ctypes.c_uint64),
        ("y", ctypes.c_uint64),
        ("nb_a", ctypes.c_int64 * 4),
        ("nb_mask", ctypes.c_int64 * 4),
        ("nb_y", ctypes.c_int64 * 3),
        ("nb_sinks", ctypes.c_int64),
        ("n", ctypes.c_int32),
        ("mask_heads", ctypes.c_int32),
        ("mask_batch", ctypes.c_int32),
        ("head0", ctypes.c_int32),
        ("n_head", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("max_bias", ctypes.c_float),
    )


@kernel(ops.soft_max_ext, types=frozenset({"f32", "f16"}), inplace=("a",))
def soft_max_ext(call: Call) -> None:
    launch_softmax(call, call["a"], call.out, call.get("mask"), call.get("sinks"), call.attrs)


def launch_softmax(
    call: Call,
    a: Operand,
    y: Operand,
    mask: Operand | None,
    sinks: Operand | None,
    attrs: Mapping[str, Any],
    window: int | None = None,
) -> None:
    """Record y = softmax of a's rows, with the attributes of soft_max_ext. y may be f16 or bf16,
    and may overwrite a if its rows begin where those of a do.

    mask  if it is i32 [n_q], the positions of a causal mask with this window
    """
    n, n_rows, heads, n3 = a.ne
    bias, logits = mask or ABSENT, sinks or ABSENT
    causal = bias.dtype is I32
    if causal:  # a number for each row
        bias = Operand(bias.ptr, (1, bias.ne[0], 1, 1), (0, bias.nb[0], 0, 0), I32)
    whole = n % 4 == 0 and all(_whole(x) for x in (a, y, *((mask,) if mask and not causal else ())))
    argument = Softmax(
        a=a.ptr,
        mask=bias.ptr,
        sinks=logits.ptr,
        y=y.ptr,
        nb_a=a.nb,
        nb_mask=bias.nb,
        nb_y=y.nb[1:],
        nb_sinks=logits.nb[0],
        n=n,
        mask_heads=bias.ne[2],
        mask_batch=bias.ne[3],
        head0=attrs["head0"],
        n_head=attrs["n_head"],
        window=NO_WINDOW if window is None else min(window, NO_WINDOW),
        scale=attrs["scale"],
        max_bias=0.0 if mask is None else attrs["max_bias"],
    )
    call.launch(
        "softmax.cu",
        f"softmax<{C_TYPES[bias.dtype.name]}, {C_TYPES[y.dtype.name]}, {4 if whole else 1}>",
        grid=(n_rows, heads, n3),
        block=threads_for(-(-n // EACH)),
        args=[argument],
    )


def _whole(x: Operand) -> bool:
    """Whether the rows of `x` are contiguous and start at a multiple of four elements."""
    return x.nb[0] == x.dtype.nbytes and x.aligned(4 * x.nb[0])

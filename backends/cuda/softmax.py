"""soft_max_ext."""

from __future__ import annotations

import ctypes

from pyggml import ops
from pyggml.backends.cuda.launch import ABSENT, Call, Operand, Struct
from pyggml.backends.cuda.table import kernel


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
        ("scale", ctypes.c_float),
        ("max_bias", ctypes.c_float),
    )


def _whole(x: Operand | None, size: int) -> bool:
    """Whether rows of `x` are runs of elements that begin at whole groups of four."""
    return x is None or (x.nb[0] == size and x.aligned(4 * size))


@kernel(ops.soft_max_ext, types=frozenset({"f32", "f16"}), inplace=("a",))
def soft_max_ext(call: Call) -> None:
    a, mask, out, attrs = call["a"], call.get("mask"), call.out, call.attrs
    n, rows, heads, n3 = a.ne
    size = 4 if mask is None else mask.dtype.nbytes
    wide = n % 4 == 0 and _whole(a, 4) and _whole(out, 4) and _whole(mask, size)
    bias, sinks = mask or ABSENT, call.get("sinks") or ABSENT
    argument = Softmax(
        a=a.ptr,
        mask=bias.ptr,
        sinks=sinks.ptr,
        y=out.ptr,
        nb_a=a.nb,
        nb_mask=bias.nb,
        nb_y=out.nb[1:],
        nb_sinks=sinks.nb[0],
        n=n,
        mask_heads=bias.ne[2],
        mask_batch=bias.ne[3],
        head0=attrs["head0"],
        n_head=attrs["n_head"],
        scale=attrs["scale"],
        max_bias=0.0 if mask is None else attrs["max_bias"],
    )
    kind = "__half" if mask is not None and mask.dtype.name == "f16" else "float"
    call.launch(
        "softmax.cu",
        f"softmax<{kind}, {4 if wide else 1}>",
        grid=(rows, heads, n3),
        block=256,
        args=[argument],
    )

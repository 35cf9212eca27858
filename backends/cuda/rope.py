"""Rotary position embedding."""

from __future__ import annotations

import ctypes
import math
from functools import partial

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.argument import Struct
from pyggml.backends.cuda.fusion import Fused, Run
from pyggml.backends.cuda.geometry import C_TYPES, blocks_for
from pyggml.backends.cuda.launch import ABSENT, Call, Operand
from pyggml.backends.cuda.table import kernel
from pyggml.dtypes import BF16, F16, F32, I32
from pyggml.node import Attrs, Node

#: Tokens from which a block takes several.
MANY = 128


@kernel(ops.rope_ext, inplace=("a",))
def rope_ext(call: Call) -> None:
    out, a, pos, factors = call.out, call["a"], call["pos"], call.get("freq_factors")
    neox = "true" if call.attrs["mode"] == "neox" else "false"
    in_place = out.ptr == a.ptr and out.nb == a.nb
    if in_place and out.ne[2] >= MANY and _in_words(out, call.attrs):
        pairs = call.attrs["n_dims"] // 2
        tokens = max(1, min(256 // pairs, blocks_for(out.ne[2], 2 * call.device.sms)))
        call.launch(
            "rope.cu",
            f"rope_tokens<{C_TYPES[out.dtype.name]}, {neox}>",
            grid=(blocks_for(out.ne[2], tokens), out.ne[3]),
            block=256,
            args=[
                out.tensor,
                pos.tensor,
                (factors or ABSENT).tensor,
                constants(call.attrs),
                np.int32(tokens),
            ],
            shared=8 * tokens * pairs,
        )
        return
    units = call.attrs["n_dims"] // 2 if in_place else -(-out.ne[0] // 2)
    call.launch(
        "rope.cu",
        f"rope<{C_TYPES[out.dtype.name]}, {neox}>",
        grid=(out.ne[2], blocks_for(units * out.ne[1]), out.ne[3]),
        block=256,
        args=[
            out.tensor,
            a.tensor,
            pos.tensor,
            (factors or ABSENT).tensor,
            constants(call.attrs),
            np.int32(units),
        ],
    )


def _in_words(out: Operand, attrs: Attrs) -> bool:
    """Whether what is rotated can be read in words of four elements."""
    size = out.dtype.nbytes
    whole = attrs["n_dims"] % 8 == 0 and attrs["offset"] % 4 == 0
    return whole and out.nb[0] == size and out.aligned(4 * size)


def rope_into_rows(node: Node, run: Run) -> Fused | None:
    """set_rows(cache, reshape(rope_ext(a, pos)), ids): stores the rotated heads of a token as a
    row."""
    cache, row, ids = node["a"], node["b"], node["ids"]
    rotated = row["a"] if row.op is ops.reshape else row
    if rotated.op is not ops.rope_ext or not run.only(rotated, node):
        return None
    a = rotated["a"]
    whole = row.ne == (a.ne[0] * a.ne[1], a.ne[2], 1, 1) and a.ne[3] == 1
    types = rotated.dtype is F32 and cache.dtype in (F16, BF16) and ids.dtype is I32
    if not whole or not types or cache.ne[2:] != (1, 1) or rotated.get("freq_factors"):
        return None
    reads = {"cache": cache, "a": a, "pos": rotated["pos"], "ids": ids}
    return Fused((rotated, node), reads, partial(rope_into_row, rope=rotated.attrs))


def rope_into_row(call: Call, rope: Attrs) -> None:
    a = call["a"]
    neox = "true" if rope["mode"] == "neox" else "false"
    call.launch(
        "rope.cu",
        f"rope_rows<{C_TYPES[call.out.dtype.name]}, {neox}>",
        grid=(a.ne[2], blocks_for(-(-a.ne[0] // 2) * a.ne[1])),
        block=256,
        args=[
            *(x.tensor for x in (call.out, a, call["pos"], call["ids"])),
            constants(rope),
        ],
    )


class Rope(Struct):
    """The struct `Rope` of rope.cuh."""

    _fields_ = (
        ("step", ctypes.c_double),
        ("freq_scale", ctypes.c_double),
        ("ext_factor", ctypes.c_double),
        ("low", ctypes.c_double),
        ("width", ctypes.c_double),
        ("magnitude", ctypes.c_float),
        ("n_dims", ctypes.c_int32),
        ("offset", ctypes.c_int32),
    )


def constants(attrs: Attrs) -> Rope:
    """The constants in the formula of `rope_ext`, which depend only on its attributes.

    The kernels multiply an angle by f + (1 - f) e k, with f = freq_scale, e = ext_factor and the
    ramp k. For `back` that must be -f - (1 - f) e k, which -f and e (f - 1) / (f + 1) give.
    """
    n_dims, base = attrs["n_dims"], attrs["freq_base"]
    magnitude, low, width = attrs["attn_factor"], 0.0, 1.0
    scale, ext_factor = attrs["freq_scale"], attrs["ext_factor"]
    if attrs["ext_factor"]:
        magnitude *= 1 + 0.1 * math.log(1 / attrs["freq_scale"])

        def pair(beta: float) -> float:
            turns: float = attrs["n_ctx_orig"] / (2 * math.pi * beta)
            return float(n_dims * math.log(turns) / (2 * math.log(base)))

        low = max(0, math.floor(pair(attrs["beta_fast"])))
        high = min(n_dims - 1, math.ceil(pair(attrs["beta_slow"])))
        width = max(0.001, high - low)
    if attrs["back"]:
        scale, ext_factor = -scale, ext_factor * (scale - 1) / (scale + 1)
    return Rope(
        step=base ** (-2 / n_dims),
        freq_scale=scale,
        ext_factor=ext_factor,
        low=low,
        width=width,
        magnitude=magnitude,
        n_dims=n_dims,
        offset=attrs["offset"],
    )

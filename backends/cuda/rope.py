"""Rotary position embedding."""

from __future__ import annotations

import math
import struct
from functools import partial

from pyggml import ops
from pyggml.backends.cuda.fusion import Fused, Run, fuses
from pyggml.backends.cuda.geometry import C_TYPES, blocks_for
from pyggml.backends.cuda.launch import ABSENT, Call, Value
from pyggml.backends.cuda.table import kernel
from pyggml.dtypes import BF16, F16, F32, I32
from pyggml.node import Attrs, Node


@kernel(ops.rope_ext, inplace=("a",))
def rope_ext(call: Call) -> None:
    out, a, pos = call.out, call.operand(0), call.operand(1)
    factors = call.src[2]
    neox = "true" if call.attrs["mode"] == "neox" else "false"
    call.launch(
        "rope.cu",
        f"rope<{C_TYPES[out.dtype.name]}, {neox}>",
        grid=(out.ne[2], blocks_for(-(-out.ne[0] // 2) * out.ne[1]), out.ne[3]),
        block=256,
        args=[
            out.tensor,
            a.tensor,
            pos.tensor,
            (factors or ABSENT).tensor,
            constants(call.attrs),
        ],
    )


@fuses(ops.set_rows)
def rope_into_rows(node: Node, run: Run) -> Fused | None:
    """set_rows(cache, reshape(rope_ext(a, pos)), ids): the heads of a token, turned, as a row."""
    cache, row, ids = node.src
    assert cache is not None and row is not None and ids is not None
    turned = row.src[0] if row.op is ops.reshape else row
    if turned is None or turned.op is not ops.rope_ext or not run.only(turned, node):
        return None
    a, pos, factors = turned.src
    assert a is not None and pos is not None
    whole = row.ne == (a.ne[0] * a.ne[1], a.ne[2], 1, 1) and a.ne[3] == 1
    types = turned.dtype is F32 and cache.dtype in (F16, BF16) and ids.dtype is I32
    if not whole or not types or cache.ne[2:] != (1, 1) or factors is not None:
        return None
    record = partial(_rope_into_rows, turn=turned)
    return Fused((turned, node), (cache, a, pos, ids), record)


def _rope_into_rows(call: Call, turn: Node) -> None:
    _, a, pos, ids = (call.operand(i) for i in range(4))
    neox = "true" if turn.attrs["mode"] == "neox" else "false"
    call.launch(
        "rope.cu",
        f"rope_rows<{C_TYPES[call.out.dtype.name]}, {neox}>",
        grid=(a.ne[2], blocks_for(-(-a.ne[0] // 2) * a.ne[1])),
        block=256,
        args=[*(x.tensor for x in (call.out, a, pos, ids)), constants(turn.attrs)],
    )


def constants(attrs: Attrs) -> Value:
    """The struct `Rope` of rope.cu: what the formula of `rope_ext` takes from attributes alone."""
    n_dims, base = attrs["n_dims"], attrs["freq_base"]
    magnitude, low, width = attrs["attn_factor"], 0.0, 1.0
    if attrs["ext_factor"]:
        magnitude *= 1 + 0.1 * math.log(1 / attrs["freq_scale"])

        def pair(beta: float) -> float:
            turns: float = attrs["n_ctx_orig"] / (2 * math.pi * beta)
            return float(n_dims * math.log(turns) / (2 * math.log(base)))

        low = max(0, math.floor(pair(attrs["beta_fast"])))
        high = min(n_dims - 1, math.ceil(pair(attrs["beta_slow"])))
        width = max(0.001, high - low)
    doubles = (base ** (-2 / n_dims), attrs["freq_scale"], attrs["ext_factor"], low, width)
    return Value(struct.pack("<5dfii4x", *doubles, magnitude, n_dims, attrs["offset"]))

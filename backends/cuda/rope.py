"""Rotary position embedding."""

from __future__ import annotations

import math
import struct

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.geometry import C_TYPES, blocks
from pyggml.backends.cuda.launch import Call, Value
from pyggml.backends.cuda.table import kernel
from pyggml.graph import Attrs


@kernel(ops.rope_ext, inplace=(0,))
def rope_ext(call: Call) -> None:
    out, a, pos = call.out, call.operand(0), call.operand(1)
    factors = call.src[2]
    neox = "true" if call.attrs["mode"] == "neox" else "false"
    call.launch(
        "rope.cu",
        f"rope<{C_TYPES[out.dtype.name]}, {neox}>",
        grid=(out.ne[2], blocks(-(-out.ne[0] // 2) * out.ne[1]), out.ne[3]),
        block=256,
        args=[
            out.tensor,
            a.tensor,
            pos.tensor,
            np.uint64(0 if factors is None else factors.ptr),
            constants(call.attrs),
        ],
    )


def constants(attrs: Attrs) -> Value:
    """The struct `Rope` of rope.cu: what the formula of `rope_ext` takes from attributes alone."""
    n_dims, base = attrs["n_dims"], attrs["freq_base"]
    step = np.float32(base) ** np.float32(-2 / n_dims)
    magnitude, low, width = attrs["attn_factor"], 0.0, 1.0
    if attrs["ext_factor"]:
        magnitude *= 1 + 0.1 * math.log(1 / attrs["freq_scale"])

        def pair(beta: float) -> float:
            turns: float = attrs["n_ctx_orig"] / (2 * math.pi * beta)
            return float(n_dims * math.log(turns) / (2 * math.log(base)))

        low = max(0, math.floor(pair(attrs["beta_fast"])))
        high = min(n_dims - 1, math.ceil(pair(attrs["beta_slow"])))
        width = max(0.001, high - low)
    numbers = (step, attrs["freq_scale"], magnitude, attrs["ext_factor"], low, width)
    return Value(struct.pack("<2i6f", n_dims, attrs["offset"], *numbers), align=4)

"""Hyper-connections: several residual streams, mixed before and after a sublayer."""

from __future__ import annotations

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.geometry import blocks_for, pack_width
from pyggml.backends.cuda.launch import ABSENT, Call
from pyggml.backends.cuda.table import kernel
from pyggml.node import Node

FILE = "hyper_connections.cu"
#: The most streams whose matrix a warp holds, and whose numbers a thread holds.
IN_WARP, IN_THREAD = 32, 8


def _too_many(node: Node) -> str | None:
    if node.ne[0] <= IN_WARP:
        return None
    return f"{node.ne[0]} residual streams are more than {IN_WARP}"


@kernel(ops.dsv4_hc_comb, refuses=_too_many)
@kernel(ops.dsv4_hc_maps, refuses=_too_many)
def dsv4_hc_comb(call: Call) -> None:
    out = call.out
    hc, tokens = out.ne[0], out.ne[2]
    lanes = 1 << (hc - 1).bit_length()
    call.launch(
        FILE,
        f"dsv4_hc_comb<{hc}, {str(call.node.op is ops.dsv4_hc_maps).lower()}>",
        grid=blocks_for(tokens, 256 // lanes),
        block=256,
        args=[
            *(x.tensor for x in (out, call["mixes"], call["scale"], call["base"])),
            np.float32(call.attrs["eps"]),
            np.int32(call.attrs["n_iter"]),
        ],
    )


@kernel(ops.dsv4_hc_post)
def dsv4_hc_post(call: Call) -> None:
    out, x, residual = call.out, call["x"], call["residual"]
    width, hc = pack_width(out, x, residual), out.ne[1]
    others = (call["post"], call.get("comb") or ABSENT)
    call.launch(
        FILE,
        f"dsv4_hc_post<{hc if hc <= IN_THREAD else 0}, {width}>",
        grid=(out.ne[2], blocks_for(out.ne[0] // width)),
        block=256,
        args=[operand.tensor for operand in (out, x, residual, *others)],
    )

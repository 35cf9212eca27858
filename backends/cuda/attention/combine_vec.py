"""Latent attention of a few queries and the product of each head with attn_v_b, as one step: the
launch that adds up the splits of the keys also multiplies."""

from __future__ import annotations

import ctypes
from functools import partial

from pyggml import ops
from pyggml.backends.cuda.argument import Struct
from pyggml.backends.cuda.attention.arguments import Attention
from pyggml.backends.cuda.attention.flash import Recording, causal_attention
from pyggml.backends.cuda.attention.routes import Shape
from pyggml.backends.cuda.fusion import Fused, Run
from pyggml.backends.cuda.geometry import blocks_for
from pyggml.backends.cuda.launch import Call, Operand
from pyggml.backends.cuda.linear.blocks import (
    cpp_format,
    group_bytes,
    launch_quantize,
    weights_of,
)
from pyggml.backends.cuda.linear.common import FEW, aligned, in_blocks
from pyggml.backends.cuda.linear.routes import Product
from pyggml.dtypes import F32
from pyggml.node import Node
from pyggml.ops.leaf import constant_op

FILE = "combine_vec.cu"
#: Columns of a row of sums; the rows of a head's matrix are whole groups, and at most so many.
COLUMNS, MOST = 512, 256
WARPS = 8
#: The most splits that 4 blocks of a row add up, and the most rows that 8 blocks each take in one
#: wave of a GPU.
SPLITS, ROWS = 72, 64
#: The most splits of list_token that it adds up.
LISTED = 40


class Values(Struct):
    """The struct `Values` of combine_vec.cu."""

    _fields_ = (
        ("y", ctypes.c_uint64),
        ("query", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("fixed", ctypes.c_uint64),
        ("query_groups", ctypes.c_int32),
        ("head_groups", ctypes.c_int32),
    )


def multiplied_attention(node: Node, run: Run) -> Fused | None:
    """mul_mat(w, flash_attn_ext(..)), head by head; also behind it a copy with the heads of each
    query side by side."""
    product = node if node.op is ops.mul_mat else node["a"].base
    if product.op is not ops.mul_mat or product not in run.number:
        return None
    w, b = product["a"], product["b"]
    flash = b.base
    if flash.op is not ops.flash_attn_ext or flash not in run.number:
        return None
    n_queries, heads = flash.ne[2], flash.ne[1]
    fits = (
        flash.ne == (COLUMNS, heads, n_queries, 1)
        and n_queries <= FEW
        and w.ne == (COLUMNS, w.ne[1], heads, 1)
        and w.ne[1] % 32 == 0
        and w.ne[1] <= MOST
        and in_blocks(w.dtype)
        and w.root.op is constant_op
        and product.dtype is F32
        and product.attrs["prec"] != "f32"
        and not flash.attrs["lse"]
        and flash.attrs["max_bias"] == 0  # a loop may shift head0, which only slopes need
        and _is_swapped(b, flash)
        and (node is product or _is_swapped(node["a"], product))
        and run.only(flash, product)
        and (node is product or run.only(product, node))
    )
    shape = Shape.of(flash)
    if not fits or "latent" not in shape.routes or shape.splits(shape.routes[0]) == 1:
        return None
    causal = causal_attention(flash, run)
    if causal is None:
        nodes: tuple[Node, ...] = (flash,)
        reads = {name: s for name in flash.op.operands if (s := flash.get(name)) is not None}
        record = partial(_record, product=product, window=None, stride=1)
    else:
        nodes, reads, mask = causal.nodes, dict(causal.operands), flash["mask"].attrs
        record = partial(_record, product=product, window=mask["window"], stride=mask["stride"])
    return Fused(
        (*nodes, product) if node is product else (*nodes, product, node),
        {**reads, "w": w},
        record,
        scratch=aligned(flash.spec.nbytes) + _rest(product),
        fixed=True,
        recompute=() if causal is None else causal.recompute,
    )


def _is_swapped(view: Node, whole: Node) -> bool:
    """Whether the view is all of `whole`, with dimensions 1 and 2 exchanged."""
    n, n1, n2, n3 = whole.ne
    steps = whole.nb[0], whole.nb[2], whole.nb[1], whole.nb[3]
    offset, node = 0, view
    while node is not whole:
        if node.op.view is None:
            return False
        offset, node = offset + node.offset, node.src[0] or whole
    same = all(size == 1 or x == y for size, x, y in zip(view.ne, view.nb, steps))
    return view.ne == (n, n2, n1, n3) and same and offset == 0


def _rest(product: Node) -> int:
    """Bytes of scratch besides the attention's result, enough for the two as steps of their own."""
    return Shape.of(product["b"].base).scratch() + Product.of(product).scratch


def _record(call: Call, product: Node, window: int | None, stride: int) -> None:
    flash = product["b"].base
    sums = aligned(flash.spec.nbytes)
    rest = _rest(product)
    at = call.scratch(sums + rest)
    whole = Operand(at, flash.ne, flash.nb, F32)
    names = (*flash.op.operands, "pos")
    operands = {name: x for name in names if (x := call.get(name)) is not None}
    attention = Call(flash, whole, operands, flash.attrs, call.device, (at + sums, rest))
    attention.names_only, attention.awaited = call.names_only, call.awaited - {"w"}
    attention.records = call.records
    recording = Recording(attention, window, stride)
    splits = recording.shape.splits(recording.route)
    w, together = call["w"], recording.route != "any" and splits > 1
    if together and call.device.overlaps and w.layout == "tiles8":
        launch(call, product, recording.record_parts(), listed=recording.route == "list_token")
        return
    recording.record()
    b = Operand(at, product["b"].ne, product["b"].nb, F32)
    out = call.out
    if call.node is not product:  # the copy's rows, in the order of the product
        nb = out.nb[0], out.nb[2], out.nb[1], out.nb[3]
        out = Operand(out.ptr, product.ne, nb, F32)
    alone = Call(product, out, {"a": w, "b": b}, product.attrs, call.device, (at + sums, rest))
    alone.records = call.records
    Product.of(product).launches(alone, (w,), out)
    fixed = call.get("fixed")
    if fixed is not None:
        launch_quantize(call, call.out, fixed.pointer, 2)


def launch(call: Call, product: Node, sums: Attention, listed: bool = False) -> None:
    """Record the sum of the splits and the product. `listed`: the parts are those of list_token."""
    w, out, fixed = call["w"], call.out, call.get("fixed")
    n, heads, queries = w.ne[1], sums.heads, sums.n_q
    blocks = 8 if sums.splits > SPLITS or queries * heads <= ROWS else 4
    assert not listed or (blocks == 4 and sums.splits <= LISTED), "parts of list_token"
    tiles = blocks // 4  # of 8 rows that a warp has in a round
    rounds = next(i for i in (1, 2, 4) if i * 8 * WARPS * tiles >= n and i * tiles > 1)
    units = blocks_for(rounds * WARPS * tiles, 4 * blocks)
    if call.node is product:  # [n, queries, heads]
        steps, groups = (out.nb[1], out.nb[2]), (n // 32, n // 32 * queries)
    else:  # [n, heads, queries]
        steps, groups = (out.nb[2], out.nb[1]), (n // 32 * heads, n // 32)
    call.launch(
        FILE,
        f"combine_vec<tiles::{cpp_format(w)}, {blocks}, {rounds}{', true' if listed else ''}>",
        grid=(blocks, heads, queries),
        block=32 * WARPS,
        args=[
            weights_of(w),
            sums,
            Values(
                y=out.ptr,
                query=steps[0],
                head=steps[1],
                fixed=0 if fixed is None else fixed.ptr,
                query_groups=groups[0],
                head_groups=groups[1],
            ),
        ],
        shared=(4 * WARPS * COLUMNS + COLUMNS // 32 * group_bytes(2)) // blocks
        + 128 * units * blocks
        + 8,
    )

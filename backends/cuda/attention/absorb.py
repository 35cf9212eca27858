"""Queries for latent attention to one token, or to a few: products, rotation, concat, and beside
them the rows of the cache, as one step."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pyggml import ops
from pyggml.backends.cuda.argument import Struct
from pyggml.backends.cuda.attention.latent_row import NO_ROW, RecordRow, row_bytes
from pyggml.backends.cuda.fusion import CudaStep, Fused, Run, paired
from pyggml.backends.cuda.geometry import ROWS, blocks_for
from pyggml.backends.cuda.launch import Call
from pyggml.backends.cuda.linear.blocks import cpp_format, fixed_bytes, weights_of
from pyggml.backends.cuda.linear.common import FEW, in_blocks
from pyggml.backends.cuda.rope import Rope, constants
from pyggml.dtypes import F32
from pyggml.node import Attrs, Node
from pyggml.ops.leaf import constant_op

FILE = "absorb.cu"
#: Rows of a block: a tile of 8 for each of its 8 warps.
BLOCK = 64
#: Elements of a row of the matrix that a warp has in a round; there are up to two rounds.
ROUND = 128
#: The most elements of a head that are rotated: a pair for each lane of a warp.
MOST_TURNED = 64
#: The most elements of a row's c.
MOST_C = 1024
#: The C++ types of cache rows; `q8_0` alone is a type of weights in that kernel.
_ROW_TYPES = {**ROWS, "q8_0": "file::q8_0"}


class Absorb(Struct):
    """The struct `Absorb` of absorb.cu."""

    _fields_ = (
        ("q", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("q_step", "out_step", "q_next", "out_next")),
        ("pos", ctypes.c_uint64),
        ("rope", Rope),
        *((name, ctypes.c_int32) for name in ("n_nope", "n_c", "n_rot", "parts", "tokens")),
    )


def absorbed(node: Node, run: Run) -> Fused | None:
    """concat(w q_nope, q_rope): queries of a few tokens, of which the last part is rotated."""
    if node.attrs["dim"] != 0 or node["a"].op is not ops.mul_mat:
        return None
    product, rotated = node["a"], node["b"].base
    w, nope = product["a"], product["b"]
    if rotated.op is not ops.rope_ext or nope.base is not rotated or rotated.dtype is not F32:
        return None
    if not run.only(product, node) or not run.only(rotated, product, node):
        return None
    attrs, (n, heads, n_tokens, n3) = rotated.attrs, rotated.ne
    n_nope, n_rot = attrs["offset"], attrs["n_dims"]
    fits = (
        n_tokens <= FEW
        and n3 == 1
        and n == n_nope + n_rot
        and n_rot <= MOST_TURNED
        and n_nope <= 2 * ROUND
        and w.ne == (n_nope, product.ne[0], heads, 1)
        and _is_part(nope, rotated, 0, n_nope)
        and _is_part(node["b"], rotated, n_nope, n_rot)
        and node.dtype is product.dtype is F32
        and product.attrs["prec"] != "f32"
        and in_blocks(w.dtype)
        and w.root.op is constant_op
        and rotated.get("freq_factors") is None
        and rotated["a"].nb[0] == 4
    )
    if not fits:
        return None
    reads = {"w": w, "q": rotated["a"], "pos": rotated["pos"]}
    return Fused((rotated, product, node), reads, RecordAbsorb(attrs))


def _is_part(view: Node, rotated: Node, start: int, n: int) -> bool:
    """Whether the view is elements start .. start + n of each head, token by token."""
    offset, node = 0, view
    while node is not rotated:
        offset, node = offset + node.offset, node.src[0] or rotated
    _, heads, n_tokens, _ = rotated.ne
    return (
        offset == 4 * start
        and view.ne == (n, n_tokens, heads, 1)
        and view.nb[0] == 4
        and (n_tokens == 1 or view.nb[1] == rotated.nb[2])
        and view.nb[2] == rotated.nb[1]
    )


@dataclass(frozen=True)
class RecordAbsorb:
    """Records the launch; row: that of the cache's rows, which the same launch writes."""

    rope: Attrs
    row: RecordRow | None = None

    def __call__(self, call: Call) -> None:
        w, q, out = call["w"], call["q"], call.get("queries") or call.out
        parts, heads, tokens = blocks_for(w.ne[1], BLOCK), w.ne[2], out.ne[1]
        shared, row, row_type = fixed_bytes((w.ne[0], tokens, 1, 1), 2), NO_ROW, "void"
        if self.row is not None:
            cache, c, k = call.out, call["c"], call["k"]
            shared, row_type = max(shared, row_bytes(c, k)), _ROW_TYPES[cache.dtype.name]
            row = self.row.argument(cache, lambda n: call["row_pos" if n == "pos" else n])
        neox = str(self.rope["mode"] == "neox").lower()
        call.launch(
            FILE,
            f"absorb<{cpp_format(w)}, {neox}, {row_type}, {1 if tokens == 1 else FEW}, "
            f"{blocks_for(w.ne[0], ROUND)}>",
            grid=heads * parts + (0 if self.row is None else tokens),
            block=256,
            args=[
                weights_of(w),
                Absorb(
                    q=q.ptr,
                    out=out.ptr,
                    q_step=q.nb[1],
                    out_step=out.nb[2],
                    q_next=q.nb[2],
                    out_next=out.nb[1],
                    pos=call["pos"].ptr,
                    rope=constants(self.rope),
                    n_nope=w.ne[0],
                    n_c=w.ne[1],
                    n_rot=self.rope["n_dims"],
                    parts=parts,
                    tokens=tokens,
                ),
                row,
            ],
            shared=shared,
        )


def with_rows(steps: Sequence[CudaStep]) -> Iterator[CudaStep]:
    """The steps, with the rows of a cache in the launch of the queries right before them. A product
    between the two comes before both: that of several tokens' rows does not share a launch with
    that of their queries."""
    order = [*steps]
    for i, (queries, between, row) in enumerate(zip(order, order[1:], order[2:])):
        if _joined(queries, row) is not None and _can_precede(between, queries):
            order[i : i + 2] = between, queries
    return paired(order, _joined)


def _can_precede(step: CudaStep, queries: CudaStep) -> bool:
    """Whether the step behind the queries is a product that does not read them."""
    product = len(step.nodes) == 1 and bool(step.node.op.weights) and step.node.op.writes is None
    return product and not any(read.base in queries.nodes for read in step.reads)


def _joined(queries: CudaStep, row: CudaStep) -> CudaStep | None:
    if not isinstance(queries.record, RecordAbsorb) or not isinstance(row.record, RecordRow):
        return None
    c = row.operands["c"]
    if c.ne[1] != queries.node.ne[1] or c.ne[0] > MOST_C:
        return None
    if row.record.neox != (queries.record.rope["mode"] == "neox"):
        return None
    if any(read.base in queries.nodes for read in row.reads):
        return None
    operands = {"row_pos" if name == "pos" else name: node for name, node in row.operands.items()}
    return CudaStep(
        (*queries.nodes, *row.nodes),
        {**queries.operands, **operands},
        RecordAbsorb(queries.record.rope, row.record),
        results={"queries": queries.node},
    )

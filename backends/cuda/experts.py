"""Products with the matrices of experts, chosen by ids on the device: nothing waits for the host.

Few pairs of token and slot: a product each (`vec_id`). More: pairs are sorted by expert and a tile
of the product meets up to 128 of them (`tile`). A pair without an expert gets zeros.
"""

from __future__ import annotations

import struct

import numpy as np

from pyggml import ops
from pyggml.backends.cuda import linear_blocks, linear_plain
from pyggml.backends.cuda.geometry import C_TYPES
from pyggml.backends.cuda.launch import Call, Operand, Value
from pyggml.backends.cuda.linear import beside, gate_rows, refusal, rounded, together, widest
from pyggml.backends.cuda.linear_common import (
    VEC,
    act_of,
    aligned,
    as_plain,
    in_blocks,
    plain_type,
)
from pyggml.backends.cuda.table import kernel
from pyggml.dtypes import F32, DType
from pyggml.graph import Ne, Node

#: Pairs up to which each is a product of its own.
FEW = 64


def routing(ids: Operand, experts: int, b: Operand) -> Value:
    """The struct `Routing`."""
    return Value(ids.tensor.data + struct.pack("<2i", experts, b.ne[1]))


def pairs_of(ids: Ne) -> int:
    return ids[0] * ids[1]


def has_tile(kind: DType, k: int) -> bool:
    """Whether `tile` takes the type: f32 would lose too much."""
    return plain_type(kind) is not F32 and k % 32 == 0


def is_few(kind: DType, a: Ne, ids: Ne) -> bool:
    return pairs_of(ids) <= FEW or not has_tile(kind, a[0])


def columns_for(pairs: int, experts: int) -> int:
    """Columns of a tile, from how many tokens an expert has on average."""
    mean = pairs / experts
    return 32 if mean <= 24 else 64 if mean <= 80 else 128


def most_tiles(pairs: int, experts: int, columns: int) -> int:
    """Tiles that any choice of experts can need."""
    return pairs // columns + min(experts, pairs)


def group_scratch(pairs: int, experts: int) -> int:
    tiles = most_tiles(pairs, experts, columns_for(pairs, experts))
    return aligned(4 * pairs, 16 * tiles, 4)


def scratch(a: Node, b: Node, ids: Node) -> int:
    if is_few(a.dtype, a.ne, ids.ne):
        return linear_blocks.vec_scratch(b.ne) if in_blocks(a.dtype) else 0
    return linear_blocks.tile_scratch(b.ne) + group_scratch(pairs_of(ids.ne), a.ne[2])


def numeric(node: Node) -> str:
    """The class of the least exact of the node's weights."""
    return widest(*(_numeric(a, node.src[-1]) for a in node.src[:-2]))


def _numeric(a: Node | None, ids: Node | None) -> str:
    assert a is not None and ids is not None
    if rounded(a):
        return "bf16"
    if not is_few(a.dtype, a.ne, ids.ne):
        return linear_blocks.CLASS[linear_blocks.half_of(plain_type(a.dtype))]
    return "f16" if in_blocks(a.dtype) else "f32"


def can_tile(a: Operand) -> bool:
    """Whether the tensor cores' kernel can read the rows: 8 bytes at once."""
    one = as_plain(a)
    return in_blocks(a.dtype) or (one.nb[0] == one.dtype.nbytes and one.aligned(8))


def product(call: Call, a: tuple[Operand, ...], b: Operand, ids: Operand, y: Operand) -> None:
    """One matrix for each pair, or up and gate of a type that `together` allows."""
    if not is_few(a[0].dtype, a[0].ne, ids.ne) and can_tile(a[0]):
        grouped(call, a, b, ids, y)
    elif in_blocks(a[0].dtype):
        fixed = linear_blocks.quantize(call, b, 2)
        tiles = -(-a[0].ne[1] // 8)
        call.launch(
            VEC,
            f"vec_id<{linear_blocks.cpp_format(a[0])}, {len(a)}>",
            grid=(tiles, pairs_of(ids.ne)),
            block=(32, linear_blocks.warps_for(a[0].ne[0] // 32, tiles * pairs_of(ids.ne))),
            args=[
                linear_blocks.weights_of(*a),
                fixed,
                y.tensor,
                routing(ids, a[0].ne[2], b),
                act_of(call),
            ],
            overlap=True,
        )
    else:
        one = as_plain(a[0])
        vector = linear_plain.can_vector(one, b)
        most = 65535  # pairs in a grid
        for start in range(0, ids.ne[1], most // ids.ne[0]):
            some = most // ids.ne[0]
            part = _tokens(ids, 1, start, some)
            x, to = _tokens(b, 2, start, some), _tokens(y, 2, start, some)
            types = f"{C_TYPES[one.dtype.name]}, {C_TYPES[b.dtype.name]}"
            call.launch(
                VEC,
                f"vec_plain_id<{types}, {str(vector).lower()}>",
                grid=(-(-one.ne[1] // 4), pairs_of(part.ne)),
                block=(32, linear_plain.plain_warps(one, vector)),
                args=[one.tensor, x.tensor, to.tensor, routing(part, one.ne[2], x)],
            )


def _tokens(x: Operand, axis: int, start: int, most: int) -> Operand:
    """Some tokens of an operand."""
    ne = list(x.ne)
    ne[axis] = min(most, ne[axis] - start)
    return Operand(x.ptr + start * x.nb[axis], (ne[0], ne[1], ne[2], ne[3]), x.nb, x.dtype)


def grouped(call: Call, a: tuple[Operand, ...], b: Operand, ids: Operand, y: Operand) -> None:
    """Sort the pairs by expert, then `tile`."""
    a = tuple(as_plain(m) for m in a)
    pairs, experts = pairs_of(ids.ne), a[0].ne[2]
    some = columns_for(pairs, experts)
    tiles = most_tiles(pairs, experts, some)
    order, table, count = (np.uint64(call.scratch(n)) for n in (4 * pairs, 16 * tiles, 4))
    where = routing(ids, experts, b)
    call.launch(
        "moe_group.cu",
        "group_pairs",
        grid=experts + 1,
        block=1024,
        args=[where, y.tensor, order, table, count, np.int32(some)],
        shared=4 * experts,
    )
    form = linear_blocks.cpp_format(a[0])
    if not in_blocks(a[0].dtype):
        form = f"Dense<{C_TYPES[a[0].dtype.name]}>"
    columns = Value(struct.pack("<3Q16x", table, count, order) + where.data)
    linear_blocks.launch_tile(call, form, a, b, y, some, columns, (tiles, 1), routed=True)


@kernel(
    ops.mul_mat_id,
    types=None,
    scratch=lambda node: scratch(*_sources(node, 0)),
    refuses=refusal,
    numeric=numeric,
)
def mul_mat_id(call: Call) -> None:
    a, b, ids = (call.operand(i) for i in range(3))
    product(call, (a,), b, ids, call.out)


def _sources(node: Node, matrix: int) -> tuple[Node, Node, Node]:
    a, b, ids = node.src[matrix], node.src[-2], node.src[-1]
    assert a is not None and b is not None and ids is not None
    return a, b, ids


def _up_gate_scratch(node: Node) -> int:
    apart = aligned(4 * node.spec.elements) + scratch(*_sources(node, 1))
    return scratch(*_sources(node, 0)) + apart


@kernel(ops.moe_up_gate, types=None, scratch=_up_gate_scratch, refuses=refusal, numeric=numeric)
def moe_up_gate(call: Call) -> None:
    up, gate, b, ids = (call.operand(i) for i in range(4))
    if together(up, gate):
        product(call, (up, gate), b, ids, call.out)
        return
    other = beside(call)
    product(call, (up,), b, ids, call.out)
    product(call, (gate,), b, ids, other)
    gate_rows(call, other)

"""Products with the matrices of experts, chosen by ids on the device: nothing waits for the host.

Few pairs of token and slot: a product each (`vec_id`). More: pairs are sorted by expert and a tile
of the product meets up to 128 of them (`tile`). A pair without an expert gets zeros.

prec="f32" keeps to a product for each pair, with 24-bit b for block types: slow for many pairs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.geometry import C_TYPES
from pyggml.backends.cuda.launch import Call, Operand, Value
from pyggml.backends.cuda.linear import blocks, plain
from pyggml.backends.cuda.linear.common import VEC, act_of, aligned, in_blocks
from pyggml.backends.cuda.linear.products import beside, gate_rows, is_exact, together, widest
from pyggml.backends.cuda.table import kernel
from pyggml.dtypes import F32, DType
from pyggml.node import Ne, Node

#: Pairs up to which each is a product of its own.
FEW = 64
#: Pairs that one launch of `vec_id` takes: the most that a grid has in its second dimension.
GRID = 65535


def routing(ids: Operand, experts: int, b: Operand) -> Value:
    """The struct `Routing`."""
    return Value(ids.tensor.data + struct.pack("<2i", experts, b.ne[1]))


def pairs_of(ids: Ne) -> int:
    return ids[0] * ids[1]


def has_tile(kind: DType, k: int) -> bool:
    """Whether `tile` takes the type: f32 would lose too much."""
    return kind is not F32 and k % 32 == 0


def is_few(kind: DType, a: Ne, ids: Ne, exact: bool) -> bool:
    """Whether each pair is a product of its own."""
    return exact or pairs_of(ids) <= FEW or not has_tile(kind, a[0])


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


def scratch(node: Node, matrix: int) -> int:
    """Bytes for the product with one of the node's matrices."""
    a, b, ids = node.src[matrix], node.src[-2], node.src[-1]
    assert a is not None and b is not None and ids is not None
    exact = is_exact(node)
    if is_few(a.dtype, a.ne, ids.ne, exact):
        return blocks.vec_scratch(b.ne, 3 if exact else 2) if in_blocks(a.dtype) else 0
    return blocks.tile_scratch(b.ne) + group_scratch(pairs_of(ids.ne), a.ne[2])


def numeric(node: Node) -> str:
    """The class of the least exact of the node's weights."""
    return widest(*(_numeric(a, node.src[-1], is_exact(node)) for a in node.src[:-2]))


def _numeric(a: Node | None, ids: Node | None, exact: bool) -> str:
    assert a is not None and ids is not None
    if not is_few(a.dtype, a.ne, ids.ne, exact):
        return blocks.CLASS[blocks.half_of(a.dtype)]
    return "f16" if in_blocks(a.dtype) and not exact else "f32"


def can_tile(a: Operand) -> bool:
    """Whether the tensor cores' kernel can read the rows: 8 bytes at once."""
    return in_blocks(a.dtype) or (a.nb[0] == a.dtype.nbytes and a.aligned(8))


def product(call: Call, a: tuple[Operand, ...], b: Operand, ids: Operand, y: Operand) -> None:
    """One matrix for each pair, or up and gate of a type that `together` allows."""
    exact = is_exact(call.node)
    if not is_few(a[0].dtype, a[0].ne, ids.ne, exact) and can_tile(a[0]):
        grouped(call, a, b, ids, y)
    elif in_blocks(a[0].dtype):
        few_blocks(call, a, b, ids, y, 3 if exact else 2)
    else:
        few_plain(call, a[0], b, ids, y)


def few_blocks(
    call: Call, a: tuple[Operand, ...], b: Operand, ids: Operand, y: Operand, levels: int
) -> None:
    """`vec_id`, of one matrix or of up and gate."""
    fixed = blocks.quantize(call, b, levels)
    token = b.ne[1] * b.ne[0] // 32 * blocks.group_bytes(levels)
    tiles = -(-a[0].ne[1] // 8)
    for start, some, to in _launches(ids, y):
        pairs = pairs_of(some.ne)
        call.launch(
            VEC,
            f"vec_id<{blocks.cpp_format(a[0])}, {levels}, {len(a)}>",
            grid=(tiles, pairs),
            block=(32, blocks.warps_for(a[0].ne[0] // 32, tiles * pairs)),
            args=[
                blocks.weights_of(*a),
                np.uint64(int(fixed) + start * token),
                to.tensor,
                routing(some, a[0].ne[2], b),
                act_of(call),
                np.int32(blocks.is_prepared(call)),
            ],
        )


def few_plain(call: Call, a: Operand, b: Operand, ids: Operand, y: Operand) -> None:
    """`vec_plain_id`: f32 sums of exact products."""
    vector = plain.can_vector(a, b)
    types = f"{C_TYPES[a.dtype.name]}, {C_TYPES[b.dtype.name]}"
    for start, some, to in _launches(ids, y):
        x = _tokens(b, 2, start, some.ne[1])
        call.launch(
            VEC,
            f"vec_plain_id<{types}, {str(vector).lower()}>",
            grid=(-(-a.ne[1] // 4), pairs_of(some.ne)),
            block=(32, plain.plain_warps(a, vector)),
            args=[a.tensor, x.tensor, to.tensor, routing(some, a.ne[2], x)],
        )


def _launches(ids: Operand, y: Operand) -> Iterator[tuple[int, Operand, Operand]]:
    """As many tokens as fit a grid: the first one, their ids and results."""
    most = max(1, GRID // ids.ne[0])
    for start in range(0, ids.ne[1], most):
        yield start, _tokens(ids, 1, start, most), _tokens(y, 2, start, most)


def _tokens(x: Operand, axis: int, start: int, most: int) -> Operand:
    """Some tokens of an operand."""
    ne = list(x.ne)
    ne[axis] = min(most, ne[axis] - start)
    return Operand(x.ptr + start * x.nb[axis], (ne[0], ne[1], ne[2], ne[3]), x.nb, x.dtype)


def grouped(call: Call, a: tuple[Operand, ...], b: Operand, ids: Operand, y: Operand) -> None:
    """Sort the pairs by expert, then `tile`."""
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
    form = blocks.cpp_format(a[0])
    if not in_blocks(a[0].dtype):
        form = f"Dense<{C_TYPES[a[0].dtype.name]}>"
    columns = Value(struct.pack("<3Q16x", table, count, order) + where.data)
    blocks.launch_tile(call, form, a, b, y, some, columns, (tiles, 1), routed=True)


@kernel(
    ops.mul_mat_id,
    types=None,
    scratch=lambda node: scratch(node, 0),
    numeric=numeric,
)
def mul_mat_id(call: Call) -> None:
    a, b, ids = (call.operand(i) for i in range(3))
    product(call, (a,), b, ids, call.out)


def _up_gate_scratch(node: Node) -> int:
    return scratch(node, 0) + aligned(4 * node.spec.elements) + scratch(node, 1)


@kernel(ops.moe_up_gate, types=None, scratch=_up_gate_scratch, numeric=numeric)
def moe_up_gate(call: Call) -> None:
    up, gate, b, ids = (call.operand(i) for i in range(4))
    if together(up, gate) and not is_exact(call.node):
        product(call, (up, gate), b, ids, call.out)
        return
    other = beside(call)
    product(call, (up,), b, ids, call.out)
    product(call, (gate,), b, ids, other)
    gate_rows(call, other)

"""Products with the matrices of experts, chosen by ids on the device: nothing waits for the host.

A pair of token and slot without an expert gets zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pyggml.backends.cuda.geometry import C_TYPES
from pyggml.backends.cuda.launch import Call, Operand
from pyggml.backends.cuda.linear import blocks, plain
from pyggml.backends.cuda.linear.common import VEC, Routing, act_of, aligned, in_blocks
from pyggml.node import Ne

#: Pairs that one launch of `vec_id` takes: the most that a grid has in its second dimension.
GRID = 65535


def routing(ids: Operand, experts: int, b: Operand) -> Routing:
    return Routing(ids=ids.tensor, experts=experts, n_b=b.ne[1])


def pairs_of(ids: Ne) -> int:
    return ids[0] * ids[1]


def columns_for(pairs: int, experts: int) -> int:
    """Columns of a tile, from how many tokens an expert has on average."""
    mean = pairs / experts
    return 32 if mean <= 24 else 64 if mean <= 80 else 128


def most_tiles(pairs: int, experts: int, columns: int) -> int:
    """Tiles that any choice of experts can need."""
    return pairs // columns + min(experts, pairs)


def group_scratch(ids: Ne, experts: int) -> int:
    pairs = pairs_of(ids)
    tiles = most_tiles(pairs, experts, columns_for(pairs, experts))
    return aligned(4 * pairs, 16 * tiles, 4)


def can_tile(a: Operand) -> bool:
    """Whether the tensor cores' kernel can read the rows: 8 bytes at once."""
    return in_blocks(a.dtype) or (a.nb[0] == a.dtype.nbytes and a.aligned(8))


def vec(
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
                np.int32(call.get("fixed") is not None),
            ],
        )


def vec_plain(call: Call, a: Operand, b: Operand, ids: Operand, y: Operand) -> None:
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


def tile(call: Call, a: tuple[Operand, ...], b: Operand, ids: Operand, y: Operand) -> None:
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
    columns = blocks.Columns(
        tiles=int(table), n_tiles=int(count), order=int(order), heads=blocks.NO_HEADS, routing=where
    )
    blocks.launch_tile(call, form, a, b, y, some, columns, (tiles, 1), routed=True)

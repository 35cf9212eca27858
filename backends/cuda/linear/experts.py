"""Products with expert matrices, chosen by ids on the device: nothing waits for the host.

A (token, slot) pair without an expert gets zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pyggml.backends.cuda.geometry import C_TYPES, over_rows
from pyggml.backends.cuda.launch import Call, Operand
from pyggml.backends.cuda.linear import blocks, plain, ring
from pyggml.backends.cuda.linear.common import (
    NO_HEADS,
    PREPARE,
    VEC,
    Columns,
    Routing,
    act_of,
    aligned,
    in_blocks,
    limit_of,
    rows_in,
)
from pyggml.backends.cuda.linear.halves import (
    Places,
    half_of,
    launch_halves,
    padded,
    rows_and_scales,
    tile_scratch,
)
from pyggml.dtypes import DType
from pyggml.spec import Ne

#: Most pairs per launch of `vec_id`: the limit of a grid's second dimension.
GRID = 65535


def routing(ids: Operand, experts: int, b: Operand) -> Routing:
    return Routing(ids=ids.tensor, experts=experts, n_b=b.ne[1])


def pairs_of(ids: Ne) -> int:
    return ids[0] * ids[1]


def columns_for(pairs: int, experts: int) -> int:
    """Most columns of a tile in the lists, chosen by the mean number of pairs per expert."""
    mean = pairs / experts
    return 32 if mean <= 24 else 64 if mean <= 80 else 128 if mean <= 128 else ring.COLUMNS


def most_tiles(pairs: int, experts: int, columns: int) -> int:
    """The most tiles that any choice of experts can need; no expert counts as one."""
    return pairs // columns + min(experts + 1, pairs)


def group_scratch(ids: Ne, experts: int) -> int:
    pairs = pairs_of(ids)
    tiles = most_tiles(pairs, experts, columns_for(pairs, experts))
    return aligned(4 * pairs, 4 * pairs, 16 * tiles, 8)


def in_order(dtype: DType, a: Ne, ids: Ne) -> bool:
    """Whether a product reads its columns in the order of experts, on a GPU that has `ring`."""
    return ring.can_order(columns_for(pairs_of(ids), a[2])) and ring.can_take(dtype, a)


def columns_scratch(dtype: DType, a: Ne, b: Ne, ids: Ne) -> int:
    """Size of the columns, in bytes."""
    pairs = pairs_of(ids)
    return tile_scratch((b[0], pairs, 1, 1) if in_order(dtype, a, ids) else b)


def can_tile(a: Operand) -> bool:
    """Whether the tensor-core kernel can read the rows, which it does 8 bytes at a time."""
    return in_blocks(a.dtype) or (a.nb[0] == a.dtype.nbytes and a.aligned(8))


def vec(
    call: Call, a: tuple[Operand, ...], b: Operand, ids: Operand, y: Operand, levels: int
) -> None:
    """Record `vec_id` for one matrix, or for up and gate."""
    tiles = -(-a[0].ne[1] // 8)
    pair = 2 if levels == 2 and len(a) == 1 and tiles * pairs_of(ids.ne) >= 1024 else 1
    tiles = -(-tiles // pair)
    columns = blocks.columns_of(call, b, levels, tiles * pairs_of(ids.ne))
    # The kernel reads ids before the activations are complete. A launch of its own has waited.
    late = call.late and (call.get("fixed") is not None or columns.shared > 0)
    token = blocks.fixed_bytes((b.ne[0], b.ne[1], 1, 1), levels)
    limited, limit = limit_of(call.attrs, len(a))
    names = f"{levels}, {len(a)}, {pair}, {columns.form}{limited}"
    for start, chunk, out in _launches(ids, y):
        pairs, x = pairs_of(chunk.ne), _tokens(b, 2, start, chunk.ne[1])
        call.launch(
            VEC,
            f"vec_id<{blocks.cpp_format(a[0])}, {names}>",
            grid=(tiles, pairs),
            block=(32, blocks.warps_for(a[0].ne[0] // 32, tiles * pairs)),
            args=[
                blocks.weights_of(*a),
                x.tensor if columns.shared else np.uint64(int(columns.x) + start * token),
                out.tensor,
                routing(chunk, a[0].ne[2], b),
                act_of(call),
                np.int32(late),
                *limit,
            ],
            shared=columns.shared,
            early=not late,
        )


def vec_plain(call: Call, a: Operand, b: Operand, ids: Operand, y: Operand) -> None:
    """Record `vec_plain_id`: f32 sums of exact products."""
    vector = plain.can_vector(a, b)
    types = f"{C_TYPES[a.dtype.name]}, {C_TYPES[b.dtype.name]}"
    for start, chunk, out in _launches(ids, y):
        x = _tokens(b, 2, start, chunk.ne[1])
        call.launch(
            VEC,
            f"vec_plain_id<{types}, {str(vector).lower()}>",
            grid=(-(-a.ne[1] // 4), pairs_of(chunk.ne)),
            block=(32, plain.plain_warps(a, vector)),
            args=[a.tensor, x.tensor, out.tensor, routing(chunk, a.ne[2], x)],
        )


def _launches(ids: Operand, y: Operand) -> Iterator[tuple[int, Operand, Operand]]:
    """Split the tokens into launches that fit a grid: first token, ids, results."""
    most = max(1, GRID // ids.ne[0])
    for start in range(0, ids.ne[1], most):
        yield start, _tokens(ids, 1, start, most), _tokens(y, 2, start, most)


def _tokens(x: Operand, axis: int, start: int, most: int) -> Operand:
    """At most `most` tokens of an operand, starting at `start`."""
    ne = list(x.ne)
    ne[axis] = min(most, ne[axis] - start)
    return Operand(x.ptr + start * x.nb[axis], (ne[0], ne[1], ne[2], ne[3]), x.nb, x.dtype)


class ShortRows(NamedTuple):
    """Where the places of pairs are, and the scales of these places."""

    places: np.uint64
    scales: np.uint64


class Lists(NamedTuple):
    """Pairs sorted by expert: as a kernel's argument, the address of their places, the most columns
    of a tile, and how many tiles there may be."""

    columns: Columns
    places: int
    width: int
    tiles: int


def lists_of(call: Call, ids: Operand, experts: int, b: Operand) -> Lists:
    """call["groups"], or what launches recorded here leave."""
    pairs = pairs_of(ids.ne)
    width = columns_for(pairs, experts)
    tiles = most_tiles(pairs, experts, width)
    groups = call.get("groups")
    if groups is None:
        ptr = call.scratch(group_scratch(ids.ne, experts))
        launch_groups(call, ids, experts, ptr)
    else:
        ptr = groups.ptr
    order, places, table, count = _lists(ptr, pairs, tiles)
    columns = Columns(
        tiles=table,
        n_tiles=count,
        order=order,
        heads=NO_HEADS,
        routing=routing(ids, experts, b),
    )
    return Lists(columns, places, width, tiles)


def ordered(
    call: Call,
    a: Operand,
    b: Operand,
    ids: Operand,
    places: int,
    are_long: int = 0,
    rows: Operand | None = None,
) -> tuple[np.uint64, np.uint64]:
    """Record the conversion of b to rows in the order of experts. Returns where these and their
    scales are.

    are_long  as in linear_prepare.cu
    rows      what a step before made of b
    """
    at = Places(places=places, are_long=are_long, n_used=ids.ne[0], n_b=b.ne[1])
    out = call.scratch(columns_scratch(a.dtype, a.ne, b.ne, ids.ne))
    if rows is not None:
        words = padded(b.ne[0]) // 8
        written = rows_and_scales((b.ne[0], pairs_of(ids.ne), 1, 1), out)
        grid, block = over_rows(words, rows_in(b.ne))
        call.launch(
            PREPARE,
            "place_rows",
            grid=grid,
            block=block,
            args=[*rows_and_scales(b.ne, rows.ptr), *written, np.int32(words), at],
        )
        return written
    return launch_halves(call, b, out, half_of(a.dtype), at, pairs_of(ids.ne))


def tile(
    call: Call,
    a: tuple[Operand, ...],
    b: Operand,
    ids: Operand,
    y: Operand,
    short: bool = False,
) -> ShortRows | None:
    """Record the sorting of pairs by expert, unless call["groups"] has it, then `tile`.

    short  results may be short rows (short_rows.cuh), in the memory of those of f32. The return
           value tells whether they are
    """
    columns, places, width, tiles = lists_of(call, ids, a[0].ne[2], b)
    if ring.can_order(width) and ring.can_ring(call, a, y):
        halves = ordered(call, a[0], b, ids, places)
        ring.launch(call, a, y, halves, columns, width, short=short)
        return ShortRows(np.uint64(places), halves[1]) if short else None
    form = blocks.cpp_format(a[0])
    if not in_blocks(a[0].dtype):
        form = f"Dense<{C_TYPES[a[0].dtype.name]}>"
    half = min(width, 128)
    blocks.launch_tile(call, form, a, b, y, half, columns, (tiles, width // half), routed=True)
    return None


def launch_groups(call: Call, ids: Operand, experts: int, ptr: int) -> None:
    """Record the sorting of pairs by expert, for all products with these ids."""
    pairs = pairs_of(ids.ne)
    width = columns_for(pairs, experts)
    lists = _lists(ptr, pairs, most_tiles(pairs, experts, width))
    call.launch(
        "moe_group.cu",
        "group_pairs",
        grid=experts + 1,
        block=1024,
        args=[
            Routing(ids=ids.tensor, experts=experts, n_b=1),
            *map(np.uint64, lists),
            np.int32(width),
        ],
        shared=4 * (experts + 1),
    )


def _lists(ptr: int, pairs: int, tiles: int) -> tuple[int, int, int, int]:
    """The addresses of the sorted pairs, of their places, of the tiles, and of their number."""
    table = ptr + 2 * aligned(4 * pairs)
    return ptr, ptr + aligned(4 * pairs), table, table + aligned(16 * tiles)

"""Products with weights of block types, decoded in the kernels."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import numpy as np

from pyggml.backends.cuda.argument import Argument, Struct, Tensor
from pyggml.backends.cuda.geometry import C_TYPES, blocks_for, over_rows
from pyggml.backends.cuda.gpu import H200
from pyggml.backends.cuda.launch import Call, Form, Operand
from pyggml.backends.cuda.linear import ring
from pyggml.backends.cuda.linear.common import (
    FEW,
    NO_ROUTING,
    PREPARE,
    VEC,
    Columns,
    Shape,
    act_of,
    aligned,
    dense,
    is_narrow,
    limit_of,
    rows_in,
    shape_of,
)
from pyggml.backends.cuda.linear.halves import DEPTH, half_of, padded, to_halves
from pyggml.backends.cuda.peers import sends
from pyggml.backends.cuda.weights.formats import FORMATS
from pyggml.backends.cuda.weights.packing import Packed, packed
from pyggml.dtypes import F32
from pyggml.ops.leaf import constant_op
from pyggml.spec import Ne

TILE = "linear_tile.cu"


def cpp_format(a: Operand) -> str:
    return a.dtype.name if a.layout == "tiles8" else f"Raw<{a.dtype.name}>"


class TileWeights(Struct):
    """The struct `Weights` of formats.cuh, for a format stored in tiles."""

    _fields_ = (("w", Packed * 2),)


class RowWeights(Struct):
    """The struct `Weights` of formats.cuh, for a format stored in rows, as in a file."""

    _fields_ = (("w", Tensor * 2),)


def weights_of(*matrices: Operand) -> Struct:
    """The kernel argument for one matrix (which then appears twice) or for up and gate."""
    first, second = (matrices * 2)[:2]
    if first.layout == "tiles8":
        return TileWeights(w=(packed(first), packed(second)))
    return RowWeights(w=(first.tensor, second.tensor))


def group_bytes(levels: int) -> int:
    return 32 * levels + 16


def fixed_bytes(b: Ne, levels: int) -> int:
    """Size of b in fixed point, in bytes."""
    return rows_in(b) * (b[0] // 32) * group_bytes(levels)


#: The most values of columns that a block makes fixed point for itself, and that all blocks of a
#: launch may: about 1 us on a GPU with 132 multiprocessors, less than the launch that it saves.
OWN_COLUMN, OWN = 1 << 14, 5 << 18


class Source(NamedTuple):
    """How `vec` gets its columns of b: `x` is the kernel argument, of the C++ type `form`.

    shared  bytes of dynamic shared memory, for columns that each block makes
    """

    form: str
    x: Argument
    shared: int = 0


def columns_of(
    call: Call, b: Operand, levels: int, n_blocks: int, each: int = 1, even: bool = True
) -> Source:
    """The columns of b for `n_blocks` blocks that take `each` columns: as an earlier step prepared
    them, or made by each block, or by a launch before. even: those of a block are at equal
    distances.

    Weights that are written in the run are read early too, so a launch must precede the product.
    """
    fixed = call.get("fixed")
    if fixed is not None:
        return Source("Groups", fixed.pointer)
    adjacent = b.dtype is F32 and b.nb[0] == 4 and b.aligned(16)
    resident = all(call.node[name].root.op is constant_op for name in call.node.op.weights)
    values = b.ne[0] * each
    short = values <= OWN_COLUMN and n_blocks * values <= OWN
    if levels == 2 and adjacent and even and resident and short:
        return Source("Tensor", b.tensor, values // 32 * group_bytes(levels))
    out = np.uint64(call.scratch(fixed_bytes(b.ne, levels)))
    launch_quantize(call, b, out, levels)
    return Source("Groups", out)


def launch_quantize(call: Call, b: Operand, out: np.uint64, levels: int) -> None:
    groups, columns = b.ne[0] // 32, rows_in(b.ne)
    call.launch(
        VEC,
        f"quantize<{C_TYPES[b.dtype.name]}, {levels}>",
        grid=blocks_for(columns * groups * 8),
        block=256,
        args=[b.tensor, out, np.int32(groups), np.int64(columns)],
    )


def warps_for(groups: int, blocks: int) -> int:
    """Warps that share the rows of a block: enough to fill a GPU, with two groups per lane."""
    most = 8 if blocks <= 512 else 4 if blocks <= 1536 else 2
    return min(most, max(1, groups // 8))


#: Warps of a team of `vec_teams`, and how many teams a block may have: enough for a multiprocessor,
#: and at most MOST_TEAMS of linear_vec.cu. LONG: the shortest rows. So large a block begins when
#: the launch before has left its multiprocessor, which would show in a short product.
TEAM_WARPS, TEAMS, LONG = 4, range(5, 8), 4096
#: Types of which a thread of `vec` with two tiles takes 80 registers, and how many warps of them a
#: multiprocessor has. With fewer warps a block, all blocks are there at once: a fifth of the time.
TALL, TALL_WARPS = ("q5_K", "q6_K"), 25


def _can_team(a: Operand, shape: Shape) -> bool:
    """Whether `vec_teams` is for it. Codes of 8 bits are read as fast by `vec`."""
    form = FORMATS.get(a.dtype.name)
    return (
        shape.columns == shape.batches == 1
        and a.layout == "tiles8"
        and form is not None
        and form.codes < 32
        and a.ne[0] >= LONG
        and a.dtype.name not in TALL
    )


def vec(call: Call, a: tuple[Operand, ...], b: Operand, y: Operand, levels: int) -> None:
    """Record `vec` for one matrix, or for up and gate."""
    shape, tiles = shape_of(a[0].ne, b.ne), -(-a[0].ne[1] // 8)
    single = levels == 2 and len(a) == 1
    chunk = next((n for n in ((1, 2, 4, 8) if single else (1, 8)) if n >= shape.columns), FEW)
    pair = 2 if single and tiles >= 1024 else 1  # tiles of rows that share the loads of b
    grid = -(-tiles // pair), -(-shape.columns // chunk), shape.batches
    columns = columns_of(call, b, levels, prod(grid), chunk, chunk == 1 or shape.columns == b.ne[1])
    each = blocks_for(prod(grid), call.device.sms)  # blocks of a multiprocessor
    if pair == 2 and each in TEAMS and columns.form == "Groups" and _can_team(a[0], shape):
        call.launch(
            VEC,
            f"vec_teams<{a[0].dtype.name}>",
            grid=blocks_for(grid[0], each),
            block=(32, TEAM_WARPS * each),
            args=[weights_of(*a), columns.x, y.tensor, is_narrow(y)],
        )
        return
    limited, limit = limit_of(call.attrs, len(a))
    names = f"{cpp_format(a[0])}, {chunk}, {levels}, {len(a)}, {pair}"
    fixed = single and chunk == 1 and columns.form == "Groups" and a[0].layout == "tiles8"
    warps = max(warps_for(a[0].ne[0] // 32, prod(grid)), 8 * chunk * len(a) * pair // 32)
    if pair == 2 and chunk == 1 and a[0].dtype.name in TALL and 3 <= TALL_WARPS // each < warps:
        warps = TALL_WARPS // each
    if columns.shared and chunk > 1:  # columns of several tokens are fixed point after a few rounds
        warps = max(warps, min(8, chunk * b.ne[0] // 256))
    weights, lone = weights_of(*a), single and pair == 1 and grid[1:] == (1, 1) == (chunk, y.ne[1])
    form = f"vec_sent<{cpp_format(a[0])}, {columns.form}>"
    call.launch(
        VEC,
        f"vec<{names}, {columns.form}{limited}>",
        grid=grid,
        block=(32, warps),
        args=[weights, columns.x, y.tensor, shape.heads, is_narrow(y), act_of(call), *limit],
        shared=columns.shared,
        meeting=sends(y.ptr, lambda total: Form(form, [weights, columns.x, y.pointer, total]))
        if lone and y.dtype is F32 and y.contiguous and a[0].layout == "tiles8"
        else None,
        soon=f"vec<{names}, Soon>" if fixed else "",
    )


#: The most columns of a tile of `tile`.
WIDEST_TILE = 128


def tile_columns(columns: int) -> int:
    return 32 if columns <= 32 else 64 if columns <= 64 else WIDEST_TILE


def tile_shared(columns: int) -> int:
    """Bytes of shared memory: four stages, and room to align them."""
    return 4 * columns * DEPTH * 2 + 1024


def splits_of(a: Ne, b: Ne) -> int:
    """How many blocks of `tile` split the k of a tile: aims at two blocks per multiprocessor and at
    least 4 steps per block. It is the same on every GPU, so that sums are too."""
    shape = shape_of(a, b)
    if shape.columns > 128:
        return 1
    tiles = -(-a[1] // 128) * -(-shape.columns // 64) * shape.batches
    return max(1, min(2 * H200.sms // tiles, padded(a[0]) // DEPTH // 4))


def split_scratch(a: Ne, b: Ne) -> int:
    """Size of the sums of all splits, in bytes."""
    splits = splits_of(a, b)
    return aligned(4 * a[1] * rows_in(b) * splits) if splits > 1 else 0


def tile(call: Call, a: tuple[Operand, ...], b: Operand, y: Operand) -> None:
    """Record `tile` for one matrix, or for up and gate."""
    shape = shape_of(a[0].ne, b.ne)
    if shape.columns > WIDEST_TILE and ring.can_ring(call, a, y):
        launch_ring(call, a, b, y)
        return
    columns = columns_in_order(shape)
    width, splits = tile_columns(shape.columns), 1 if len(a) == 2 else splits_of(a[0].ne, b.ne)
    sums, count = y, rows_in(b.ne)
    if splits > 1:
        width, ptr = min(width, 64), call.scratch(4 * y.ne[0] * count * splits)
        sums = dense(ptr, (y.ne[0], count * splits, 1, 1), F32)
    grid = -(-shape.columns // width), shape.batches
    launch_tile(call, cpp_format(a[0]), a, b, sums, width, columns, grid, splits=splits)
    if splits > 1:
        rows, block = over_rows(y.ne[0], count)
        call.launch(
            PREPARE,
            "add_splits",
            grid=rows,
            block=block,
            args=[sums.pointer, y.tensor, np.int32(splits), is_narrow(y)],
        )


def columns_in_order(shape: Shape) -> Columns:
    """The argument of kernels whose columns no expert takes."""
    return Columns(tiles=0, n_tiles=0, order=0, heads=shape.heads, routing=NO_ROUTING)


def launch_ring(
    call: Call,
    a: tuple[Operand, ...],
    b: Operand,
    y: Operand,
    second: tuple[Operand, Operand] | None = None,
) -> None:
    """Record `ring` for one matrix, for up and gate, or for one and a second with its result."""
    shape, rows = shape_of(a[0].ne, b.ne), [a[0].ne[1] * len(a)]
    if second is not None:
        rows.append(second[0].ne[1])
    width = ring.width_of(ring.tiles_for(*rows), shape.columns, shape.batches, call.device)
    ring.launch(
        call, a, y, to_halves(call, b, half_of(a[0].dtype)), columns_in_order(shape), width,
        column_tiles=-(-shape.columns // width), batches=shape.batches, second=second,
    )  # fmt: skip


def launch_tile(
    call: Call,
    form: str,
    a: tuple[Operand, ...],
    b: Operand,
    y: Operand,
    width: int,
    columns: Columns,
    grid: tuple[int, int],
    routed: bool = False,
    splits: int = 1,
) -> None:
    x, scales = to_halves(call, b, half_of(a[0].dtype))
    limited, limit = limit_of(call.attrs, len(a))
    call.launch(
        TILE,
        f"tile<{form}, {len(a)}, {width}, {str(routed).lower()}{limited}>",
        grid=(-(-a[0].ne[1] * len(a) // 128) * splits, *grid),
        block=256,
        args=[
            weights_of(*a),
            x,
            scales,
            np.int32(padded(b.ne[0])),
            y.tensor,
            columns,
            is_narrow(y),
            act_of(call),
            np.int32(splits),
            np.int32(call.get("halves") is not None),
            *limit,
        ],
        shared=tile_shared(width),
    )

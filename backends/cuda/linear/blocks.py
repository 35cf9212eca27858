"""Products with weights of block types, decoded in the kernels."""

from __future__ import annotations

import ctypes
from math import prod

import numpy as np

from pyggml.backends.cuda.geometry import C_TYPES, blocks_for
from pyggml.backends.cuda.launch import H200, Call, Operand, Struct, Tensor
from pyggml.backends.cuda.linear.common import (
    FEW,
    PREPARE,
    VEC,
    Heads,
    Routing,
    act_of,
    aligned,
    dense,
    is_narrow,
    rows_in,
    shape_of,
)
from pyggml.backends.cuda.weights.packing import Packed, packed
from pyggml.dtypes import F32, DType
from pyggml.node import Ne

TILE = "linear_tile.cu"
#: Numbers of k that a tile takes at a time.
DEPTH = 64
#: Classes of numbers by what holds a decoded weight.
CLASS = {"__half": "f16", "__nv_bfloat16": "bf16"}


def half_of(kind: DType) -> str:
    """What holds a decoded weight on the tensor cores, as C++ says it."""
    return "__nv_bfloat16" if kind.name in ("mxfp4", "bf16") else "__half"


def cpp_format(a: Operand) -> str:
    return a.dtype.name if a.layout == "tiles8" else f"Raw<{a.dtype.name}>"


class TileWeights(Struct):
    """The struct `Weights` of formats.cuh, of a format that is kept in tiles."""

    _fields_ = (("w", Packed * 2),)


class RowWeights(Struct):
    """The same of a format that lies in rows, as in a file."""

    _fields_ = (("w", Tensor * 2),)


class Columns(Struct):
    """The struct `Columns` of linear_tile.cu: `heads`, or what moe_group.cu makes of `routing`."""

    _fields_ = (
        ("tiles", ctypes.c_uint64),
        ("n_tiles", ctypes.c_uint64),
        ("order", ctypes.c_uint64),
        ("heads", Heads),
        ("routing", Routing),
    )


NO_HEADS = Heads(a2=0, r3=0, columns=0)
NO_ROUTING = Routing(ids=Tensor(data=0, nb=(0,) * 4, ne=(0,) * 4), experts=0, n_b=0)


def weights_of(*matrices: Operand) -> Struct:
    """One matrix, which then stands twice, or up and gate."""
    first, second = (matrices * 2)[:2]
    if first.layout == "tiles8":
        return TileWeights(w=(packed(first), packed(second)))
    return RowWeights(w=(first.tensor, second.tensor))


def group_bytes(levels: int) -> int:
    return 32 * levels + 16


def fixed_bytes(b: Ne, levels: int) -> int:
    """Bytes of b in fixed point."""
    return rows_in(b) * (b[0] // 32) * group_bytes(levels)


def quantize(call: Call, b: Operand, levels: int) -> np.uint64:
    """b in fixed point, for `vec`; call["fixed"] where an earlier step has left it."""
    fixed = call.get("fixed")
    if fixed is not None:
        return fixed.pointer
    out = np.uint64(call.scratch(fixed_bytes(b.ne, levels)))
    launch_quantize(call, b, out, levels)
    return out


def launch_quantize(call: Call, b: Operand, out: np.uint64, levels: int) -> None:
    groups, columns = b.ne[0] // 32, rows_in(b.ne)
    call.launch(
        VEC,
        f"quantize<{C_TYPES[b.dtype.name]}, {levels}>",
        grid=blocks_for(columns * groups * 8),
        block=256,
        args=[b.tensor, out, np.int32(groups), np.int64(columns)],
    )


def padded(k: int) -> int:
    return -(-k // DEPTH) * DEPTH


def to_halves(call: Call, b: Operand, half: str) -> tuple[np.uint64, np.uint64]:
    """b for `tile`: scaled numbers, and the scales."""
    columns = rows_in(b.ne)
    out = np.uint64(call.scratch(columns * padded(b.ne[0]) * 2))
    scales = np.uint64(call.scratch(columns * 4))
    call.launch(
        PREPARE,
        f"to_halves<{C_TYPES[b.dtype.name]}, {half}>",
        grid=columns,
        block=128,
        args=[b.tensor, out, scales, np.int32(padded(b.ne[0]))],
    )
    return out, scales


def tile_scratch(b: Ne) -> int:
    return aligned(rows_in(b) * padded(b[0]) * 2, rows_in(b) * 4)


def warps_for(groups: int, blocks: int) -> int:
    """Warps that share the rows of a block: enough to fill a GPU, each lane with two groups."""
    wanted = 8 if blocks <= 512 else 4 if blocks <= 1536 else 2
    return min(wanted, max(1, groups // 8))


def vec(call: Call, a: tuple[Operand, ...], b: Operand, y: Operand, levels: int) -> None:
    """`vec`, of one matrix or of up and gate."""
    x = quantize(call, b, levels)
    shape, tiles = shape_of(a[0].ne, b.ne), -(-a[0].ne[1] // 8)
    one = levels == 2 and len(a) == 1
    some = next((n for n in ((1, 2, 4, 8) if one else (1, 8)) if n >= shape.columns), FEW)
    pair = 2 if one and tiles >= 1024 else 1  # tiles of rows that share the loading of b
    grid = -(-tiles // pair), -(-shape.columns // some), shape.batches
    call.launch(
        VEC,
        f"vec<{cpp_format(a[0])}, {some}, {levels}, {len(a)}, {pair}>",
        grid=grid,
        block=(32, max(warps_for(a[0].ne[0] // 32, prod(grid)), 8 * some * len(a) * pair // 32)),
        args=[weights_of(*a), x, y.tensor, shape.heads, is_narrow(y), act_of(call)],
    )


def tile_columns(columns: int) -> int:
    return 32 if columns <= 32 else 64 if columns <= 64 else 128


def tile_shared(columns: int) -> int:
    """Bytes of shared memory: four stages, and what aligning them can cost."""
    return 4 * columns * DEPTH * 2 + 1024


def splits_of(a: Ne, b: Ne) -> int:
    """How many blocks of `tile` share the k of a tile, so that a GPU has two on a multiprocessor
    and none has less than 4 steps. The same on every GPU: so are its sums."""
    shape = shape_of(a, b)
    if shape.columns > 128:
        return 1
    tiles = -(-a[1] // 128) * -(-shape.columns // 64) * shape.batches
    return max(1, min(2 * H200.sms // tiles, padded(a[0]) // DEPTH // 4))


def split_scratch(a: Ne, b: Ne) -> int:
    """Bytes of the sums of all splits."""
    splits = splits_of(a, b)
    return aligned(4 * a[1] * rows_in(b) * splits) if splits > 1 else 0


def tile(call: Call, a: tuple[Operand, ...], b: Operand, y: Operand) -> None:
    """`tile`, of one matrix or of up and gate."""
    shape = shape_of(a[0].ne, b.ne)
    some, splits = tile_columns(shape.columns), 1 if len(a) == 2 else splits_of(a[0].ne, b.ne)
    sums, count = y, rows_in(b.ne)
    if splits > 1:
        some, ptr = min(some, 64), call.scratch(4 * y.ne[0] * count * splits)
        sums = dense(ptr, (y.ne[0], count * splits, 1, 1), F32)
    columns = Columns(tiles=0, n_tiles=0, order=0, heads=shape.heads, routing=NO_ROUTING)
    grid = -(-shape.columns // some), shape.batches
    launch_tile(call, cpp_format(a[0]), a, b, sums, some, columns, grid, splits=splits)
    if splits > 1:
        call.launch(
            PREPARE,
            "add_splits",
            grid=blocks_for(y.ne[0] * count),
            block=256,
            args=[sums.pointer, y.tensor, np.int32(splits), np.uint32(count), is_narrow(y)],
        )


def launch_tile(
    call: Call,
    form: str,
    a: tuple[Operand, ...],
    b: Operand,
    y: Operand,
    some: int,
    columns: Columns,
    grid: tuple[int, int],
    routed: bool = False,
    splits: int = 1,
) -> None:
    x, scales = to_halves(call, b, half_of(a[0].dtype))
    call.launch(
        TILE,
        f"tile<{form}, {len(a)}, {some}, {str(routed).lower()}>",
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
        ],
        shared=tile_shared(some),
    )

"""Products with weights of block types, decoded in the kernels."""

from __future__ import annotations

import struct
from math import prod

import numpy as np

from pyggml.backends.cuda.geometry import C_TYPES, blocks_for
from pyggml.backends.cuda.launch import H200, Call, Operand, Value
from pyggml.backends.cuda.linear.common import (
    FEW,
    PREPARE,
    VEC,
    act_of,
    aligned,
    dense,
    is_few,
    is_narrow,
    rows_in,
    shape_of,
)
from pyggml.backends.cuda.weights.packing import packed
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


def matrix_of(a: Operand) -> Value:
    """One struct of `Weights`."""
    return packed(a) if a.layout == "tiles8" else a.tensor


def weights_of(*matrices: Operand) -> Value:
    """The struct `Weights`: the second is the first again where there is one."""
    return Value(b"".join(matrix_of(m).data for m in (matrices * 2)[:2]))


def group_bytes(levels: int) -> int:
    return 32 * levels + 16


def fixed_bytes(b: Ne, levels: int) -> int:
    """Bytes of b in fixed point."""
    return rows_in(b) * (b[0] // 32) * group_bytes(levels)


def quantize(call: Call, b: Operand, levels: int) -> np.uint64:
    """b in fixed point, for `vec`; the last source where an earlier step has left it."""
    if is_prepared(call):
        return call.operand(-1).pointer
    out = np.uint64(call.scratch(fixed_bytes(b.ne, levels)))
    launch_quantize(call, b, out, levels)
    return out


def is_prepared(call: Call) -> bool:
    """Whether the step has a source more than its op: b in fixed point."""
    return len(call.src) > len(call.node.src)


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


def vec_scratch(b: Ne, levels: int = 2) -> int:
    return aligned(fixed_bytes(b, levels))


def tile_scratch(b: Ne) -> int:
    return aligned(rows_in(b) * padded(b[0]) * 2, rows_in(b) * 4)


def warps_for(groups: int, blocks: int) -> int:
    """Warps that share the rows of a block: enough to fill a GPU, each lane with two groups."""
    wanted = 8 if blocks <= 512 else 4 if blocks <= 1536 else 2
    return min(wanted, max(1, groups // 8))


def few_columns(call: Call, a: tuple[Operand, ...], b: Operand, y: Operand, levels: int) -> None:
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


def many_columns(call: Call, a: tuple[Operand, ...], b: Operand, y: Operand) -> None:
    """`tile`, of one matrix or of up and gate."""
    shape = shape_of(a[0].ne, b.ne)
    some, splits = tile_columns(shape.columns), 1 if len(a) == 2 else splits_of(a[0].ne, b.ne)
    sums, count = y, rows_in(b.ne)
    if splits > 1:
        some, ptr = min(some, 64), call.scratch(4 * y.ne[0] * count * splits)
        sums = dense(ptr, (y.ne[0], count * splits, 1, 1), F32)
    # The struct `Columns`, its routing unused.
    columns = Value(struct.pack("<24x3i68x", shape.a2, shape.r3, shape.columns))
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
    columns: Value,
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


def product(call: Call, a: tuple[Operand, ...], b: Operand, y: Operand, exact: bool) -> None:
    if is_few(a[0].ne, b.ne, exact):
        few_columns(call, a, b, y, 3 if exact else 2)
    else:
        many_columns(call, a, b, y)

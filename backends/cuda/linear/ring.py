"""Products with many columns on 9.0a: linear_ring.cu."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from pyggml.backends.cuda.argument import Struct, Tensor
from pyggml.backends.cuda.device.tensormap import EMPTY, TensorMap, tensor_map
from pyggml.backends.cuda.gpu import Device
from pyggml.backends.cuda.launch import ABSENT, Call, Operand
from pyggml.backends.cuda.linear.common import Columns, act_of, is_narrow, limit_of, rows_in
from pyggml.backends.cuda.linear.halves import CLASS, DEPTH, half_of, padded
from pyggml.backends.cuda.weights.formats import FORMATS, Format
from pyggml.backends.cuda.weights.packing import GROUP, TILE, Tiles, tiles_of
from pyggml.dtypes import DType
from pyggml.spec import Ne

RING = "linear_ring.cu"
#: The most columns of a tile, where experts have many and where they have few.
COLUMNS, FEW = 256, 64
#: Rows of weights of a tile; with up and gate, of both together.
ROWS = 128
#: The most stages of a ring; bytes of shared memory that are not stages.
MOST_STAGES, OTHER = 16, 6656
#: Bytes of short rows on their way from registers.
HANDED = 1 << 14


class RingArgument(Struct):
    """The struct `RingArgument` of linear_ring.cu. `pad` aligns the maps to 64 bytes: kernel
    parameters start at 0x210 on 9.0."""

    _fields_ = (
        ("pad", ctypes.c_uint64 * 6),
        ("planes", TensorMap * 8),
        ("x", TensorMap),
        ("scales", ctypes.c_uint64),
        ("y", Tensor),
        ("columns", Columns),
        ("n_rows", ctypes.c_int32),
        ("row_tiles", ctypes.c_int32),
        ("matrix_tiles", ctypes.c_int32),
        ("box", ctypes.c_int32),
        ("column_tiles", ctypes.c_int32),
        ("batches", ctypes.c_int32),
        ("steps", ctypes.c_int32),
        ("stages", ctypes.c_int32),
        ("narrow", ctypes.c_int32),
        ("act", ctypes.c_int32),
        ("limited", ctypes.c_int32),
        ("limit", ctypes.c_float),
        ("own_scales", ctypes.c_uint64),
        ("are_long", ctypes.c_uint64),
        ("second_y", Tensor),
        ("second_rows", ctypes.c_int32),
        ("first_tiles", ctypes.c_int32),
    )


def can_ring(call: Call, a: tuple[Operand, ...], y: Operand) -> bool:
    """Whether the kernel can compute the product: the GPU has its instructions, the weights are in
    tiles without grids, two adjacent results can be written at once, and the places of results, in
    words of 4 bytes, fit into 32 bits."""
    return (
        call.device.arch == "90a"
        and a[0].layout == "tiles8"
        and can_take(a[0].dtype, a[0].ne)
        and y.nb[0] == y.dtype.nbytes
        and y.aligned(2 * y.dtype.nbytes)
        and sum((n - 1) * step for n, step in zip(y.ne, y.nb)) < 4 << 32
    )


def can_take(dtype: DType, a: Ne) -> bool:
    """Whether the kernel can read weights of this type and these sizes in tiles."""
    form = FORMATS.get(dtype.name)
    return form is not None and form.codes >= 16 and a[0] % DEPTH == 0 and a[1] % 2 == 0


def can_order(width: int) -> bool:
    """Whether experts can take columns from lists of up to `width`."""
    return width <= FEW or width == COLUMNS


def tiles_for(*rows: int) -> int:
    """Tiles of the rows of one matrix, or of several that a launch multiplies one after another."""
    return sum(-(-n // ROWS) for n in rows)


def width_of(row_tiles: int, columns: int, batches: int, device: Device) -> int:
    """Columns of a tile: those with which the blocks of a GPU end soonest, by times on an H100. A
    result does not depend on it."""

    def time(width: int) -> int:
        tiles = row_tiles * -(-columns // width) * batches
        return -(-tiles // device.sms) * (width + 96)

    return min((256, 192, 128), key=time)


def launch(
    call: Call,
    a: tuple[Operand, ...],
    y: Operand,
    halves: tuple[np.uint64, np.uint64],
    columns: Columns,
    width: int,
    *,
    column_tiles: int = 0,
    batches: int = 1,
    short: bool = False,
    handed: tuple[int, int] = (0, 0),
    second: tuple[Operand, Operand] | None = None,
) -> None:
    """Record the product.

    halves        a row of activations for each row of y, as `launch_halves` returns them; in the
                  order of experts if these take the columns
    width         the most columns of a tile
    column_tiles  of a batch, 0 if experts take the columns, in lists of up to `width`
    short         write short rows (short_rows.cuh), and none for pairs without an expert
    handed        addresses of own_scales and are_long, if these rows are those of up and gate
    second        a second matrix for the same columns and its result, like the first ones in type
                  and in k; neither has batches
    """
    first, form, routed = a[0], FORMATS[a[0].dtype.name], column_tiles == 0
    sizes = Sizes.of(routed, width)
    box = sizes.most // 4 if routed else width
    tiles, k = tiles_of(first.dtype, first.ne), padded(first.ne[0])
    rows, scales = halves
    planes, x = [EMPTY] * 8, EMPTY
    if not call.names_only:
        for m, matrix in enumerate(a if second is None else (*a, second[0])):
            own = tiles_of(matrix.dtype, matrix.ne)
            planes[4 * m : 4 * m + 4] = plane_maps(matrix, form, own, sizes, len(a))
        kind = CLASS[half_of(first.dtype)]
        x = flat_map(int(rows), kind, 2, k, rows_in(y.ne), (DEPTH, box))
    more = HANDED if short else 0
    stages = sizes.stages(form, call.device, more)
    limit = limit_of(call.attrs, len(a))[1]
    first_tiles = row_tiles = -(-first.ne[1] * len(a) // sizes.rows)
    second_y, second_rows = ABSENT.tensor, 0
    if second is not None:
        second_y, second_rows = second[1].tensor, second[0].ne[1]
        row_tiles += tiles_for(second_rows)
    argument = RingArgument(
        pad=(0,) * 6,
        planes=tuple(planes),
        x=x,
        scales=int(scales),
        y=y.tensor,
        columns=columns,
        n_rows=first.ne[1],
        row_tiles=row_tiles,
        matrix_tiles=tiles.tiles,
        box=box,
        column_tiles=column_tiles,
        batches=batches,
        steps=k // DEPTH,
        stages=stages,
        narrow=2 if short else int(is_narrow(y)),
        act=int(act_of(call)),
        limited=len(limit),
        limit=float(limit[0]) if limit else 0.0,
        own_scales=handed[0],
        are_long=handed[1],
        second_y=second_y,
        second_rows=second_rows,
        first_tiles=first_tiles,
    )
    call.launch(
        RING,
        f"ring<{first.dtype.name}, {len(a)}, {str(routed).lower()}{sizes.name}>",
        grid=call.device.sms
        if routed
        else min(call.device.sms, row_tiles * column_tiles * batches),
        block=sizes.threads,
        args=[argument],
        shared=sizes.shared(form, stages) + more,
    )


@dataclass(frozen=True, slots=True)
class Sizes:
    """What depends on the most columns of a tile; `Sizes` of linear_ring.cu.

    rows   of weights of a tile
    parts  of 64 values of k in a stage
    """

    most: int
    rows: int
    parts: int

    @staticmethod
    def of(routed: bool, width: int) -> Sizes:
        if routed and width <= FEW:
            return Sizes(32 if width <= 32 else FEW, 2 * ROWS, 2)
        return Sizes(COLUMNS, ROWS, 1)

    @property
    def name(self) -> str:
        """The last template argument."""
        return "" if self.most == COLUMNS else f", {self.most}"

    @property
    def threads(self) -> int:
        """A warpgroup that fetches, and one for every 64 rows."""
        return 128 + 2 * self.rows

    def stage(self, form: Format) -> int:
        """Bytes of a stage: activations of all columns, and weights, whose blocks are not cut."""
        depth, group = self.parts * DEPTH, form.codes + form.high + form.scale
        return self.most * depth * 2 + self.rows * (depth // GROUP * group + form.super_)

    def shared(self, form: Format, stages: int) -> int:
        """Bytes of the stages, of two scales a column, and to align them."""
        return stages * self.stage(form) + 2 * 4 * self.most + 1024

    def stages(self, form: Format, device: Device, more: int = 0) -> int:
        """As many stages as shared memory holds beside `more` bytes."""
        return min(MOST_STAGES, (device.shared - OTHER - more) // self.stage(form))


def flat_map(
    ptr: int, kind: str, size: int, n: int, rows: int, box: tuple[int, int], swizzle: bool = True
) -> TensorMap:
    """A map of `rows` contiguous rows of n elements of `size` bytes, in boxes of both."""
    row = size * n
    return tensor_map(ptr, kind, (n, rows, 1, 1), (size, row, row, row), (*box, 1, 1), swizzle)


def plane_maps(
    a: Operand, form: Format, tiles: Tiles, sizes: Sizes, matrices: int
) -> list[TensorMap]:
    """Maps of codes, high bits, scales and supers, each as [words of a tile, tiles of 8 rows]. A
    box has the words of a stage's values of k, or of a block."""
    count, groups = tiles.tiles * tiles.matrices, sizes.parts * DEPTH // GROUP

    def plane(start: int, width: int, units: int, box: int) -> TensorMap:
        if width == 0:
            return EMPTY
        words = TILE * width // 4
        boxes = box * words, sizes.rows // TILE // matrices
        return flat_map(a.ptr + start, "u32", 4, units * words, count, boxes, swizzle=False)

    codes, high, scales, supers = tiles.starts
    return [
        plane(codes, form.codes, tiles.groups, groups),
        plane(high, form.high, tiles.groups, groups),
        plane(scales, form.scale, tiles.groups, groups),
        plane(supers, form.super_, tiles.blocks, 1),
    ]

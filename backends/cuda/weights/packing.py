"""How weights of block types are kept for the products: layout "tiles8" of kernels/formats.cuh."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.base import WeightLayout
from pyggml.backends.cuda.launch import Operand, Struct
from pyggml.backends.cuda.table import ALIGNMENT
from pyggml.backends.cuda.weights.bits import Bytes
from pyggml.backends.cuda.weights.formats import FORMATS
from pyggml.dtypes import DType
from pyggml.node import Ne, Node

TILE = 8  # rows
GROUP = 32  # weights
SUPER = 8  # groups
#: Weights packed at once: some of the steps need a few bytes for each.
PIECE = 1 << 22


class Packed(Struct):
    """The struct `Packed` of formats.cuh: addresses of a weight's planes, and sizes."""

    _fields_ = (
        ("codes", ctypes.c_uint64),
        ("high", ctypes.c_uint64),
        ("scales", ctypes.c_uint64),
        ("supers", ctypes.c_uint64),
        ("rows", ctypes.c_int32),
        ("tiles", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("super_groups", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True)
class Tiles:
    """Sizes of a weight in tiles: planes begin at `starts`, after codes, high, scales, supers."""

    rows: int
    tiles: int
    groups: int
    super_groups: int
    matrices: int
    starts: tuple[int, int, int, int]
    nbytes: int

    def at(self, ptr: int) -> Packed:
        """The argument for a weight at that address."""
        codes, high, scales, supers = (ptr + start for start in self.starts)
        return Packed(
            codes=codes,
            high=high,
            scales=scales,
            supers=supers,
            rows=self.rows,
            tiles=self.tiles,
            groups=self.groups,
            super_groups=self.super_groups,
        )


def tiles_of(kind: DType, ne: Ne) -> Tiles:
    """How a weight of a type of `FORMATS` lies in tiles."""
    form = FORMATS[kind.name]
    tiles, groups, matrices = -(-ne[1] // TILE), ne[0] // GROUP, ne[2] * ne[3]
    supers = -(-groups // SUPER)
    per_group = matrices * tiles * groups * TILE
    sizes = (
        per_group * form.codes,
        per_group * form.high,
        per_group * form.scale,
        matrices * tiles * supers * TILE * form.super_,
    )
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    one, two, three, four = starts
    return Tiles(ne[1], tiles, groups, supers, matrices, (one, two, three, four), end)


def layout_of(constant: Node, uses: Collection[Node]) -> WeightLayout:
    """Tiles for a block type that only products read."""
    if constant.dtype.kind == "block" and all(_reads_tiles(use, constant) for use in uses):
        return WeightLayout(tiles_of(constant.dtype, constant.ne).nbytes, "tiles8")
    return WeightLayout(constant.spec.nbytes)


def _reads_tiles(use: Node, constant: Node) -> bool:
    names = {name for name in use.op.operands if use.get(name) is constant}
    return bool(use.op.weights) and names <= set(use.op.weights)


def repack(constant: Node, layout: WeightLayout, data: NDArray[Any]) -> Bytes:
    """The bytes of the layout "tiles8", from the rows of a file."""
    kind, ne = constant.dtype, constant.ne
    flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return to_tiles(kind, ne, flat.reshape(-1, ne[0] // kind.block, kind.nbytes))


def to_tiles(kind: DType, ne: Ne, blocks: Bytes) -> Bytes:
    """uint8 [rows of all matrices, blocks, bytes of a block] in tiles."""
    form, tiles = FORMATS[kind.name], tiles_of(kind, ne)
    out = np.zeros(tiles.nbytes, np.uint8)
    widths = (form.codes, form.high, form.scale, form.super_)
    planes = []
    for i, (start, width) in enumerate(zip(tiles.starts, widths)):
        count = tiles.super_groups if i == 3 else tiles.groups
        shape = (tiles.matrices, tiles.tiles, count, TILE, width)
        size = int(np.prod(shape))
        planes.append(out[start : start + size].reshape(shape))
    for matrix, tile, rows in _pieces(tiles, ne):
        parts = form.parts(blocks[rows].reshape(-1, kind.nbytes))
        n = rows.stop - rows.start
        for i, (plane, part) in enumerate(zip(planes, parts)):
            if plane.shape[-1]:
                _place(plane[matrix, tile], part.reshape(n, plane.shape[2], -1), i == 0)
    return out


def _pieces(tiles: Tiles, ne: Ne) -> Iterator[tuple[int, slice, slice]]:
    """(matrix, its tiles, rows of all matrices) of at most `PIECE` weights."""
    some = max(1, PIECE // (ne[0] * TILE))
    for matrix in range(tiles.matrices):
        for t in range(0, tiles.tiles, some):
            first, last = t * TILE, min((t + some) * TILE, tiles.rows)
            base = matrix * tiles.rows
            yield matrix, slice(t, t + some), slice(base + first, base + last)


def _place(plane: Bytes, part: Bytes, codes: bool) -> None:
    """[rows, groups, width] into [tiles, groups, 8, width]; runs of codes stand apart."""
    n, groups, width = part.shape
    full = n // TILE
    runs = max(1, width // 16) if codes else 1
    apart = plane.reshape(len(plane), groups, runs, TILE, width // runs)
    whole = part[: full * TILE].reshape(full, TILE, groups, runs, width // runs)
    apart[:full] = whole.transpose(0, 2, 3, 1, 4)
    if n % TILE:
        rest = part[full * TILE :].reshape(-1, groups, runs, width // runs)
        apart[full, :, :, : len(rest)] = rest.transpose(1, 2, 0, 3)


def packed(a: Operand) -> Packed:
    """The argument for a weight kept in tiles."""
    return tiles_of(a.dtype, a.ne).at(a.ptr)

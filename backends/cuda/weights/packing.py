"""Packing weights of block types for the products: layout "tiles8" of
kernels/include/formats.cuh.

This packer is the reference for kernels/pack.cu, which packs weights that stay on the GPU. It packs
those that stay on the host and are uploaded in every run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.cuda.argument import Struct
from pyggml.backends.cuda.launch import Operand
from pyggml.backends.cuda.table import ALIGNMENT
from pyggml.backends.cuda.weights.bits import Bytes
from pyggml.backends.cuda.weights.formats import FORMATS
from pyggml.backends.processors import n_processors
from pyggml.backends.step import WeightLayout
from pyggml.dtypes import DType
from pyggml.node import Node
from pyggml.ops import cast, reshape
from pyggml.spec import Ne

TILE = 8  # rows
GROUP = 32  # weights
#: Weights that a thread packs at a time. Some steps need several bytes of memory per weight; with
#: smaller pieces, threads wait for the interpreter: 16 threads pack 1.7 GB/s, and half as much with
#: a quarter of the size.
PIECE = 1 << 21


class Packed(Struct):
    """The struct `Packed` of formats.cuh: the addresses of a weight's planes, and its sizes."""

    _fields_ = (
        ("codes", ctypes.c_uint64),
        ("high", ctypes.c_uint64),
        ("scales", ctypes.c_uint64),
        ("supers", ctypes.c_uint64),
        ("rows", ctypes.c_int32),
        ("tiles", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("blocks", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True)
class Tiles:
    """The sizes of a weight in tiles. `groups`, `blocks`: per row; `starts`: offsets of its planes
    codes, high, scales, supers."""

    rows: int
    tiles: int
    groups: int
    blocks: int
    matrices: int
    starts: tuple[int, int, int, int]
    nbytes: int

    def at(self, ptr: int) -> Packed:
        """The kernel argument for a weight at address `ptr`."""
        codes, high, scales, supers = (ptr + start for start in self.starts)
        return Packed(
            codes=codes,
            high=high,
            scales=scales,
            supers=supers,
            rows=self.rows,
            tiles=self.tiles,
            groups=self.groups,
            blocks=self.blocks,
        )


def tiles_of(dtype: DType, ne: Ne) -> Tiles:
    """The tiles of a weight whose type is in `FORMATS`."""
    form = FORMATS[dtype.name]
    tiles, groups, matrices = -(-ne[1] // TILE), ne[0] // GROUP, ne[2] * ne[3]
    blocks = ne[0] // dtype.block
    per_group = matrices * tiles * groups * TILE
    sizes = (
        per_group * form.codes,
        per_group * form.high,
        per_group * form.scale,
        matrices * tiles * blocks * TILE * form.super_,
    )
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    codes, high, scales, shared = starts
    return Tiles(ne[1], tiles, groups, blocks, matrices, (codes, high, scales, shared), end)


def layout_of(constant: Node, uses: Collection[Node]) -> WeightLayout:
    """The layout of a constant: tiles if it has a block type and all that reads it can read tiles,
    else plain.

    Which of the readers are in a plan does not matter, so a prompt's plan, which may cast a weight
    or multiply its rows as one matrix, shares the tensor of the plan that decodes.
    """
    if constant.dtype.kind == "block" and _all_read_tiles(constant, uses):
        return WeightLayout(tiles_of(constant.dtype, constant.ne).nbytes, "tiles8")
    return WeightLayout(constant.spec.nbytes)


def _all_read_tiles(constant: Node, uses: Collection[Node]) -> bool:
    shown = {constant: False}  # the constant and reshapes of it -> whether something reads them
    for use in uses:
        names = [name for name in use.op.operands if use.get(name) in shown]
        for name in names:
            shown[use[name]] = True
        if use.op is reshape and _same_tiles(constant.ne, use.ne):
            shown[use] = False
        elif use.op is cast:
            if use.dtype.kind != "float":
                return False
        elif not use.op.weights or not set(names) <= set(use.op.weights):
            return False
    return all(shown.values())  # what nothing reads is an output


def _same_tiles(a: Ne, b: Ne) -> bool:
    """Whether the same rows are in the same tiles if a weight of size `a` has size `b`."""
    return a[0] == b[0] and (a[1] == b[1] or a[1] % TILE == b[1] % TILE == 0)


def repack(constant: Node, layout: WeightLayout, data: NDArray[Any]) -> Bytes:
    """The bytes of the layout "tiles8", from rows as in a file."""
    dtype, ne = constant.dtype, constant.ne
    flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return to_tiles(dtype, ne, flat.reshape(-1, ne[0] // dtype.block, dtype.nbytes))


def to_tiles(dtype: DType, ne: Ne, blocks: Bytes) -> Bytes:
    """Pack uint8 [rows of all matrices, blocks, bytes of a block] into tiles, on all cores."""
    form, tiles = FORMATS[dtype.name], tiles_of(dtype, ne)
    out = np.zeros(tiles.nbytes, np.uint8)
    widths = (form.codes, form.high, form.scale, form.super_)
    planes = []
    for i, (start, width) in enumerate(zip(tiles.starts, widths)):
        count = tiles.blocks if i == 3 else tiles.groups
        shape = (tiles.matrices, tiles.tiles, count, TILE, width)
        size = int(np.prod(shape))
        planes.append(out[start : start + size].reshape(shape))

    def pack(piece: tuple[int, slice, slice]) -> None:
        matrix, tile, rows = piece
        parts = form.parts(blocks[rows].reshape(-1, dtype.nbytes))
        n = rows.stop - rows.start
        for i, (plane, part) in enumerate(zip(planes, parts)):
            if plane.shape[-1]:
                _place(plane[matrix, tile], part.reshape(n, plane.shape[2], -1), i == 0)

    with ThreadPoolExecutor(n_processors()) as pool:  # NumPy works without the interpreter's lock
        for _ in pool.map(pack, _pieces(tiles, ne)):
            pass  # raises what `pack` raised
    return out


def _pieces(tiles: Tiles, ne: Ne) -> Iterator[tuple[int, slice, slice]]:
    """Pieces of at most `PIECE` weights: (matrix, its tiles, rows counted over all matrices)."""
    step = max(1, PIECE // (ne[0] * TILE))
    for matrix in range(tiles.matrices):
        for t in range(0, tiles.tiles, step):
            first, last = t * TILE, min((t + step) * TILE, tiles.rows)
            base = matrix * tiles.rows
            yield matrix, slice(t, t + step), slice(base + first, base + last)


def _place(plane: Bytes, part: Bytes, codes: bool) -> None:
    """Copy [rows, groups, width] into [tiles, groups, 8, width], with each run of codes
    separate."""
    n, groups, width = part.shape
    full = n // TILE
    runs = max(1, width // 16) if codes else 1
    apart = plane.reshape(len(plane), groups, runs, TILE, width // runs)
    whole = part[: full * TILE].reshape(full, TILE, groups, runs, width // runs)
    apart[:full] = whole.transpose(0, 2, 3, 1, 4)
    if n % TILE:
        tail = part[full * TILE :].reshape(-1, groups, runs, width // runs)
        apart[full, :, :, : len(tail)] = tail.transpose(1, 2, 0, 3)


def packed(a: Operand) -> Packed:
    """The kernel argument for a weight stored in tiles."""
    return tiles_of(a.dtype, a.ne).at(a.ptr)

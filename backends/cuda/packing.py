"""How weights of block types are kept for the products: layout "tiles8" of kernels/formats.cuh."""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pyggml import ops, quants
from pyggml.backends.base import WeightLayout
from pyggml.backends.cuda.launch import Operand, Value
from pyggml.backends.cuda.table import ALIGNMENT
from pyggml.dtypes import DType
from pyggml.graph import Ne, Node

Bytes: TypeAlias = NDArray[np.uint8]

#: Ops that read tiles, and which of their sources are weights.
READERS = {
    ops.mul_mat: (0,),
    ops.fused_up_gate: (0, 1),
    ops.mul_mat_id: (0,),
    ops.moe_up_gate: (0, 1),
}
TILE = 8  # rows
GROUP = 32  # weights
SUPER = 8  # groups
#: Weights packed at once: some of the steps need a byte for each.
PIECE = 1 << 24


@dataclass(frozen=True, slots=True)
class Format:
    """What a group of 32 weights of a type is made of, and how to take it out of blocks.

    code_runs, high, scale, super_  16-byte runs of codes; bytes of high bits, of a group's scale,
                                    of what 8 groups share
    parts  uint8 [n, bytes of a block] -> codes [n, groups, 16 code_runs], high [n, groups, high],
           scale [n, groups, scale], super [n, super]
    """

    code_runs: int
    high: int
    scale: int
    super_: int
    parts: Callable[[Bytes], tuple[Bytes, Bytes, Bytes, Bytes]]


def _none(b: Bytes, *shape: int) -> Bytes:
    return np.empty((len(b), *shape, 0), np.uint8)


def _interleave(nibbles: Bytes) -> Bytes:
    """Bytes of two codes (weights i, i + 16) as 32-bit words with one code of each in a nibble: low
    halves in the low 16 bits. Types with a table want it."""
    first, second = nibbles[..., 0::2], nibbles[..., 1::2]
    words = np.empty_like(nibbles)
    low, high = (first & 15) | (second << 4), (first >> 4) | (second & 0xF0)
    words[..., 0::4], words[..., 1::4] = low[..., 0::2], low[..., 1::2]
    words[..., 2::4], words[..., 3::4] = high[..., 0::2], high[..., 1::2]
    return words


def _high_bits(bits: Bytes) -> Bytes:
    """One bit for each of 32 weights as bytes: bit w of byte i belongs to weight 4 w + i."""
    words = bits.reshape(*bits.shape[:-1], 8, 4).swapaxes(-1, -2)
    return np.asarray(np.packbits(words, axis=-1, bitorder="little")[..., 0], np.uint8)


def _small(b: Bytes, *, scale: int, high: bool = False, table: bool = False) -> tuple[Bytes, ...]:
    """Blocks of 32: a scale (and minimum), perhaps fifth bits, nibbles."""
    nibbles = b[:, None, -16:]
    bits = _none(b, 1)
    if high:
        bits = _high_bits(np.unpackbits(b[:, None, -20:-16], axis=-1, bitorder="little"))
    codes = _interleave(nibbles) if table else nibbles
    return codes, bits, b[:, None, :scale], _none(b)


def _q8_0(b: Bytes) -> tuple[Bytes, ...]:
    return b[:, None, 2:], _none(b, 1), b[:, None, :2], _none(b)


def _halves(codes: Bytes) -> Bytes:
    """Codes of 32 weights, a byte each, as 16 bytes of two nibbles."""
    return np.asarray(codes[..., :16] | (codes[..., 16:] << 4), np.uint8)


def _q45_k(b: Bytes, *, high: bool) -> tuple[Bytes, ...]:
    field = b[:, -128:].reshape(-1, 4, 32)
    codes = np.stack([field & 15, field >> 4], axis=2).reshape(-1, 8, 32)
    bits = _none(b, 8)
    if high:
        bits = np.asarray(b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1, np.uint8)
        bits = _high_bits(bits)
    first, last = b[:, 4:12].reshape(-1, 2, 4), b[:, 12:16]
    low = np.stack([last & 15, last >> 4], axis=1)
    scales = np.concatenate([first & 63, low | (first >> 2 & 48)], axis=2)
    return _halves(codes), bits, scales.swapaxes(1, 2), b[:, :4]


def _q6_k(b: Bytes) -> tuple[Bytes, ...]:
    field = b[:, :128].reshape(-1, 2, 64)
    codes = np.stack([field & 15, field >> 4], axis=2).reshape(-1, 8, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    two = (b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3).reshape(-1, 8, 2, 4, 4)
    high = (two << shifts).sum(axis=-2, dtype=np.uint8).reshape(-1, 8, 8)
    return _halves(codes), high, b[:, 192:208].reshape(-1, 8, 2), b[:, 208:]


def _iq4_xs(b: Bytes) -> tuple[Bytes, ...]:
    high = b[:, 2:4].view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = b[:, 4:8].repeat(2, axis=1) >> np.array([0, 4] * 4, np.uint8) & 15
    scales = np.asarray((low | high << 4) - 32 & 255, np.uint8)[..., None]
    return _interleave(b[:, 8:].reshape(-1, 8, 16)), _none(b, 8), scales, b[:, :2]


def _small_format(scale: int, high: bool = False, table: bool = False) -> Format:
    return Format(
        1, 4 * high, scale, 0, lambda b: _four(_small(b, scale=scale, high=high, table=table))
    )


def _four(parts: tuple[Bytes, ...]) -> tuple[Bytes, Bytes, Bytes, Bytes]:
    codes, high, scale, super_ = parts
    return codes, high, scale, super_


FORMATS: dict[str, Format] = {
    "q4_0": _small_format(2),
    "q4_1": _small_format(4),
    "q5_0": _small_format(2, high=True),
    "q5_1": _small_format(4, high=True),
    "q8_0": Format(2, 0, 2, 0, lambda b: _four(_q8_0(b))),
    "iq4_nl": _small_format(2, table=True),
    "mxfp4": _small_format(1, table=True),
    "q4_K": Format(1, 0, 2, 4, lambda b: _four(_q45_k(b, high=False))),
    "q5_K": Format(1, 4, 2, 4, lambda b: _four(_q45_k(b, high=True))),
    "q6_K": Format(1, 8, 2, 2, lambda b: _four(_q6_k(b))),
    "iq4_xs": Format(1, 0, 1, 2, lambda b: _four(_iq4_xs(b))),
}


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

    def at(self, ptr: int) -> Value:
        """The struct `Packed`."""
        planes = (ptr + start for start in self.starts)
        sizes = self.rows, self.tiles, self.groups, self.super_groups
        return Value(struct.pack("<4Q4i", *planes, *sizes))


def tiles_of(kind: DType, ne: Ne) -> Tiles:
    """How a weight of a type of `FORMATS` lies in tiles."""
    form = FORMATS[kind.name]
    tiles, groups, matrices = -(-ne[1] // TILE), ne[0] // GROUP, ne[2] * ne[3]
    supers = -(-groups // SUPER)
    per_group = matrices * tiles * groups * TILE
    sizes = (
        per_group * 16 * form.code_runs,
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
    """Tiles where only products read it; other block types as bf16 ("bf16": rows without gaps)."""
    kind = constant.dtype
    if kind.kind != "block":
        return WeightLayout(constant.spec.nbytes)
    if kind.name not in FORMATS:
        if any(use.op.view is not None for use in uses) or kind.name not in quants.DECODABLE:
            return WeightLayout(constant.spec.nbytes)
        return WeightLayout(2 * constant.spec.elements, "bf16")
    if all(_reads_tiles(use, constant) for use in uses):
        return WeightLayout(tiles_of(kind, constant.ne).nbytes, "tiles8")
    return WeightLayout(constant.spec.nbytes)


def _reads_tiles(use: Node, constant: Node) -> bool:
    places = READERS.get(use.op, ())
    return all(s is not constant or i in places for i, s in enumerate(use.src)) and bool(places)


def repack(constant: Node, layout: WeightLayout, data: NDArray[Any]) -> Bytes:
    """The bytes of a layout that is not "plain", from the rows of a file."""
    kind, ne = constant.dtype, constant.ne
    rows = ne[1] * ne[2] * ne[3]
    flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    blocks = flat.reshape(rows, ne[0] // kind.block, kind.nbytes)
    if layout.name == "bf16":
        out = np.empty((rows, ne[0]), np.uint16)
        some = max(1, PIECE // ne[0])
        for r in range(0, rows, some):
            out[r : r + some] = quants.encode("bf16", quants.decode(kind, blocks[r : r + some]))
        return out.reshape(-1).view(np.uint8)
    return to_tiles(kind, ne, blocks)


def to_tiles(kind: DType, ne: Ne, blocks: Bytes) -> Bytes:
    """uint8 [rows of all matrices, blocks, bytes of a block] in tiles."""
    form, tiles = FORMATS[kind.name], tiles_of(kind, ne)
    out = np.zeros(tiles.nbytes, np.uint8)
    widths = (16 * form.code_runs, form.high, form.scale, form.super_)
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
    runs = width // 16 if codes else 1
    apart = plane.reshape(len(plane), groups, runs, TILE, width // runs)
    whole = part[: full * TILE].reshape(full, TILE, groups, runs, width // runs)
    apart[:full] = whole.transpose(0, 2, 3, 1, 4)
    if n % TILE:
        rest = part[full * TILE :].reshape(-1, groups, runs, width // runs)
        apart[full, :, :, : len(rest)] = rest.transpose(1, 2, 0, 3)


def packed(a: Operand) -> Value:
    """The struct `Packed` of a weight kept in tiles."""
    return tiles_of(a.dtype, a.ne).at(a.ptr)

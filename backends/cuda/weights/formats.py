"""The parts of a group of 32 weights for each block type, as kernels/include/formats.cuh reads
them.

Codes and scales are those of the blocks in a different order, without rounding. Types that index a
grid (grids.py) keep the indices; tq1_0 stores 2 bits per code.

A block weight that only products read is kept in tiles of 8 rows, with codes and scales apart;
other weights stay as they are in the file. Kernels decode every block type exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np

from pyggml.backends.cuda.weights import grids
from pyggml.backends.cuda.weights.bits import (
    Bytes,
    fields_of_bits,
    fields_of_pairs,
    halves,
    high_bits,
    interleave,
    nibbles,
    pairs,
)

Parts: TypeAlias = tuple[Bytes, Bytes, Bytes, Bytes]


@dataclass(frozen=True, slots=True)
class Format:
    """The parts of a group of 32 weights, and how to extract them from blocks.

    codes, high, scale, super_  bytes per group of codes, of the bits above them and of its scale;
                                bytes that the groups of a block share
    parts  uint8 [n, bytes of a block] -> codes [n, groups, codes], high [n, groups, high],
           scale [n, groups, scale], super [n, super]
    """

    codes: int
    high: int
    scale: int
    super_: int
    parts: Callable[[Bytes], Parts]


def _none(b: Bytes, *shape: int) -> Bytes:
    return np.empty((len(b), *shape, 0), np.uint8)


# -- blocks of 32, 64 and 128 -------------------------------------------------------------------


def _small(b: Bytes, *, scale: int, high: bool = False, table: bool = False) -> Parts:
    """Blocks of 32: a scale (and minimum), fifth bits if `high`, nibbles."""
    low = b[:, None, -16:]
    bits = _none(b, 1)
    if high:
        bits = high_bits(np.unpackbits(b[:, None, -20:-16], axis=-1, bitorder="little"))
    return interleave(low) if table else low, bits, b[:, None, :scale], _none(b)


def _q8_0(b: Bytes) -> Parts:
    return b[:, None, 2:], _none(b, 1), b[:, None, :2], _none(b)


def _nvfp4(b: Bytes) -> Parts:
    """An 8-bit scale per 16 weights; 0x7F, which encodes NaN, counts as 0."""
    field = b[:, 4:].reshape(-1, 4, 8)
    codes = np.concatenate([field & 15, field >> 4], axis=2).reshape(-1, 2, 32)
    scales = np.where(b[:, :4] == 0x7F, 0, b[:, :4]).astype(np.uint8)
    return interleave(halves(codes)), _none(b, 2), scales.reshape(-1, 2, 2), _none(b)


def _q1_0(b: Bytes) -> Parts:
    bits = np.unpackbits(b[:, 2:].reshape(-1, 4, 4), axis=-1, bitorder="little")
    return high_bits(bits), _none(b, 4), _none(b, 4), b[:, :2]


# -- blocks of 256 ------------------------------------------------------------------------------


def _q2_k(b: Bytes) -> Parts:
    codes = pairs(fields_of_pairs(b[:, 16:80]))
    return codes, _none(b, 8), b[:, :16].reshape(-1, 8, 2), b[:, 80:]


def _q3_k(b: Bytes) -> Parts:
    shifts = np.array([[0], [2], [4], [6]], np.uint8)
    high = (b[:, None, 104:108] >> shifts & 3).reshape(-1, 16)
    low = np.concatenate([b[:, 96:104] & 15, b[:, 96:104] >> 4], axis=1)
    scales = ((low | high << 4) - 32 & 255).astype(np.uint8).reshape(-1, 8, 2)
    bits = high_bits(fields_of_bits(b[:, :32]))
    return pairs(fields_of_pairs(b[:, 32:96])), bits, scales, b[:, 108:]


def _q45_k(b: Bytes, *, high: bool) -> Parts:
    field = b[:, -128:].reshape(-1, 4, 32)
    codes = np.stack([field & 15, field >> 4], axis=2).reshape(-1, 8, 32)
    bits = high_bits(fields_of_bits(b[:, 16:48])) if high else _none(b, 8)
    first, last = b[:, 4:12].reshape(-1, 2, 4), b[:, 12:16]
    low = np.stack([last & 15, last >> 4], axis=1)
    scales = np.concatenate([first & 63, low | (first >> 2 & 48)], axis=2)
    return halves(codes), bits, scales.swapaxes(1, 2), b[:, :4]


def _q6_k(b: Bytes) -> Parts:
    field = b[:, :128].reshape(-1, 2, 64)
    codes = np.stack([field & 15, field >> 4], axis=2).reshape(-1, 8, 32)
    high = pairs(fields_of_pairs(b[:, 128:192]))
    return halves(codes), high, b[:, 192:208].reshape(-1, 8, 2), b[:, 208:]


def _iq4_xs(b: Bytes) -> Parts:
    high = b[:, 2:4].view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scales = np.asarray((nibbles(b[:, 4:8]) | high << 4) - 32 & 255, np.uint8)[..., None]
    return interleave(b[:, 8:].reshape(-1, 8, 16)), _none(b, 8), scales, b[:, :2]


# -- codes of three values ----------------------------------------------------------------------


def _tq2_0(b: Bytes) -> Parts:
    return pairs(fields_of_pairs(b[:, :64])), _none(b, 8), _none(b, 8), b[:, 64:]


def _tq1_0(b: Bytes) -> Parts:
    """Base-3 digits: a byte holds up to five, the first one highest. 32 bytes of 5, 16 of 5, 4 of
    4."""
    runs = ((b[:, :32], 5), (b[:, 32:48], 5), (b[:, 48:52], 4))
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]
    digits = [((run[:, None] * powers[:n]).astype(np.uint16) * 3 >> 8) for run, n in runs]
    codes = np.concatenate([d.reshape(len(b), -1) for d in digits], axis=1).astype(np.uint8)
    return pairs(codes.reshape(-1, 8, 32)), _none(b, 8), _none(b, 8), b[:, 52:]


# -- the table ----------------------------------------------------------------------------------


FORMATS: dict[str, Format] = {
    "q1_0": Format(4, 0, 0, 2, _q1_0),
    "q4_0": Format(16, 0, 2, 0, partial(_small, scale=2)),
    "q4_1": Format(16, 0, 4, 0, partial(_small, scale=4)),
    "q5_0": Format(16, 4, 2, 0, partial(_small, scale=2, high=True)),
    "q5_1": Format(16, 4, 4, 0, partial(_small, scale=4, high=True)),
    "q8_0": Format(32, 0, 2, 0, _q8_0),
    "iq4_nl": Format(16, 0, 2, 0, partial(_small, scale=2, table=True)),
    "mxfp4": Format(16, 0, 1, 0, partial(_small, scale=1, table=True)),
    "nvfp4": Format(16, 0, 2, 0, _nvfp4),
    "q2_K": Format(8, 0, 2, 4, _q2_k),
    "q3_K": Format(8, 4, 2, 2, _q3_k),
    "q4_K": Format(16, 0, 2, 4, partial(_q45_k, high=False)),
    "q5_K": Format(16, 4, 2, 4, partial(_q45_k, high=True)),
    "q6_K": Format(16, 8, 2, 2, _q6_k),
    "iq4_xs": Format(16, 0, 1, 2, _iq4_xs),
    "tq1_0": Format(8, 0, 0, 2, _tq1_0),
    "tq2_0": Format(8, 0, 0, 2, _tq2_0),
    **{
        name: Format(codes, high, scale, 2, parts)
        for name, (codes, high, scale, parts) in grids.PACKERS.items()
    },
}

"""Conversions between packed bits of codes and one byte per code, for the formats of packing.py."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]


def halves(codes: Bytes) -> Bytes:
    """Codes of 32 weights, one byte each, packed into 16 bytes of two nibbles."""
    return np.asarray(codes[..., :16] | (codes[..., 16:] << 4), np.uint8)


def interleave(nibbles: Bytes) -> Bytes:
    """Reorder bytes of two codes (weights i, i + 16) into 32-bit words whose low 16 bits hold the
    low nibbles of four bytes and whose high 16 bits the high ones, as decoders with a table
    need."""
    first, second = nibbles[..., 0::2], nibbles[..., 1::2]
    words = np.empty_like(nibbles)
    low, high = (first & 15) | (second << 4), (first >> 4) | (second & 0xF0)
    words[..., 0::4], words[..., 1::4] = low[..., 0::2], low[..., 1::2]
    words[..., 2::4], words[..., 3::4] = high[..., 0::2], high[..., 1::2]
    return words


def high_bits(bits: Bytes) -> Bytes:
    """One bit per weight of 32, packed into 4 bytes: bit w of byte i belongs to weight 4 w + i."""
    words = bits.reshape(*bits.shape[:-1], 8, 4).swapaxes(-1, -2)
    return np.asarray(np.packbits(words, axis=-1, bitorder="little")[..., 0], np.uint8)


def pairs(codes: Bytes) -> Bytes:
    """Two bits per weight of 32, packed into 8 bytes: in the first four, bits 2 w and 2 w + 1 of
    byte i belong to weight 4 w + i; the other four hold weights 16 to 31."""
    words = codes.reshape(*codes.shape[:-1], 2, 4, 4) << np.array([[0], [2], [4], [6]], np.uint8)
    return np.asarray(np.bitwise_or.reduce(words, axis=-2), np.uint8).reshape(*codes.shape[:-1], 8)


def fields_of_pairs(b: Bytes) -> Bytes:
    """The codes [n, 8, 32] of 64 bytes of 2-bit codes: 4 runs of 32 in 32 bytes."""
    shifts = np.array([[0], [2], [4], [6]], np.uint8)
    return np.asarray(b.reshape(-1, 2, 1, 32) >> shifts & 3, np.uint8).reshape(-1, 8, 32)


def fields_of_bits(b: Bytes) -> Bytes:
    """The bits [n, 8, 32] of 32 bytes: bit g of byte i belongs to weight i of group g."""
    return np.asarray(b[:, None] >> np.arange(8, dtype=np.uint8)[:, None] & 1, np.uint8)


def nibbles(b: Bytes) -> Bytes:
    """[n, bytes] split into nibbles [n, 2 bytes], the low half of a byte first."""
    return np.stack([b & 15, b >> 4], axis=-1).reshape(len(b), -1)

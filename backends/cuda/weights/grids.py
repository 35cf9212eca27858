"""The seven block types whose codes come from grids, which are in the gguf package.

One index selects the codes of 8 weights (4 for iq3), and

    weight = d / 8 * factor * level[code]

with an integer factor per 16 weights. The low three bits of a code are the entry of the grid, which
numbers the magnitudes of the type in ascending order; the bit above is the sign.

Tiles keep the indices; kernels/include/iq.cuh has their layout, and looks the entries up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.cuda.weights.bits import Bytes, nibbles
from pyggml.errors import DeviceError

#: As in formats.py.
Parts: TypeAlias = tuple[Bytes, Bytes, Bytes, Bytes]

#: The name by which kernels/include/iq.cuh includes `header()`; there is no such file.
HEADER = "grids.cuh"
#: Types with their own grid; iq1_m uses that of iq1_s.
TYPES = ("iq1_s", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s")


def _levels(*magnitudes: int, negative: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The 16 levels of a code; the negative ones start at code 8."""
    unused = (0,) * (8 - len(magnitudes))
    return *magnitudes, *unused, *(negative or tuple(-m for m in magnitudes)), *unused


#: The level of each code. For iq1 they are 8 (-1, 0, 1) + 1 and, with the sign, 8 (-1, 0, 1) - 1.
LEVELS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("iq1_s", "iq1_m"), _levels(-7, 1, 9, negative=(-9, -1, 7))),
    **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq2_s"), _levels(8, 25, 43)),
    "iq3_xxs": _levels(4, 12, 20, 28, 36, 44, 52, 62),
    "iq3_s": _levels(1, 3, 5, 7, 9, 11, 13, 15),
}


@cache
def entries(name: str) -> Bytes:
    """The grid of a type: codes [indices, 8 or 4], without signs.

    DeviceError if the installed gguf has no such grid.
    """
    from gguf import quants  # loaded only if a kernel or a file needs it

    try:
        codec = getattr(quants, name.upper())
        codec.init_grid()
        values = np.asarray(codec.grid).reshape(codec.grid_shape)
        return np.searchsorted(codec.grid_map, values).astype(np.uint8)
    except (AttributeError, TypeError, ValueError) as error:
        raise DeviceError(
            f"the installed gguf package has no grid of {name} ({error}); install 0.17 or newer"
        ) from error


# -- for the kernels ----------------------------------------------------------------------------


@cache
def header() -> str:
    """`const unsigned NAME_grid<0>[]` for each type, or `unsigned short` for entries of 4 codes: an
    entry has a nibble for each code, the first one lowest.
    """
    return "#pragma once\n" + "\n".join(_array(name) for name in TYPES)


def _array(name: str) -> str:
    codes = entries(name).astype(np.uint32)
    n = codes.shape[1]
    words = np.bitwise_or.reduce(codes << np.arange(0, 4 * n, 4, dtype=np.uint32), axis=1)
    kind = "unsigned" if n == 8 else "unsigned short"
    head = f"template <int> __device__ const {kind} {name}_grid"  # emitted only where used
    return f"{head}[] = {{{', '.join(map(str, words))}}};"


# -- blocks -------------------------------------------------------------------------------------


@cache
def _spread() -> NDArray[np.uint32]:
    """For each g of 4 and value of a byte, a word with bit i of the byte in bit 4 i + g."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    words = np.bitwise_or.reduce(bits.astype(np.uint32) << np.arange(0, 32, 4, dtype=np.uint32), 1)
    return np.asarray(words << np.arange(4, dtype=np.uint32)[:, None])


def _signs(runs: NDArray[Any]) -> NDArray[np.uint32]:
    """The words of signs [n, 8] of four runs of 8 signs each, [n, 8, 4]."""
    a, b, c, d = _spread()
    return np.asarray(a[runs[..., 0]] | b[runs[..., 1]] | c[runs[..., 2]] | d[runs[..., 3]])


def _sevens(words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The same of words with four runs of 7 signs, below 4 bits that stay where they are."""
    runs = words[..., None] >> np.array([0, 7, 14, 21], np.uint32) & 127
    return _signs(runs) | (words & np.uint32(0xF0000000))


def _words(b: Bytes, dtype: type[np.unsignedinteger[Any]]) -> NDArray[Any]:
    return np.ascontiguousarray(b).view(dtype)


def _bytes(words: NDArray[Any]) -> Bytes:
    """The bytes of one number a group, [n, 8, bytes]."""
    return np.ascontiguousarray(words)[..., None].view(np.uint8)


def _groups(b: Bytes) -> Bytes:
    return b.reshape(len(b), 8, -1)


def _iq2_xxs(b: Bytes) -> Parts:
    field = _groups(b[:, 2:])
    signs = _sevens(_words(field[..., 4:], np.uint32)[..., 0])
    return field[..., :4], _bytes(signs), field[..., :0], b[:, :2]


def _iq2_xs(b: Bytes) -> Parts:
    """Bit 8 of an index takes the place of its eighth sign."""
    field = _groups(b[:, 2:66])
    low, high = field[..., 0::2], field[..., 1::2]
    signs = _signs(high >> 1 | high << 7)
    return low, _bytes(signs), _groups(b[:, 66:]), b[:, :2]


def _iq2_s(b: Bytes) -> Parts:
    own = np.stack([b[:, 66:74], b[:, 74:]], axis=2)
    return _groups(b[:, 2:34]), _bytes(_signs(_groups(b[:, 34:66]))), own, b[:, :2]


def _iq3_xxs(b: Bytes) -> Parts:
    signs = _sevens(_words(b[:, 66:], np.uint32))
    return _groups(b[:, 2:66]), _bytes(signs), _groups(b[:, 66:])[..., :0], b[:, :2]


def _iq3_s(b: Bytes) -> Parts:
    own = np.stack([b[:, 66:74], nibbles(b[:, 106:])], axis=2)
    return _groups(b[:, 2:66]), _bytes(_signs(_groups(b[:, 74:106]))), own, b[:, :2]


def _iq1_s(b: Bytes) -> Parts:
    high = _groups(b[:, 34:])
    return _groups(b[:, 2:34]), high, high[..., :0], b[:, :2]


def _iq1_m(b: Bytes) -> Parts:
    """The f16 d consists of the top nibbles of four words, the first one lowest."""
    scales = _words(b[:, 48:], np.uint16)
    own = (scales[..., None] >> np.array([0, 6], np.uint16) & 63).reshape(-1, 8, 1)
    d = (scales & 0xF000) >> np.array([12, 8, 4, 0], np.uint16)
    whole = np.bitwise_or.reduce(d, axis=1, keepdims=True).astype(np.uint16)
    return _groups(b[:, :32]), _groups(b[:, 32:48]), own.astype(np.uint8), whole.view(np.uint8)


#: The bytes of codes, high and scale of a group, and the function that extracts the parts.
PACKERS: dict[str, tuple[int, int, int, Callable[[Bytes], Parts]]] = {
    "iq1_s": (4, 2, 0, _iq1_s),
    "iq1_m": (4, 2, 1, _iq1_m),
    "iq2_xxs": (4, 4, 0, _iq2_xxs),
    "iq2_xs": (4, 4, 1, _iq2_xs),
    "iq2_s": (4, 4, 2, _iq2_s),
    "iq3_xxs": (8, 4, 0, _iq3_xxs),
    "iq3_s": (8, 4, 2, _iq3_s),
}

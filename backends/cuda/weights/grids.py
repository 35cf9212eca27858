"""The seven block types whose codes come from grids, which are in the gguf package.

One index selects the codes of 8 weights (4 for iq3), and

    weight = d / 8 * factor * level[code]

with an integer factor per 16 weights. The low three bits of a code are the entry of the grid, which
numbers the magnitudes of the type in ascending order; the bit above is the sign.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.cuda.weights.bits import Bytes, nibbles
from pyggml.errors import DeviceError

#: Codes [n, 256], factors [n, 16] and the f16 d [n, 2] of blocks.
Codes: TypeAlias = tuple[Bytes, Bytes, Bytes]

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
    """`const unsigned short NAME_grid<0>[]` for each type: an entry packs the 8 (4) codes of an
    index, 2 (3) bits each, the first one lowest.
    """
    return "#pragma once\n" + "\n".join(_array(name) for name in TYPES)


def _array(name: str) -> str:
    codes = entries(name).astype(np.uint16)
    n = codes.shape[1]
    words = (codes << np.arange(n, dtype=np.uint16) * (2 if n == 8 else 3)).sum(axis=1)
    head = f"template <int> __device__ const unsigned short {name}_grid"  # emitted only where used
    return f"{head}[] = {{{', '.join(map(str, words))}}};"


# -- blocks -------------------------------------------------------------------------------------


def _signed(name: str, index: NDArray[Any], signs: NDArray[Any]) -> Bytes:
    """Codes [n, 256] from indices and one byte of signs per 8 weights [n, 32]."""
    grid = entries(name)
    word = np.uint64 if grid.shape[1] == 8 else np.uint32
    codes = grid.view(word)[:, 0][index].view(np.uint64) | _sign_words()[signs]
    return np.asarray(codes.view(np.uint8))


@cache
def _sign_words() -> NDArray[np.uint64]:
    """For each value of a byte, 8 bytes that are 8 where its bit is set, else 0."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.asarray((bits << 3).astype(np.uint8).view(np.uint64)[:, 0], np.uint64)


def _even(signs: NDArray[Any]) -> NDArray[Any]:
    """Seven signs and an eighth that makes the number of negative ones even."""
    odd = signs ^ signs >> 4
    odd ^= odd >> 2
    return np.asarray(signs | ((odd ^ odd >> 1) & 1) << 7)


def _words(b: Bytes, dtype: type[np.unsignedinteger[Any]]) -> NDArray[Any]:
    return np.ascontiguousarray(b).view(dtype)


def _cut(words: NDArray[Any], shifts: tuple[int, ...], mask: int) -> NDArray[Any]:
    """The fields of each word at `shifts`, [n, words * fields]."""
    cut = words[..., None] >> np.array(shifts, words.dtype) & mask
    return np.asarray(cut.reshape(len(words), -1), np.uint16)


def _odd(scales: NDArray[Any], times: int = 1) -> Bytes:
    """Factors times (2 s + 1) from scales s [n, 8 or 16], one per 16 weights."""
    return ((2 * scales + 1) * times).astype(np.uint8).repeat(16 // scales.shape[1], 1)


def _iq2_xxs(b: Bytes) -> Codes:
    field = b[:, 2:].reshape(-1, 8, 8)
    signs = _words(field[..., 4:], np.uint32)[..., 0]
    codes = _signed(
        "iq2_xxs", field[..., :4].reshape(-1, 32), _even(_cut(signs, (0, 7, 14, 21), 127))
    )
    return codes, _odd(signs >> 28), b[:, :2]


def _iq2_xs(b: Bytes) -> Codes:
    q = _words(b[:, 2:66], np.uint16)
    return _signed("iq2_xs", q & 511, _even(q >> 9)), _odd(nibbles(b[:, 66:])), b[:, :2]


def _iq2_s(b: Bytes) -> Codes:
    index = b[:, 2:34] | _cut(b[:, 66:74], (0, 2, 4, 6), 3) << 8
    return _signed("iq2_s", index, b[:, 34:66]), _odd(nibbles(b[:, 74:])), b[:, :2]


def _iq3_xxs(b: Bytes) -> Codes:
    signs = _words(b[:, 66:], np.uint32)
    codes = _signed("iq3_xxs", b[:, 2:66], _even(_cut(signs, (0, 7, 14, 21), 127)))
    return codes, _odd(signs >> 28, 2), b[:, :2]


def _iq3_s(b: Bytes) -> Codes:
    index = b[:, 2:66] | _cut(b[:, 66:74], tuple(range(8)), 1) << 8
    return _signed("iq3_s", index, b[:, 74:106]), _odd(nibbles(b[:, 106:]), 8), b[:, :2]


def _iq1_s(b: Bytes) -> Codes:
    high = _words(b[:, 34:], np.uint16)
    index = b[:, 2:34] | _cut(high, (0, 3, 6, 9), 7) << 8
    signs = ((high >> 15) * 255).repeat(4, axis=1)
    return _signed("iq1_s", index, signs), _odd(high >> 12 & 7), b[:, :2]


def _iq1_m(b: Bytes) -> Codes:
    """The f16 d consists of the top nibbles of four words, the first one lowest."""
    high, scales = nibbles(b[:, 32:48]).astype(np.uint16), _words(b[:, 48:], np.uint16)
    codes = _signed("iq1_s", b[:, :32] | (high & 7) << 8, (high >> 3) * 255)
    d = (scales & 0xF000) >> np.array([12, 8, 4, 0], np.uint16)
    whole = np.bitwise_or.reduce(d, axis=1, keepdims=True).astype(np.uint16)
    return codes, _odd(_cut(scales, (0, 3, 6, 9), 7)), whole.view(np.uint8)


READERS: dict[str, Callable[[Bytes], Codes]] = {
    "iq1_s": _iq1_s,
    "iq1_m": _iq1_m,
    "iq2_xxs": _iq2_xxs,
    "iq2_xs": _iq2_xs,
    "iq2_s": _iq2_s,
    "iq3_xxs": _iq3_xxs,
    "iq3_s": _iq3_s,
}

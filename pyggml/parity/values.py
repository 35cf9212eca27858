"""The values of a case's sources."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.dtypes import DType
from pyggml.quants import ENCODABLE, decode_rows, encode_rows

Array = NDArray[Any]
Ne = tuple[int, ...]
#: Keys that are NaN or infinite in ~holed, and hidden from most queries by ~holes.
_HOLES = slice(3, None, 5)
#: Fills with NaN or infinity, and masks that hide these.
_SPECIAL = re.compile(r"~(nan|dead|past|upto|hide)(\d*)")


def numbers(rng: np.random.Generator, shape: tuple[int, ...], fill: str) -> Array:
    """Values in NumPy shape, as `Source.fill` describes them."""
    if fill[:1] in ("<", "!"):
        count = int(fill[1:].rstrip("-"))
        if fill[0] == "<":
            return rng.integers(-2 if fill.endswith("-") else 0, count, shape)
        lines = [rng.permutation(count)[: shape[-1]] for _ in range(int(np.prod(shape[:-1])))]
        ids = np.array(lines).reshape(shape)
        if fill.endswith("-"):
            ids[rng.random(shape) < 0.25] = -1
        return ids
    if fill.startswith("#"):
        return np.full(shape, int(fill[1:]))
    values = rng.standard_normal(shape)
    word = _SPECIAL.fullmatch(fill)
    if word:
        return _specials(rng, values, word[1], int(word[2] or 0))
    if fill == "~mask":
        hidden = rng.random(shape) < 0.3
        hidden[..., 1:2, :] = True
        return np.where(hidden, -np.inf, values)
    if fill == "~holes":
        hidden = rng.random(shape) < 0.2
        hidden[..., _HOLES] = True
        hidden[..., 5::6, _HOLES] = False
        return np.where(hidden, -np.inf, np.where(rng.random(shape) < 0.5, 0, values))
    if fill in ("~holed", "~ended"):
        spoiled = values[..., _HOLES if fill == "~holed" else slice(shape[-2] // 2, None), :]
        for start, special in enumerate((np.nan, np.inf, -np.inf)):
            spoiled[..., start::3, start::2] = special
        return values
    if fill == "~causal":
        rows, keys = shape[-2:]
        return np.where(np.tri(rows, keys, keys - rows, dtype=bool), 0.0, -np.inf) + 0 * values
    if fill == "~blocks":
        rows, keys = (-(-n // size) for n, size in zip(shape[-2:], (8, 16)))
        hidden = (rng.random((*shape[:-2], rows, keys)) < 0.3).repeat(8, -2).repeat(16, -1)
        return np.where(hidden[..., : shape[-2], : shape[-1]], -np.inf, values)
    if fill == "~above":
        return np.abs(values) + 0.01
    if fill == "~one":
        return rng.uniform(0.9, 1.1, shape)
    if fill == "~deep":
        return rng.uniform(-80, -10, shape)
    if fill == "~level":
        levels = 1e3 * rng.standard_normal((*shape[:-1], 1))
        levels[..., ::3, :] = rng.choice([0.1, -3e5, 7e-20, 0.0], levels[..., ::3, :].shape)
        values[..., ::3, :] = 0
        return levels + values
    if fill == "~large":
        return 1e4 * values
    if fill == "~ties":
        return np.rint(2 * values)
    if fill == "~wild":
        odd = rng.choice([np.inf, -np.inf, np.nan, -np.nan, 1e-40, 0.0], shape)
        return np.where(rng.random(shape) < 0.2, odd, values)
    return values


def _specials(rng: np.random.Generator, values: Array, word: str, number: int) -> Array:
    """Values with NaN or infinity for the fills of `_SPECIAL`, and masks that hide them."""
    if word == "nan" and not number:
        return np.where(rng.random(values.shape) < 0.1, np.nan, values)
    if word in ("upto", "hide"):
        keys = np.arange(values.shape[-1])
        hidden = keys >= number if word == "upto" else keys % number == number - 1
        return np.where(hidden | (rng.random(values.shape) < 0.2), -np.inf, values)
    rows = np.arange(values.shape[-2])
    chosen = rows >= number if word == "past" else rows % number == number - 1
    words = [np.nan] if word == "nan" else [np.nan, np.inf, -np.inf]
    return np.where(chosen[:, None], rng.choice(words, values.shape), values)


def stored(dtype: DType, values: Array, rng: np.random.Generator, fill: str = "") -> Array:
    """Values in the type's storage: [.., bytes of a row] for block types.

    A block type without an encoder gets random blocks instead of the values. ~wild blocks are any
    bytes, and a row with NaN or infinity is all bytes 0xFF.
    """
    if dtype.numpy is not None:
        return values.astype(dtype.numpy)
    shape = (*values.shape[:-1], dtype.row_bytes(values.shape[-1]))
    if dtype.block > 1 and fill == "~wild":
        return rng.integers(0, 256, shape, np.uint8)
    special = ~np.isfinite(values).all(axis=-1) if dtype.block > 1 else None
    if special is not None and special.any():
        blocks = stored(dtype, np.where(np.isfinite(values), values, 0.0), rng)
        blocks[special] = 0xFF
        return blocks
    if dtype.name in ENCODABLE:
        return encode_rows(dtype, np.ascontiguousarray(values, dtype=np.float32))
    known = _blocks(dtype)
    chosen = rng.integers(0, len(known), (*shape[:-1], shape[-1] // dtype.nbytes))
    return known[chosen].reshape(shape)


@cache
def _blocks(dtype: DType) -> Array:
    """Random blocks whose largest value is about 1.

    Any bytes are valid blocks, but a sum over blocks of 1e9 and 1e-9 would not test a kernel.
    """
    blocks = np.random.default_rng(0).integers(0, 256, (1 << 11, dtype.nbytes), np.uint8)
    with np.errstate(all="ignore"):
        largest = np.abs(decode_rows(dtype, blocks)).max(axis=1)
    return np.asarray(blocks[(largest > 0.1) & (largest < 10)])


def decoded(dtype: DType, array: Array) -> Array:
    """The values of an array in the type's storage: float64 or int64."""
    if dtype.kind == "int":
        return array.astype(np.int64)
    return (array if dtype.numpy is not None else decode_rows(dtype, array)).astype(np.float64)


def blank(dtype: DType, ne: Ne) -> Array:
    """Zeros in the type's storage."""
    if dtype.block == 1:
        return np.zeros(ne[::-1], dtype.numpy or np.uint16)
    return np.zeros((*ne[:0:-1], dtype.row_bytes(ne[0])), np.uint8)

"""Random weights of any storage type, drawn as blocks without encoding anything."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeAlias

import numpy as np

from pyggml.dtypes import TYPES, DType, dtype
from pyggml.errors import DTypeError
from pyggml.gguf.writer import Tensor

Array: TypeAlias = np.ndarray[Any, Any]
Draw: TypeAlias = Callable[[np.random.Generator, int], Array]

_CHUNK_BYTES = 8 << 20

#: Block types in which every byte may be random except the f16 scales. Each entry lists the scales
#: as (byte, factor) and gives the root mean square of a decoded block whose scale is 1. In types
#: with a minimum, the second factor makes the mean zero. The numbers come from decoding random
#: blocks; a test repeats the measurement.
_BLOCKS: dict[str, tuple[tuple[tuple[int, float], ...], float]] = {
    "q4_0": (((0, 1.0),), 4.637),
    "q4_1": (((0, 1.0), (2, -7.5)), 4.610),
    "q5_0": (((0, 1.0),), 9.247),
    "q5_1": (((0, 1.0), (2, -15.5)), 9.233),
    "q8_0": (((0, 1.0),), 73.90),
    "q2_K": (((80, 1.0), (82, 1.5)), 13.87),
    "q3_K": (((108, 1.0),), 43.32),
    "q4_K": (((0, 1.0), (2, 7.5)), 258.5),
    "q5_K": (((0, 1.0), (2, 15.5)), 527.6),
    "q6_K": (((208, 1.0),), 1363.0),
    "iq1_s": (((0, 1.0),), 7.207),
    "iq2_xxs": (((0, 1.0),), 53.22),
    "iq2_xs": (((0, 1.0),), 55.88),
    "iq2_s": (((0, 1.0),), 56.46),
    "iq3_xxs": (((0, 1.0),), 142.4),
    "iq3_s": (((0, 1.0),), 140.2),
    "iq4_nl": (((0, 1.0),), 67.46),
    "iq4_xs": (((0, 1.0),), 1246.0),
    "tq1_0": (((52, 1.0),), 0.817),
    "tq2_0": (((64, 1.0),), 1.225),
}

#: Types that `random_tensor` draws.
DRAWN: tuple[str, ...] = ("f32", "f16", "bf16", *_BLOCKS, "mxfp4")


def drawn_type(name: str) -> DType:
    """The type called `name`; DTypeError if `random_tensor` cannot draw it."""
    with suppress(DTypeError):
        if dtype(name).name in DRAWN:
            return dtype(name)
    raise DTypeError(f"cannot draw random {name} weights; choose from {', '.join(DRAWN)}")


def fitting_type(preferred: DType, ne0: int) -> DType:
    """The first of `preferred`, q8_0 and f16 whose blocks divide a row of `ne0` elements."""
    candidates = (preferred, TYPES["q8_0"], TYPES["f16"])
    return next(t for t in candidates if ne0 % t.block == 0)


def random_tensor(
    name: str, type: DType, ne: tuple[int, ...], *, std: float, mean: float = 0.0, seed: int = 0
) -> Tensor:
    """A tensor of random values with standard deviation `std`, drawn while it is written.

    Plain types are normal around `mean`. Block types are spread around 0 as their quants are.
    The values depend only on `seed` and `name`, so a layer keeps its values when others are added
    or removed.
    """

    def chunks() -> Iterator[np.ndarray[Any, Any]]:
        rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
        draw = _mxfp4(std) if type.name == "mxfp4" else None
        if draw is None:
            draw = _blocks(type, std) if type.name in _BLOCKS else _normal(rng, type, std, mean)
        remaining = tensor.nbytes // type.nbytes
        while remaining:
            count = min(remaining, _CHUNK_BYTES // type.nbytes)
            yield draw(rng, count)
            remaining -= count

    tensor = Tensor(name, type, ne, chunks)
    return tensor


def random_ids(name: str, ne: tuple[int, ...], *, end: int, seed: int = 0) -> Tensor:
    """Rows of different whole numbers from 0 to `end` - 1, in i32: each row counts up from a random
    one. Values as `random_tensor`'s depend only on `seed` and `name`.
    """

    def chunks() -> Iterator[np.ndarray[Any, Any]]:
        rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
        first = rng.integers(0, end, math.prod(ne[1:]), dtype=np.int32)
        yield (first[:, None] + np.arange(ne[0], dtype=np.int32)) % np.int32(end)

    return Tensor(name, TYPES["i32"], ne, chunks)


def _random_bytes(rng: np.random.Generator, count: int) -> Array:
    words = rng.integers(0, 1 << 64, -(-count // 8), dtype=np.uint64)
    return words.view(np.uint8)[:count]


def _normal(rng: np.random.Generator, type: DType, std: float, mean: float) -> Draw:
    """A draw from a table of 65,536 normal values, converted once to the bits of the type."""
    values = (rng.standard_normal(1 << 16) * std + mean).astype(np.float32)
    if type.numpy is None:
        table = ((values.view(np.uint32) + 0x8000) >> 16).astype("<u2")  # bf16, to nearest
    else:
        table = values.astype(type.numpy)
    return lambda rng, count: table[_random_bytes(rng, 2 * count).view("<u2")]


def _blocks(type: DType, std: float) -> Draw:
    """A draw of random bytes. Scales come from a table of 256: both signs, within 20 % of the scale
    that gives `std`.
    """
    places, rms = _BLOCKS[type.name]
    spread = np.linspace(0.8, 1.2, 128)
    spread *= std / rms / np.sqrt(np.mean(spread**2))
    scales = np.concatenate([spread, -spread])
    tables = [(at, (scales * factor).astype("<f2")) for at, factor in places]

    def draw(rng: np.random.Generator, count: int) -> Array:
        raw = _random_bytes(rng, count * type.nbytes).reshape(count, type.nbytes)
        pick = raw[:, places[0][0]].copy()
        for at, table in tables:
            raw[:, at : at + 2] = table[pick].view(np.uint8).reshape(count, 2)
        return raw

    return draw


def _mxfp4(std: float) -> Draw:
    """A draw of random bytes whose scales are the two powers of 2 around the one that gives `std`.

    The root mean square of the 16 values of a code is sqrt(8.5625).
    """
    exact = np.log2(std) - np.log2(8.5625) / 2
    low = int(np.floor(exact))
    scales = np.full(256, low + 127, np.uint8)
    scales[: round(256 * (4 ** (exact - low) - 1) / 3)] += 1

    def draw(rng: np.random.Generator, count: int) -> Array:
        raw = _random_bytes(rng, count * 17).reshape(count, 17)
        raw[:, 0] = scales[raw[:, 0]]
        return raw

    return draw

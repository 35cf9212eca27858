"""Codecs between f32 and the element types of GGUF files, in NumPy.

An array of a block type is uint8 [..., blocks, bytes of a block]; bf16 is uint16 [..., ne0]; f16
and f32 are NumPy's own types. Arguments and `out` may have any strides; `out` must not overlap the
input. A call works piece by piece in the memory of `work` (uint8; allocated if absent).
`work_bytes` returns how much memory full-size pieces need; less memory means smaller pieces. A call
allocates no other temporary of 64 KiB or more, except for tables at first use (30 KiB each, and
gguf's own).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.dtypes import DType, DTypeLike
from pyggml.dtypes import dtype as as_dtype
from pyggml.errors import DTypeError, ShapeError
from pyggml.quants import decoders, encoders
from pyggml.quants.common import (
    DECODE_PIECE,
    ENCODE_PIECE,
    LEAST_WORK,
    WORK_BYTES,
    Floats,
    Memory,
    pieces,
    work_bytes,
)

__all__ = [
    "DECODABLE", "ENCODABLE", "WORK_BYTES", "decode", "decode_rows", "encode", "encode_rows",
    "work_bytes",
]  # fmt: skip

#: Names of the types that `decode` and `encode` support.
DECODABLE = frozenset(decoders.BY_NAME)
ENCODABLE = frozenset(encoders.BY_NAME)


def decode(
    dtype: DTypeLike,
    raw: NDArray[Any],
    out: Floats | None = None,
    *,
    work: NDArray[np.uint8] | None = None,
) -> Floats:
    """The f32 values of `raw`, bit for bit those of gguf.quants.dequantize (a NaN stays a NaN).

        raw     block types  uint8       [..., blocks, bytes of a block]
                bf16         uint16      [..., ne0]
                f16, f32     f16 or f32  [..., ne0]
        result  f32                      [..., ne0]   (ne0 = blocks * weights of a block)

    DTypeError for a type outside DECODABLE or an array of the wrong element type; ShapeError if
    the last axis is not one block, or if `out` or `work` does not fit.
    """
    t = _supported(dtype, DECODABLE, "decode")
    _check_elements(raw, _storage(t), f"raw {t} data")
    if t.kind != "block":
        _check_axes(raw, f"raw {t} data")
        raw = raw[..., None]
    elif raw.ndim < 2 or raw.shape[-1] != t.nbytes:
        raise ShapeError(
            f"raw {t} data is [..., blocks, {t.nbytes}], not {list(raw.shape)} (NumPy order); "
            f"reshape rows of bytes to (..., -1, {t.nbytes})"
        )
    *outer, blocks, _ = raw.shape
    y = _result(out, (*outer, blocks * t.block), np.dtype(np.float32))
    tiles = y.reshape(*outer, blocks, t.block)
    _convert(decoders.BY_NAME[t.name], raw, tiles, DECODE_PIECE // t.block, work)
    return y


def encode(
    dtype: DTypeLike,
    values: Floats,
    out: NDArray[Any] | None = None,
    *,
    work: NDArray[np.uint8] | None = None,
) -> NDArray[Any]:
    """f32 values [..., ne0] in the layout that `decode` reads, bit for bit gguf.quants.quantize.

    gguf has no iq4_nl encoder; ours is ggml's search without an importance matrix, in ggml's order
    of f32 operations. A block with an input that is not finite, or with a scale outside the range
    of f16, gets a scale of inf or NaN.

    DTypeError for a type outside ENCODABLE or values that are not f32; ShapeError if ne0 is not
    whole blocks, or if `out` or `work` does not fit.
    """
    t = _supported(dtype, ENCODABLE, "encode")
    _check_elements(values, np.dtype(np.float32), "the array to encode")
    _check_axes(values, "the array to encode")
    *outer, ne0 = values.shape
    t.row_bytes(ne0)
    blocks = (*outer, ne0 // t.block)
    shape = (*blocks, t.nbytes) if t.kind == "block" else blocks
    raw = _result(out, shape, _storage(t))
    target = raw if t.kind == "block" else raw[..., None]
    tiles = values.reshape(*blocks, t.block)
    _convert(encoders.BY_NAME[t.name], tiles, target, ENCODE_PIECE // t.block, work)
    return raw


def decode_rows(dtype: DTypeLike, rows: NDArray[Any]) -> Floats:
    """`decode` of rows as files store them: uint8 [..., bytes of a row] for block types."""
    t = as_dtype(dtype)
    return decode(t, rows.reshape(*rows.shape[:-1], -1, t.nbytes) if t.kind == "block" else rows)


def encode_rows(dtype: DTypeLike, values: Floats) -> NDArray[Any]:
    """`encode` into rows as files store them: uint8 [..., bytes of a row] for block types."""
    t = as_dtype(dtype)
    raw = encode(t, values)
    return raw.reshape(*values.shape[:-1], -1) if t.kind == "block" else raw


def _convert(
    codec: Callable[[Any, Any, Memory], None],
    source: NDArray[Any],
    target: NDArray[Any],
    limit: int,
    work: NDArray[np.uint8] | None,
) -> None:
    """Run a codec on pieces of at most `limit` blocks; the last axis of both arrays is a block.

    The codec gets contiguous memory and may overwrite its copy of the source.
    """
    if work is None:
        work = np.empty(WORK_BYTES, np.uint8)
    _check_elements(work, np.dtype(np.uint8), "work")
    if work.nbytes < LEAST_WORK or not work.flags.carray:
        raise ShapeError(
            f"work must be contiguous, writable and at least {LEAST_WORK} bytes; "
            f"got {work.nbytes} bytes"
        )
    if work.nbytes < WORK_BYTES:
        limit = max(1, limit * (work.nbytes - LEAST_WORK // 2) // WORK_BYTES)
    with np.errstate(all="ignore"):  # inf and NaN are legal values
        for index in pieces(source.shape[:-1], limit):
            memory = Memory(work.reshape(-1))
            piece = source[index]
            x = memory.array(piece.shape, piece.dtype)
            x[...] = piece
            result = y = target[index]
            if not result.flags.c_contiguous:
                y = memory.array(result.shape, result.dtype)
            codec(_blocks(x), _blocks(y), memory)
            if y is not result:
                result[...] = y


def _blocks(array: NDArray[Any]) -> NDArray[Any]:
    return array.reshape(-1, array.shape[-1])


def _storage(t: DType) -> np.dtype[Any]:
    return np.dtype({"f32": np.float32, "f16": np.float16, "bf16": np.uint16}.get(t.name, np.uint8))


def _supported(dtype: DTypeLike, names: frozenset[str], verb: str) -> DType:
    t = as_dtype(dtype)
    if t.name not in names:
        raise DTypeError(f"cannot {verb} {t}; choose from {', '.join(sorted(names))}")
    return t


def _check_elements(array: NDArray[Any], expected: np.dtype[Any], what: str) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != expected:
        actual = getattr(array, "dtype", type(array).__name__)
        raise DTypeError(f"{what} must be a NumPy array of {expected}, not {actual}")


def _check_axes(array: NDArray[Any], what: str) -> None:
    if array.ndim == 0:
        raise ShapeError(f"{what} has no axis; expected [..., ne0]")


def _result(
    out: NDArray[Any] | None, shape: tuple[int, ...], elements: np.dtype[Any]
) -> NDArray[Any]:
    if out is None:
        return np.empty(shape, elements)
    _check_elements(out, elements, "out")
    if out.shape != shape or not out.flags.writeable:
        raise ShapeError(
            f"out must be writable and of shape {list(shape)} (NumPy order); got "
            f"{'' if out.flags.writeable else 'read-only '}{list(out.shape)}"
        )
    return out

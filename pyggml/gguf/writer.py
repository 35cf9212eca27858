"""Writing GGUF v3 files: the header, then each tensor's bytes as they are produced."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from pyggml.dtypes import DType
from pyggml.errors import DTypeError, GGUFError
from pyggml.gguf.format import (
    ARRAY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    SCALARS,
    STRING,
    Value,
    padded,
)
from pyggml.gguf.header import parse
from pyggml.gguf.replaced import put, replaced

Progress: TypeAlias = Callable[[int, int], object]
_IDS = {dtype: id_ for id_, dtype in SCALARS.items()}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to write. `chunks()` yields contiguous buffers, `nbytes` in total."""

    name: str
    dtype: DType
    ne: tuple[int, ...]
    chunks: Callable[[], Iterable[np.ndarray[Any, Any]]]

    @property
    def nbytes(self) -> int:
        return self.dtype.tensor_bytes(self.ne)


def write(
    path: str | PathLike[str],
    fields: Mapping[str, Value | np.generic | Sequence[str]],
    tensors: Sequence[Tensor],
    *,
    header_only: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write a GGUF v3 file and return its size in bytes.

    fields       NumPy scalars and arrays keep their types; a Python int becomes u32 (or the first
                 of i32, u64, i64 that fits), a float f32, a sequence of str an array of strings
    header_only  write keys and the whole tensor table, but no weights; `open` such a file with
                 allow_missing_data
    progress     called after every chunk with the bytes written and the total bytes

    The file appears, or replaces an older one, when it is complete (`replaced`). GGUFError for
    names, sizes or keys that readers reject. OSError if the disk has too little space (before
    anything is written) or the write fails.
    """
    target = Path(path)
    header = _header(fields, tensors)
    end = len(header) + _offsets(tensors)[-1]
    parse(header, end, str(target))  # never write a file that our own reader refuses
    total = len(header) if header_only else end
    with replaced(target, total) as file:
        put(file, header)
        if not header_only:
            _put_tensors(file, tensors, len(header), total, progress)
    return total


def _header(fields: Mapping[str, Any], tensors: Sequence[Tensor]) -> bytes:
    if fields.get("general.alignment", DEFAULT_ALIGNMENT) != DEFAULT_ALIGNMENT:
        raise GGUFError(f"key 'general.alignment': must be {DEFAULT_ALIGNMENT} in a written file")
    out = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(fields))]
    for key, value in fields.items():
        out += [_text(key), _value_bytes(key, value)]
    for tensor, offset in zip(tensors, _offsets(tensors), strict=False):
        ne = tensor.ne
        row = struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, tensor.dtype.ggml_id, offset)
        out += [_text(tensor.name), row]
    raw = b"".join(out)
    return raw.ljust(padded(len(raw), DEFAULT_ALIGNMENT), b"\0")


def _offsets(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor starts after the header, and where the last one ends (padded)."""
    offsets = [0]
    for tensor in tensors:
        offsets.append(padded(offsets[-1] + tensor.nbytes, DEFAULT_ALIGNMENT))
    return offsets


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value_bytes(key: str, value: Any) -> bytes:
    """The type id and bytes of a key's value."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, (bool, int, float)) and not isinstance(value, np.generic):
        value = _scalar(key, value)
    if isinstance(value, (np.generic, np.ndarray)):
        id_ = _IDS.get(value.dtype.newbyteorder("<"))
        if id_ is None or value.ndim > 1:
            raise DTypeError(f"key {key!r}: GGUF has no {value.ndim}-d {value.dtype} values")
        head = struct.pack("<IIQ", ARRAY, id_, value.size) if value.ndim else struct.pack("<I", id_)
        return head + value.astype(SCALARS[id_]).tobytes()
    if isinstance(value, Sequence) and all(isinstance(text, str) for text in value):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
    raise DTypeError(f"key {key!r}: a value of type {type(value).__name__} has no GGUF type")


def _scalar(key: str, value: float) -> np.generic:
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, float):
        return np.float32(value)
    for integer in (np.uint32, np.int32, np.uint64, np.int64):
        if np.iinfo(integer).min <= value <= np.iinfo(integer).max:
            return integer(value)
    raise DTypeError(f"key {key!r}: {value} does not fit in 64 bits")


def _put_tensors(
    file: BinaryIO, tensors: Sequence[Tensor], done: int, total: int, progress: Progress | None
) -> None:
    for tensor in tensors:
        start = done
        for chunk in tensor.chunks():
            done += put(file, chunk)
            if progress is not None:
                progress(done, total)
        if done - start != tensor.nbytes:
            raise GGUFError(
                f"tensor {tensor.name!r}: expected {tensor.nbytes} bytes, got {done - start}"
            )
        done += put(file, bytes(padded(done, DEFAULT_ALIGNMENT) - done))

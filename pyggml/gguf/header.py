"""The header of one GGUF file, walked and checked: keys, then the tensor table. Reads no weights.

Every length, count, type, dimension and offset is compared with the bytes that are there before
it is used, so time and memory are bounded by the header's size, never by a number written in it.

Policy where the format or other readers leave room. Refused: an empty, overlong (65,535 bytes),
repeated or non-UTF-8 key; a bool other than 0 and 1; an array of arrays; a tensor without name or
with one over 63 bytes; no dimensions or more than 4; a dimension of 0; tensors that overlap; an
alignment that is no power of two from 8 to 65,536. Accepted: gaps between tensors, any order of
their data, bytes after the last one.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple, NoReturn, TypeAlias

import numpy as np

from pyggml.dtypes import BY_ID, DType
from pyggml.errors import GGUFError, ShapeError
from pyggml.gguf.format import (
    ARRAY,
    BOOL,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_ALIGNMENT,
    MAX_DIMS,
    MAX_HEADER,
    MAX_KEY,
    MAX_NAME,
    SCALARS,
    STRING,
    U32,
    StringArray,
    TensorInfo,
    Value,
    padded,
    u64,
)

Source: TypeAlias = bytes | mmap.mmap

_OTHER_FORMATS = {
    b"lmgg": "an old GGML file", b"tjgg": "an old GGJT file", b"fmgg": "an old GGMF file",
    b"FUGG": "a byte-swapped GGUF file", b"\x1f\x8b": "gzip data", b"PK": "a zip archive",
    b"<": "HTML or XML, perhaps a failed download",
    b"version https://git-lfs": "a Git LFS pointer: run `git lfs pull`",
}  # fmt: skip
_REMOVED_TYPES = frozenset({4, 5, 31, 32, 33, 36, 37, 38})
_FIRST_IK_TYPE = 97


class Header(NamedTuple):
    version: int
    fields: dict[str, Value]
    tensors: list[TensorInfo]
    data_start: int


def parse(
    source: Source, size: int, path: str, *, part: int = 0, allow_missing_data: bool = False
) -> Header:
    """The header at the start of `source`, a file of `size` bytes; GGUFError where it is wrong.

    `path` names the file in errors; `allow_missing_data` accepts tensors past the file's end.
    """
    cursor = _Cursor(source, path)
    version = _version(cursor)
    n_tensors = cursor.count("tensor count", least=33)
    n_keys = cursor.count("key count", least=14)
    spans = _keys(cursor, n_keys)
    alignment = _alignment(cursor, spans.get("general.alignment"))
    rows = list(_rows(cursor, n_tensors, alignment))
    start = padded(cursor.pos, alignment)
    tensors = _placed(cursor, rows, start, None if allow_missing_data else size, part)
    # Values are copied out last: a file that is refused costs next to no memory.
    fields = {key: _value(cursor, f"key {key!r}", span) for key, span in spans.items()}
    return Header(version, fields, tensors, start)


class _Cursor:
    """A position in the header; a read that would pass its end is a GGUFError."""

    def __init__(self, source: Source, path: str) -> None:
        self.source, self.path, self.pos = source, path, 0
        self.end = min(len(source), MAX_HEADER)

    def fail(self, field: str, problem: str, at: int | None = None) -> NoReturn:
        raise GGUFError(f"{self.path}: byte {self.pos if at is None else at}, {field}: {problem}")

    def take(self, nbytes: int, field: str) -> int:
        """Steps over `nbytes` and returns where they start."""
        start = self.pos
        if nbytes > self.end - start:
            end = "the limit of a header" if self.end == MAX_HEADER else "the end of the file"
            self.fail(field, f"{nbytes} bytes needed, {self.end - start} left before {end}")
        self.pos = start + nbytes
        return start

    def integer(self, nbytes: int, field: str) -> int:
        start = self.take(nbytes, field)
        return int.from_bytes(self.source[start : self.pos], "little")

    def count(self, field: str, least: int) -> int:
        """A u64 count of things that take at least `least` bytes each."""
        number = self.integer(8, field)
        if number * least > self.end - self.pos:
            left = self.end - self.pos
            self.fail(field, f"{number} of them cannot fit in the {left} bytes left", self.pos - 8)
        return number

    def name(self, field: str, longest: int) -> str:
        length = self.integer(8, f"{field} length")
        if not 1 <= length <= longest:
            self.fail(f"{field} length", f"{length}, must be 1 to {longest}", self.pos - 8)
        return self.decode(self.take(length, field), self.pos, field)

    def decode(self, start: int, stop: int, field: str) -> str:
        try:
            return self.source[start:stop].decode()
        except UnicodeDecodeError as error:
            self.fail(field, f"not UTF-8: {error.reason}", start + error.start)


class _Span(NamedTuple):
    """Where a value lies. `length` is None for a scalar; a string's span begins at its length."""

    type: int
    length: int | None
    start: int
    stop: int


def _version(cursor: _Cursor) -> int:
    head = cursor.source[:32]
    if not head.startswith(MAGIC):
        kind = next((k for magic, k in _OTHER_FORMATS.items() if head.startswith(magic)), None)
        cursor.fail("magic", f"{head[:4]!r}, not {MAGIC!r}" + (f": {kind}" if kind else ""))
    cursor.take(4, "magic")
    version = cursor.integer(4, "version")
    if version not in (2, 3):
        big_endian = version in (2 << 24, 3 << 24)
        hint = "; a big-endian file must be converted" if big_endian else ""
        cursor.fail("version", f"{version}, only 2 and 3 are read{hint}", 4)
    return version


def _keys(cursor: _Cursor, count: int) -> dict[str, _Span]:
    spans: dict[str, _Span] = {}
    for i in range(count):
        at = cursor.pos
        key = cursor.name(f"key {i}", MAX_KEY)
        if key in spans:
            cursor.fail(f"key {i}", f"{key!r} occurs twice", at)
        spans[key] = _span(cursor, f"key {key!r}")
    return spans


def _span(cursor: _Cursor, field: str) -> _Span:
    type_, length = cursor.integer(4, f"{field} type"), None
    is_array = type_ == ARRAY
    if is_array:
        type_ = cursor.integer(4, f"{field} element type")
    if type_ == ARRAY:
        cursor.fail(f"{field} element type", "an array of arrays is not read", cursor.pos - 4)
    if type_ != STRING and type_ not in SCALARS:
        cursor.fail(f"{field} type", f"{type_} does not exist", cursor.pos - 4)
    least = 8 if type_ == STRING else SCALARS[type_].itemsize
    if is_array:
        length = cursor.count(f"{field} length", least)
    start, number = cursor.pos, 1 if length is None else length
    if type_ == STRING:
        _skip_strings(cursor, number, field)
    else:
        cursor.take(number * least, field)
    return _Span(type_, length, start, cursor.pos)


def _skip_strings(cursor: _Cursor, count: int, field: str) -> None:
    # The one long loop of a parse, hence no calls of cursor in it.
    source, pos, last = cursor.source, cursor.pos, cursor.end - 8
    for i in range(count):
        if pos > last:
            cursor.fail(f"{field}, string {i}", "its length passes the header's end", pos)
        pos += 8 + u64(source, pos)[0]
    if pos > cursor.end:
        left = cursor.end - cursor.pos
        cursor.fail(field, f"{pos - cursor.pos} bytes of strings, {left} left")
    cursor.pos = pos


def _value(cursor: _Cursor, field: str, span: _Span) -> Value:
    raw = cursor.source[span.start : span.stop]
    if span.type == STRING:
        if span.length is None:
            return cursor.decode(span.start + 8, span.stop, field)
        return StringArray(raw, span.length, f"{cursor.path}: byte {span.start}, {field}")
    if span.type == BOOL and raw.strip(b"\0\1"):
        cursor.fail(field, "a bool is 0 or 1", span.start)
    values = np.frombuffer(raw, SCALARS[span.type])
    if span.length is None:
        scalar: bool | int | float = values[0].item()
        return scalar
    return values


def _alignment(cursor: _Cursor, span: _Span | None) -> int:
    if span is None:
        return DEFAULT_ALIGNMENT
    field = "key 'general.alignment'"
    if span.type != U32 or span.length is not None:
        cursor.fail(field, "must be a u32", span.start)
    alignment = int.from_bytes(cursor.source[span.start : span.stop], "little")
    if not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        limits = f"must be a power of two from 8 to {MAX_ALIGNMENT}"
        cursor.fail(field, f"{alignment}, {limits}", span.start)
    return alignment


class _Row(NamedTuple):
    at: int
    name: str
    dtype: DType
    ne: tuple[int, ...]
    nbytes: int
    offset: int


def _rows(cursor: _Cursor, count: int, alignment: int) -> Iterator[_Row]:
    names: set[str] = set()
    for i in range(count):
        at = cursor.pos
        name = cursor.name(f"tensor {i} name", MAX_NAME)
        field = f"tensor {name!r}"
        if name in names:
            cursor.fail(field, "occurs twice", at)
        names.add(name)
        ne = _ne(cursor, field)
        dtype = _dtype(cursor, field)
        try:
            nbytes = dtype.row_bytes(ne[0]) * math.prod(ne[1:])
        except ShapeError as error:
            cursor.fail(f"{field} ne[0]", str(error), at)
        offset = cursor.integer(8, f"{field} offset")
        if offset % alignment:
            cursor.fail(f"{field} offset", f"{offset}, no multiple of {alignment}", cursor.pos - 8)
        if offset + nbytes >= 1 << 63:
            cursor.fail(f"{field} size", f"ne={list(ne)} at offset {offset} passes 2^63 bytes", at)
        yield _Row(at, name, dtype, ne, nbytes, offset)


def _ne(cursor: _Cursor, field: str) -> tuple[int, ...]:
    n_dims = cursor.integer(4, f"{field} dimensions")
    if not 1 <= n_dims <= MAX_DIMS:
        cursor.fail(f"{field} dimensions", f"{n_dims}, must be 1 to {MAX_DIMS}", cursor.pos - 4)
    ne = tuple(cursor.integer(8, f"{field} ne[{i}]") for i in range(n_dims))
    if 0 in ne:
        cursor.fail(f"{field} ne", f"{list(ne)} holds a zero", cursor.pos - 8 * n_dims)
    return ne


def _dtype(cursor: _Cursor, field: str) -> DType:
    id_ = cursor.integer(4, f"{field} type")
    if id_ in BY_ID:
        return BY_ID[id_]
    if id_ in _REMOVED_TYPES:
        problem = f"{id_} was removed from ggml; convert the model again"
    elif _FIRST_IK_TYPE <= id_ < 512:
        problem = f"{id_} is an ik_llama.cpp type, which pyggml does not read"
    else:
        problem = f"{id_} does not exist"
    cursor.fail(f"{field} type", problem, cursor.pos - 4)


def _placed(
    cursor: _Cursor, rows: list[_Row], start: int, size: int | None, part: int
) -> list[TensorInfo]:
    for row in rows:
        if size is not None and start + row.offset + row.nbytes > size:
            cursor.fail(
                f"tensor {row.name!r}",
                f"{row.nbytes} bytes from {start + row.offset} pass the end of the file, {size} "
                "(a header alone opens with allow_missing_data=True)",
                row.at,
            )
    for before, row in pairwise(sorted(rows, key=lambda row: row.offset)):
        if row.offset < before.offset + before.nbytes:
            cursor.fail(f"tensor {row.name!r} offset", f"overlaps {before.name!r}", row.at)
    return [TensorInfo(r.name, r.dtype, r.ne, start + r.offset, r.nbytes, part) for r in rows]

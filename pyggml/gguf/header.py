"""Parsing and checking the header of one GGUF file: keys, then the tensor table. Reads no weights.

The parser checks every length, count, type, dimension and offset against the bytes in the file
before it uses them. It takes time linear in the size of the header, which is at most MAX_HEADER
bytes with MAX_KEYS keys and MAX_TENSORS tensors.

Our choices where the format or other readers leave a choice:

refused   a key that is empty, longer than 65,535 bytes, repeated or not UTF-8; a bool other than 0
          and 1; an array of arrays; a tensor whose name is empty or longer than 63 bytes; more than
          4 dimensions; overlapping tensors; an alignment that is not a power of two from 8 to
          65,536
accepted  a tensor without dimensions (one element) or with a dimension of 0 (no elements); a tensor
          of an unknown type (`GGUFFile.array` refuses it); gaps between tensors; data in any order;
          bytes after the last tensor
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from struct import Struct
from typing import Any, NamedTuple

import numpy as np

from pyggml.dtypes import BY_ID, DType
from pyggml.errors import ShapeError
from pyggml.gguf.cursor import Cursor, Source, u32
from pyggml.gguf.format import (
    ARRAY,
    BOOL,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_ALIGNMENT,
    MAX_DIMS,
    MAX_KEY,
    MAX_KEYS,
    MAX_NAME,
    MAX_TENSORS,
    SCALAR_CODES,
    SCALARS,
    STRING,
    U32,
    StringArray,
    TensorInfo,
    Value,
    foreign_type,
    padded,
    u64,
)

_OTHER_FORMATS = {
    b"lmgg": "an old GGML file", b"tjgg": "an old GGJT file", b"fmgg": "an old GGMF file",
    b"FUGG": "a byte-swapped GGUF file", b"\x1f\x8b": "gzip data", b"PK": "a zip archive",
    b"<": "HTML or XML, perhaps a failed download",
    b"version https://git-lfs": "a Git LFS pointer: run `git lfs pull`",
}  # fmt: skip

#: Bytes of one value of each type; for a string, bytes of its length.
_SIZES = {id_: dtype.itemsize for id_, dtype in SCALARS.items()} | {STRING: 8}
_READERS = {id_: Struct(f"<{SCALAR_CODES[id_]}").unpack_from for id_ in SCALARS}
#: The fields after a tensor's name and its number of dimensions: ne, type, offset.
_ROWS = [Struct(f"<{n}QIQ") for n in range(MAX_DIMS + 1)]


class Header(NamedTuple):
    """scalars: the types of the keys with one number or bool."""

    version: int
    fields: dict[str, Value]
    scalars: dict[str, np.dtype[Any]]
    tensors: list[TensorInfo]
    data_start: int


def parse(
    source: Source, size: int, path: str, *, part: int = 0, allow_missing_data: bool = False
) -> Header:
    """The header at the start of `source`, a file of `size` bytes; GGUFError if it is malformed.

    Errors call the file `path`. `allow_missing_data` accepts tensors past the end of the file.
    """
    cursor = Cursor(source, path)
    version = _version(cursor)
    n_tensors = cursor.count("tensor count", least=24, most=MAX_TENSORS)
    n_keys = cursor.count("key count", least=14, most=MAX_KEYS)
    spans = _keys(cursor, n_keys)
    alignment = _alignment(cursor, spans.get("general.alignment"))
    rows = list(_rows(cursor, n_tensors, alignment))
    start = padded(cursor.pos, alignment)
    tensors = _tensors(cursor, rows, start, None if allow_missing_data else size, part)
    # Values are copied out last, so that a malformed file costs almost no memory.
    fields = {key: _value(cursor, key, span) for key, span in spans.items()}
    scalars = {
        key: SCALARS[span.type]
        for key, span in spans.items()
        if span.length is None and span.type in SCALARS
    }
    return Header(version, fields, scalars, tensors, start)


class _Span(NamedTuple):
    """Where a value is. `length` is None for a scalar; a string's span begins at its length."""

    type: int
    length: int | None
    start: int
    stop: int


def _version(cursor: Cursor) -> int:
    head = cursor.source[:32]
    if not head.startswith(MAGIC):
        other = next((n for magic, n in _OTHER_FORMATS.items() if head.startswith(magic)), None)
        hint = f"; this is {other}" if other else ""
        cursor.fail("magic", f"expected {MAGIC!r}, got {head[:4]!r}{hint}")
    cursor.take(4, "magic")
    version = cursor.u32("version")
    if version not in (2, 3):
        big_endian = version in (2 << 24, 3 << 24)
        hint = "; convert this big-endian file to little-endian" if big_endian else ""
        cursor.fail("version", f"{version}, must be 2 or 3{hint}", 4)
    return version


def _keys(cursor: Cursor, count: int) -> dict[str, _Span]:
    spans: dict[str, _Span] = {}
    for i in range(count):
        at = cursor.pos
        cursor.subject = f"key {i}"
        key = cursor.name(MAX_KEY)
        if key in spans:
            cursor.fail("", f"{key!r} occurs twice", at)
        cursor.subject = f"key {key!r}"
        spans[key] = _span(cursor)
    cursor.subject = ""
    return spans


def _span(cursor: Cursor) -> _Span:
    type_, length = cursor.u32(" type"), None
    is_array = type_ == ARRAY
    if is_array:
        type_ = cursor.u32(" element type")
    if type_ == ARRAY:
        cursor.fail(" element type", "an array of arrays is not supported", cursor.pos - 4)
    if type_ not in _SIZES:
        cursor.fail(" type", f"{type_} does not exist", cursor.pos - 4)
    if is_array:
        length = cursor.count(" length", _SIZES[type_])
    start, number = cursor.pos, 1 if length is None else length
    if type_ == STRING:
        _skip_strings(cursor, number)
    else:
        cursor.take(number * _SIZES[type_], "")
    return _Span(type_, length, start, cursor.pos)


def _skip_strings(cursor: Cursor, count: int) -> None:
    # The only long loop of a parse, so it avoids method calls.
    source, pos, last = cursor.source, cursor.pos, cursor.end - 8
    for i in range(count):
        if pos > last:
            cursor.fail(f", string {i}", "starts past the end of the header", pos)
        pos += 8 + u64(source, pos)[0]
    if pos > cursor.end:
        left = cursor.end - cursor.pos
        cursor.fail("", f"{pos - cursor.pos} bytes of strings, but only {left} left")
    cursor.pos = pos


def _value(cursor: Cursor, key: str, span: _Span) -> Value:
    cursor.subject = f"key {key!r}"
    if span.length is None:
        if span.type == STRING:
            return cursor.decode(span.start + 8, span.stop)
        if span.type == BOOL and cursor.source[span.start] > 1:
            cursor.fail("", "a bool must be 0 or 1", span.start)
        scalar: bool | int | float = _READERS[span.type](cursor.source, span.start)[0]
        return scalar
    raw = cursor.source[span.start : span.stop]
    if span.type == STRING:
        return StringArray(raw, span.length, f"{cursor.path}: byte {span.start}, key {key!r}")
    if span.type == BOOL and raw.strip(b"\0\1"):
        cursor.fail("", "a bool must be 0 or 1", span.start)
    return np.frombuffer(raw, SCALARS[span.type])


def _alignment(cursor: Cursor, span: _Span | None) -> int:
    if span is None:
        return DEFAULT_ALIGNMENT
    field = "key 'general.alignment'"
    if span.type != U32 or span.length is not None:
        cursor.fail(field, "must be a u32", span.start)
    alignment: int = u32(cursor.source, span.start)[0]
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


def _rows(cursor: Cursor, count: int, alignment: int) -> Iterator[_Row]:
    names: set[str] = set()
    for i in range(count):
        at = cursor.pos
        cursor.subject = f"tensor {i} name"
        name = cursor.name(MAX_NAME)
        cursor.subject = f"tensor {name!r}"
        if name in names:
            cursor.fail("", "occurs twice", at)
        names.add(name)
        n_dims = cursor.u32(" dimensions")
        if n_dims > MAX_DIMS:
            cursor.fail(" dimensions", f"{n_dims}, must be 0 to {MAX_DIMS}", cursor.pos - 4)
        row = _ROWS[n_dims]
        *sizes, id_, offset = row.unpack_from(cursor.source, cursor.take(row.size, " row"))
        ne = tuple(sizes)
        dtype = BY_ID.get(id_) or foreign_type(id_)
        if dtype is None:
            cursor.fail(" type", f"{id_} does not exist", cursor.pos - 12)
        if offset % alignment:
            cursor.fail(" offset", f"{offset}, must be a multiple of {alignment}", cursor.pos - 8)
        try:
            nbytes = dtype.tensor_bytes(ne)
        except ShapeError as error:
            cursor.fail(" ne[0]", str(error), at)
        # A dimension of 0 counts as 1 here, because NumPy limits the shape of an empty array too.
        if offset + math.prod(n or 1 for n in ne) * max(dtype.nbytes, 1) >= 1 << 63:
            cursor.fail(" size", f"ne={list(ne)} at offset {offset} exceeds 2^63 bytes", at)
        yield _Row(at, name, dtype, ne, nbytes, offset)
    cursor.subject = ""


def _tensors(
    cursor: Cursor, rows: list[_Row], start: int, size: int | None, part: int
) -> list[TensorInfo]:
    for row in rows:
        if size is not None and start + row.offset + row.nbytes > size:
            cursor.fail(
                f"tensor {row.name!r}",
                f"its {row.nbytes} bytes at {start + row.offset} pass the end of the file at "
                f"{size}: the file is incomplete; use allow_missing_data=True to open a header "
                "without its weights",
                row.at,
            )
    # A tensor without bytes overlaps nothing.
    ordered = sorted((row for row in rows if row.nbytes), key=lambda row: row.offset)
    for before, row in pairwise(ordered):
        if row.offset < before.offset + before.nbytes:
            cursor.fail(f"tensor {row.name!r} offset", f"overlaps {before.name!r}", row.at)
    return [TensorInfo(r.name, r.dtype, r.ne, start + r.offset, r.nbytes, part) for r in rows]

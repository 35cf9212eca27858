"""Opening GGUF files, single or split, through memory maps. Weights are read on first use."""

from __future__ import annotations

import difflib
import mmap
import os
import re
import stat
from collections.abc import Callable, Hashable, Iterable
from contextlib import ExitStack
from io import FileIO
from os import PathLike
from typing import Any, TypeVar

import numpy as np

from pyggml.errors import GGUFError, UnknownNameError
from pyggml.gguf.format import TensorInfo, Value, why_unknown
from pyggml.gguf.header import Header, parse
from pyggml.words import counted

V = TypeVar("V")
_SPLIT_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf\Z")


class Names(dict[str, V]):
    """A dict whose KeyError is an UnknownNameError that suggests the nearest names."""

    def __missing__(self, name: str) -> V:
        near = difflib.get_close_matches(str(name), self, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else f" among {len(self)}"
        raise UnknownNameError(f"no {name!r} here{hint}")


class GGUFFile:
    """An open GGUF file, from `pyggml.gguf.open`; a context manager.

    version   2 or 3
    fields    key -> bool, int, float, str, array, or StringArray, in the file's order
    tensors   name -> TensorInfo, in the file's order
    paths     one path, or those of all parts of a split model that exist
    missing   paths of the missing parts of a split model opened with allow_missing_data; `tensors`
              does not list their tensors
    complete  False if opened with allow_missing_data and weights are missing
    values    None, or a function of a tensor's name that `array` calls in place of reading the file

    `fields`, `tensors` and the arrays you already have stay valid after `close()`.
    """

    def __init__(self, parts: list[_Part], missing: list[str], allow_missing_data: bool) -> None:
        headers = [part.header(i, allow_missing_data) for i, part in enumerate(parts)]
        self._parts = parts
        self.paths = [part.path for part in parts]
        self.missing = missing
        self.values: Callable[[str], np.ndarray[Any, Any]] | None = None
        self.version = headers[0].version
        self.complete = not missing and all(
            p.holds(t) for p, h in zip(parts, headers, strict=True) for t in h.tensors
        )
        self.fields: Names[Value] = Names(headers[0].fields)
        self._scalars = headers[0].scalars
        self._identities = [part.identity for part in parts]
        self.tensors: Names[TensorInfo] = Names()
        for part, header in zip(parts, headers, strict=True):
            for info in header.tensors:
                if info.name in self.tensors:
                    first = self.paths[self.tensors[info.name].part]
                    raise GGUFError(f"{part.path}: tensor {info.name!r} is also in {first}")
                self.tensors[info.name] = info
        if len(parts) + len(missing) > 1:
            _check_split(parts, headers, missing)

    def typed_fields(self) -> dict[str, Value | np.generic]:
        """`fields`, with numbers as NumPy scalars of the file's types, which `write` keeps."""
        scalars = self._scalars
        return {
            key: scalars[key].type(value) if key in scalars else value
            for key, value in self.fields.items()
        }

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """The values of a tensor, read-only and memory-mapped, in NumPy shape (reversed ne).

        f64 f32 f16 i8 i16 i32 i64   elements of that type           [..., ne1, ne0]
        bf16                         uint16                          [..., ne1, ne0]
        block types                  uint8, rows as in the file      [..., ne1, row_bytes]

        UnknownNameError for a name the file does not have. GGUFError if the file is closed, no
        longer contains the bytes, or stores them in an unknown type. Truncating the file while the
        array is in use kills the process (SIGBUS): replace the file instead.
        """
        if name not in self.tensors and self.missing:
            raise GGUFError(
                f"{self.paths[0]}: no tensor {name!r} in the parts that exist; "
                f"missing: {', '.join(self.missing)}"
            )
        info = self.tensors[name]
        if self.values is not None:
            return self.values(name)
        if not self._parts:
            raise GGUFError(f"{self.paths[info.part]}: tensor {name!r}: the file is closed")
        return self._parts[info.part].array(info)

    def source(self, name: str) -> Hashable:
        """Where the bytes of a tensor are: the file, as it was when it was opened, and the offset.

        Equal for the same tensor of the same file, however often it is opened.
        UnknownNameError for a name the file does not have.
        """
        info = self.tensors[name]
        if self.values is not None:
            return self.values, name
        return (*self._identities[info.part], info.offset)

    def close(self) -> None:
        """Close the files. Safe to call twice."""
        for part in self._parts:
            part.close()
        self._parts = []

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        keys, tensors = counted(len(self.fields), "key"), counted(len(self.tensors), "tensor")
        return f"GGUFFile({self.paths[0]!r}, {keys}, {tensors})"


def open(path: str | bytes | PathLike[str], *, allow_missing_data: bool = False) -> GGUFFile:
    """Open a GGUF file of version 2 or 3; of a split model, its first part (-00001-of-000NN).

    allow_missing_data  accept a file without its weights, truncated, or without some later parts;
                        `array` then refuses the missing tensors
    GGUFError (file, byte, field, problem) for anything but a complete, well-formed file.
    """
    with ExitStack() as stack:
        first = _Part(os.fsdecode(path), stack)
        parts, missing = [first], []
        for number, other in enumerate(_other_parts(first, allow_missing_data), 1):
            if allow_missing_data and not os.path.lexists(other):
                missing.append(other)
            else:
                parts.append(_Part(other, stack, number))
        file = GGUFFile(parts, missing, allow_missing_data)
        stack.pop_all()
    return file


class _Part:
    """One mapped file: number `number` of a split model, counted from 0."""

    def __init__(self, path: str, stack: ExitStack, number: int = 0) -> None:
        self.path, self.number = path, number
        self._header: Header | None = None
        try:
            # Before opening, because opening a FIFO would wait for a writer.
            regular = stat.S_ISREG(os.stat(path).st_mode)
            if regular:
                self._file = stack.enter_context(FileIO(path))
                status = os.fstat(self._file.fileno())
                self._size = status.st_size
                #: Changes if the file is replaced or written to.
                self.identity = status.st_dev, status.st_ino, status.st_mtime_ns, self._size
                if not self._size:  # nothing to map
                    raise GGUFError(f"{path}: the file is empty")
                self._map = mmap.mmap(self._file.fileno(), self._size, access=mmap.ACCESS_READ)
        except GGUFError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise GGUFError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
        if not regular:
            raise GGUFError(f"{path}: not a regular file")

    def header(self, index: int, allow_missing_data: bool) -> Header:
        if self._header is None:
            self._header = parse(
                self._map, self._size, self.path, part=index, allow_missing_data=allow_missing_data
            )
        return self._header

    def holds(self, info: TensorInfo) -> bool:
        """Whether the file still contains the data; it may have shrunk since it was mapped."""
        size = min(self._size, os.fstat(self._file.fileno()).st_size)
        return info.offset + info.nbytes <= size

    def array(self, info: TensorInfo) -> np.ndarray[Any, Any]:
        if info.dtype.kind == "unknown":
            raise GGUFError(f"{self.path}: tensor {info.name!r}: {why_unknown(info.dtype)}")
        if not self.holds(info):
            raise GGUFError(
                f"{self.path}: byte {info.offset}, tensor {info.name!r}: its {info.nbytes} bytes "
                "of data are not in the file"
            )
        if not info.nbytes:  # an offset at the end of the file
            return info.array(np.empty(0, np.uint8))
        return info.array(np.frombuffer(self._map, np.uint8, info.nbytes, info.offset))

    def close(self) -> None:
        # The map itself is freed with the last array that uses it.
        self._file.close()


def _other_parts(first: _Part, allow_missing_data: bool) -> Iterable[str]:
    """The paths of parts 2 to N if the keys of `first` say that it is one of N."""
    fields = first.header(0, allow_missing_data).fields
    count = fields.get("split.count", 1)
    if type(count) is not int or not 0 <= count <= 65_535:
        raise GGUFError(f"{first.path}: key 'split.count': {count!r}, must be 0 to 65535")
    if count <= 1:
        return []
    match = _SPLIT_NAME.search(first.path)
    if match is None or int(match[2]) != count:
        raise GGUFError(
            f"{first.path}: key 'split.count': {count} parts, so the file name must end in "
            f"-00001-of-{count:05}.gguf"
        )
    stem = first.path[: match.start()]
    if int(match[1]) != 1:
        raise GGUFError(
            f"{first.path}: not the first part of the model; open {stem}-00001-of-{count:05}.gguf"
        )
    return [f"{stem}-{i:05}-of-{count:05}.gguf" for i in range(2, count + 1)]


def _check_split(parts: list[_Part], headers: list[Header], missing: list[str]) -> None:
    count = len(parts) + len(missing)
    for part, header in zip(parts, headers, strict=True):
        number, of = header.fields.get("split.no"), header.fields.get("split.count")
        if (number, of) != (part.number, count):
            raise GGUFError(
                f"{part.path}: keys 'split.no' and 'split.count' are {number} and {of}, "
                f"expected {part.number} and {count}"
            )
    total = sum(len(header.tensors) for header in headers)
    declared = headers[0].fields.get("split.tensors.count", total)
    if declared != total and not missing:
        raise GGUFError(
            f"{parts[0].path}: key 'split.tensors.count': {declared}, but the parts have {total} "
            "tensors"
        )

"""Reading a GGUF header: a position in its bytes that checks what it reads."""

from __future__ import annotations

import mmap
from struct import Struct
from typing import NoReturn, TypeAlias

from pyggml.errors import GGUFError
from pyggml.gguf.format import MAX_HEADER, u64

Source: TypeAlias = bytes | mmap.mmap

u32 = Struct("<I").unpack_from


class Cursor:
    """A position in the header; reading past the end is a GGUFError.

    subject  the key or tensor being read; error messages begin with it
    """

    def __init__(self, source: Source, path: str) -> None:
        self.source, self.path, self.pos = source, path, 0
        self.end = min(len(source), MAX_HEADER)
        self.subject = ""

    def fail(self, field: str, problem: str, at: int | None = None) -> NoReturn:
        """GGUFError with the file, the byte (default: the current one), the subject and field."""
        byte = self.pos if at is None else at
        raise GGUFError(f"{self.path}: byte {byte}, {self.subject}{field}: {problem}")

    def take(self, nbytes: int, field: str) -> int:
        """Skip `nbytes` and return where they start."""
        start = self.pos
        if nbytes > self.end - start:
            end = "the header size limit" if self.end == MAX_HEADER else "the end of the file"
            self.fail(field, f"{nbytes} bytes needed, {self.end - start} left before {end}")
        self.pos = start + nbytes
        return start

    def u32(self, field: str) -> int:
        number: int = u32(self.source, self.take(4, field))[0]
        return number

    def u64(self, field: str) -> int:
        number: int = u64(self.source, self.take(8, field))[0]
        return number

    def count(self, field: str, least: int, most: int | None = None) -> int:
        """A u64 count, at most `most`, of items that take at least `least` bytes each."""
        number = self.u64(field)
        if number * least > self.end - self.pos:
            left = self.end - self.pos
            self.fail(field, f"{number} do not fit in the {left} bytes left", self.pos - 8)
        if most is not None and number > most:
            self.fail(field, f"{number}, must be at most {most}", self.pos - 8)
        return number

    def name(self, longest: int) -> str:
        """A string of 1 to `longest` bytes."""
        length = self.u64(" length")
        if not 1 <= length <= longest:
            self.fail(" length", f"{length}, must be 1 to {longest}", self.pos - 8)
        return self.decode(self.take(length, ""), self.pos)

    def decode(self, start: int, stop: int) -> str:
        try:
            return self.source[start:stop].decode()
        except UnicodeDecodeError as error:
            self.fail("", f"not UTF-8: {error.reason}", start + error.start)

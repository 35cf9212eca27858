"""What a GGUF file is made of: constants of the format, key values, rows of the tensor table."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, overload

import numpy as np

from pyggml.dtypes import DType
from pyggml.errors import GGUFError

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 65_536
MAX_DIMS = 4
MAX_NAME = 63
MAX_KEY = 65_535
#: Largest keys-and-table part that is read. A vocabulary of 250,000 tokens takes about 15 MB.
MAX_HEADER = 128 << 20

U32, BOOL, STRING, ARRAY = 4, 7, 8, 9
#: Key value types by GGUF id, as NumPy holds them; string (8) and array (9) stand apart.
SCALARS: dict[int, np.dtype[Any]] = {
    id_: np.dtype(name)
    for id_, name in {
        0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
        10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}  # fmt: skip

u64 = struct.Struct("<Q").unpack_from


class StringArray(Sequence[str]):
    """A read-only array of strings, decoded on first use (a vocabulary opens in milliseconds).

    `data` is `count` times a u64 length and that many bytes. An element that is not UTF-8 raises
    GGUFError, naming `where`, when the array is first looked into; `raw()` gives plain bytes.
    """

    def __init__(self, data: bytes, count: int, where: str) -> None:
        self._data, self._count, self._where = data, count, where
        self._values: list[str] | None = None

    def raw(self) -> list[bytes]:
        data, pos = self._data, 0
        out = []
        for _ in range(self._count):
            start = pos + 8
            pos = start + u64(data, pos)[0]
            out.append(data[start:pos])
        return out

    def _decoded(self) -> list[str]:
        if self._values is None:
            try:
                self._values = [text.decode() for text in self.raw()]
            except UnicodeDecodeError as error:
                raise GGUFError(f"{self._where}: an element is not UTF-8: {error}") from error
        return self._values

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._decoded()[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._decoded())

    def __repr__(self) -> str:
        return f"StringArray({self._count} strings)"


#: A key's value as Python sees it. Numbers lose their width: 7 is 7, u32 or i8.
Value: TypeAlias = bool | int | float | str | np.ndarray[Any, Any] | StringArray


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One row of the tensor table.

    ne      ggml's order, as many numbers as the file gives
    offset  of the first byte, from the start of its file
    part    index of the file that holds it (0 unless the model is split)
    """

    name: str
    dtype: DType
    ne: tuple[int, ...]
    offset: int
    nbytes: int
    part: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """NumPy's order: the reverse of `ne`."""
        return self.ne[::-1]

    @property
    def n_elements(self) -> int:
        return math.prod(self.ne)


def padded(nbytes: int, alignment: int) -> int:
    """The next multiple of `alignment`."""
    return -(-nbytes // alignment) * alignment

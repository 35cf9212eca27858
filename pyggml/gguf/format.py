"""The parts of a GGUF file: format constants, key values, rows of the tensor table."""

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
#: Largest header (keys and tensor table) we read. A vocabulary of 250,000 tokens takes about 15 MB.
MAX_HEADER = 128 << 20
#: Most keys and tensors we read. Model files have about 50 keys, and 50,000 tensors if every expert
#: of DeepSeek-V3 is a separate tensor.
MAX_KEYS = 65_536
MAX_TENSORS = 262_144

U32, BOOL, STRING, ARRAY = 4, 7, 8, 9
#: Scalar key types by GGUF id, as `struct` and NumPy spell them. String (8) and array (9) are not
#: scalars.
SCALAR_CODES = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
SCALARS: dict[int, np.dtype[Any]] = {
    id_: np.dtype(f"<{code}") for id_, code in SCALAR_CODES.items()
}

#: llama.cpp's general.file_type of a file whose weights are mostly of a type.
FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_K": 10,
    "q3_K": 11, "q4_K": 14, "q5_K": 16, "q6_K": 18, "iq2_xxs": 19, "iq2_xs": 20, "iq3_xxs": 23,
    "iq1_s": 24, "iq4_nl": 25, "iq3_s": 26, "iq2_s": 28, "iq4_xs": 30, "bf16": 32, "tq1_0": 36,
    "tq2_0": 37, "mxfp4": 38,
}  # fmt: skip

u64 = struct.Struct("<Q").unpack_from

_REMOVED_TYPES = frozenset({4, 5, 31, 32, 33, 36, 37, 38})
_IK_TYPES = range(97, 512)


def foreign_type(id_: int) -> DType | None:
    """A stand-in DType for a type that `dtypes.TYPES` does not list; it has no size and no decoder.

    A file may contain such tensors among others. None for an id that no ggml version uses or is
    likely to use soon.
    """
    if id_ not in range(_IK_TYPES.stop):
        return None
    return DType(f"type {id_}", id_, 1, 0, "unknown")


def why_unknown(dtype: DType) -> str:
    """Why pyggml cannot read a stand-in's type."""
    if dtype.ggml_id in _REMOVED_TYPES:
        return f"{dtype} was removed from ggml; convert the model again"
    if dtype.ggml_id in _IK_TYPES:
        return f"{dtype} is an ik_llama.cpp type, which pyggml does not read"
    return f"{dtype} is newer than this pyggml, or not a type at all"


class StringArray(Sequence[str]):
    """A read-only array of strings, decoded on first use (a vocabulary opens in milliseconds).

    `data` is `count` strings, each a u64 length followed by that many bytes. The first access
    raises a GGUFError that names `where` if any element is not UTF-8; `raw()` returns bytes.
    """

    def __init__(self, data: bytes, count: int, where: str) -> None:
        self._data, self._count, self._where = data, count, where
        self._values: list[str] | None = None

    def raw(self) -> list[bytes]:
        data, pos = self._data, 0
        texts = []
        for _ in range(self._count):
            start = pos + 8
            pos = start + u64(data, pos)[0]
            texts.append(data[start:pos])
        return texts

    def _strings(self) -> list[str]:
        if self._values is None:
            texts = self.raw()
            try:
                # Decoding all of them at once takes a third of the time. UTF-8 has no zero byte
                # inside a character, so zero bytes can separate the texts, unless a text has one.
                values = b"\0".join(texts).decode().split("\0")
                if len(values) != self._count:
                    values = [text.decode() for text in texts]
            except UnicodeDecodeError as error:
                raise GGUFError(f"{self._where}: an element is not UTF-8: {error}") from error
            self._values = values
        return self._values

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._strings()[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._strings())

    def __repr__(self) -> str:
        return f"StringArray({self._count} strings)"


#: A key's value in Python. Numbers lose their width: a u32 7 and an i8 7 are both 7.
Value: TypeAlias = bool | int | float | str | np.ndarray[Any, Any] | StringArray


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One row of the tensor table.

    ne      ggml's order, as many numbers as the file has: none for a single element
    offset  of its first byte, counted from the start of its file
    nbytes  0 for an unknown type (dtype.kind "unknown")
    part    index of its file in `GGUFFile.paths` (0 unless the model is split)
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

    def array(self, data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The tensor's bytes as `GGUFFile.array` gives them."""
        dtype, shape = self.dtype, self.shape
        element = dtype.numpy or ("<u2" if dtype.block == 1 else "u1")
        if dtype.block > 1:
            shape = (*shape[:-1], dtype.row_bytes(self.ne[0]))
        return data.view(element).reshape(shape)


def padded(nbytes: int, alignment: int) -> int:
    """`nbytes` rounded up to a multiple of `alignment`."""
    return -(-nbytes // alignment) * alignment

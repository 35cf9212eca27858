"""Element types and GGUF block formats as data: names, ids, block sizes. No codecs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from pyggml.errors import DTypeError, ShapeError

Kind: TypeAlias = Literal["float", "int", "block", "unknown"]


@dataclass(frozen=True, slots=True)
class DType:
    """One element type of ggml.

    name     as ggml prints it: "f32", "q4_K", "iq4_nl"
    ggml_id  its number in GGUF files
    block    elements in one block (1 for plain types)
    nbytes   bytes of one block
    kind     "float" (f64 f32 f16 bf16), "int" or "block"; "unknown" for a type in a file that is
             not in `TYPES`
    numpy    the NumPy type string of one element; None if NumPy has no such type (bf16, blocks)
    """

    name: str
    ggml_id: int
    block: int
    nbytes: int
    kind: Kind
    numpy: str | None = None

    def __str__(self) -> str:
        return self.name

    def row_bytes(self, ne0: int) -> int:
        """Bytes of a contiguous row of `ne0` elements; ShapeError unless it is whole blocks."""
        blocks, remainder = divmod(ne0, self.block)
        if remainder:
            raise ShapeError(
                f"a row of {ne0} elements does not divide into {self.name} blocks of {self.block}; "
                f"use a multiple of {self.block} or another type"
            )
        return blocks * self.nbytes

    def tensor_bytes(self, ne: tuple[int, ...]) -> int:
        """Bytes of a contiguous tensor of size `ne` (ggml's order; () is one element)."""
        return self.row_bytes(ne[0] if ne else 1) * math.prod(ne[1:])


def _table() -> dict[str, DType]:
    plain: list[tuple[str, int, int, Kind, str | None]] = [
        ("f32", 0, 4, "float", "<f4"),
        ("f16", 1, 2, "float", "<f2"),
        ("bf16", 30, 2, "float", None),
        ("f64", 28, 8, "float", "<f8"),
        ("i8", 24, 1, "int", "|i1"),
        ("i16", 25, 2, "int", "<i2"),
        ("i32", 26, 4, "int", "<i4"),
        ("i64", 27, 8, "int", "<i8"),
    ]
    blocks = [
        ("q4_0", 2, 32, 18), ("q4_1", 3, 32, 20), ("q5_0", 6, 32, 22),
        ("q5_1", 7, 32, 24), ("q8_0", 8, 32, 34), ("q8_1", 9, 32, 40),
        ("q2_K", 10, 256, 84), ("q3_K", 11, 256, 110), ("q4_K", 12, 256, 144),
        ("q5_K", 13, 256, 176), ("q6_K", 14, 256, 210), ("q8_K", 15, 256, 292),
        ("iq2_xxs", 16, 256, 66), ("iq2_xs", 17, 256, 74), ("iq3_xxs", 18, 256, 98),
        ("iq1_s", 19, 256, 50), ("iq4_nl", 20, 32, 18), ("iq3_s", 21, 256, 110),
        ("iq2_s", 22, 256, 82), ("iq4_xs", 23, 256, 136), ("iq1_m", 29, 256, 56),
        ("tq1_0", 34, 256, 54), ("tq2_0", 35, 256, 66), ("mxfp4", 39, 32, 17),
        ("nvfp4", 40, 64, 36), ("q1_0", 41, 128, 18),
    ]  # fmt: skip
    types = [DType(name, id_, 1, size, kind, numpy) for name, id_, size, kind, numpy in plain]
    types += [DType(name, id_, block, size, "block") for name, id_, block, size in blocks]
    return {t.name: t for t in types}


TYPES: dict[str, DType] = _table()
BY_ID: dict[int, DType] = {t.ggml_id: t for t in TYPES.values()}
_BY_FOLDED: dict[str, DType] = {name.lower(): t for name, t in TYPES.items()}

F32, F16, BF16, I32, I64 = (TYPES[n] for n in ("f32", "f16", "bf16", "i32", "i64"))

_BY_NUMPY: dict[np.dtype[Any], DType] = {np.dtype(t.numpy): t for t in TYPES.values() if t.numpy}

#: Ways to name an element type: a string, a `DType`, or NumPy's type (`np.float16`, `array.dtype`).
DTypeLike: TypeAlias = str | DType | type | np.dtype[Any]


def dtype(name: DTypeLike) -> DType:
    """The type called `name`, ignoring case ("Q4_K" is q4_K), or the type equal to a NumPy type.

    DTypeError for an unknown one; the message lists all types.
    """
    if isinstance(name, DType):
        return name
    match: DType | None
    if isinstance(name, str):
        match = _BY_FOLDED.get(name.lower())
    else:
        match = _of_numpy(name)
    if match is None:
        near = _of_numpy(name)
        hint = f"; did you mean {near.name!r}?" if near is not None else ""
        raise DTypeError(f"unknown type {name!r}{hint}; known types: {', '.join(TYPES)}")
    return match


def _of_numpy(name: Any) -> DType | None:
    """The type equal to a NumPy type, or to one that NumPy knows by this name."""
    if name is None:  # np.dtype(None) is float64
        return None
    try:
        return _BY_NUMPY.get(np.dtype(name))
    except (TypeError, ValueError, SyntaxError):  # NumPy parses strings
        return None

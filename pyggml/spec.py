"""Spec: the type and size of a tensor.

`ne` is in ggml's order, with the contiguous dimension first; `shape` is in NumPy's order. A Spec
always has four dimensions, each at least 1. `rank` is how many of them the caller gave; `shape` and
printing show only those.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, TypeAlias

from pyggml.dtypes import DType, DTypeLike
from pyggml.dtypes import dtype as dtype_of
from pyggml.errors import DTypeError, ShapeError

Ne: TypeAlias = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Spec:
    """Type and size of a tensor.

    ne    ggml's order, ne[0] contiguous, always four numbers
    rank  the number of dimensions that the caller gave
    """

    dtype: DType
    ne: Ne
    rank: int

    @classmethod
    def of(cls, dtype: DTypeLike, ne: tuple[int, ...] | list[int], rank: int | None = None) -> Spec:
        """A checked Spec.

        ShapeError unless there are one to four sizes, each at least 1, and ne[0] is whole blocks.
        """
        element = dtype_of(dtype)
        sizes = integers("ne=", ne)
        if not 1 <= len(sizes) <= 4:
            raise ShapeError(f"a tensor must have one to four dimensions, not {len(sizes)}")
        if min(sizes) < 1:
            raise ShapeError(f"every size must be at least 1; got ne={list(sizes)}")
        element.row_bytes(sizes[0])
        full = sizes + (1,) * (4 - len(sizes))
        return cls(element, (full[0], full[1], full[2], full[3]), rank or len(sizes))

    @property
    def shape(self) -> tuple[int, ...]:
        """NumPy's order: the reverse of `ne`, with `rank` dimensions."""
        return self.ne[self.rank - 1 :: -1]

    @property
    def elements(self) -> int:
        """Number of elements: the product of `ne`."""
        return math.prod(self.ne)

    @property
    def nbytes(self) -> int:
        """Bytes of a contiguous tensor: row_bytes(ne[0]) ne[1] ne[2] ne[3]."""
        return self.dtype.row_bytes(self.ne[0]) * self.ne[1] * self.ne[2] * self.ne[3]

    @property
    def nb(self) -> Ne:
        """Byte strides of a contiguous tensor; nb[0] is the size of one block."""
        row = self.dtype.row_bytes(self.ne[0])
        return (self.dtype.nbytes, row, row * self.ne[1], row * self.ne[1] * self.ne[2])

    def __str__(self) -> str:
        return f"{self.dtype.name} [{', '.join(map(str, self.ne[: self.rank]))}]"


def integers(what: str, value: Any) -> tuple[int, ...]:
    """`value` as a tuple of Python ints; DTypeError unless it is a sequence of whole numbers.

    what  the argument's name in the error message
    """
    try:
        if not any(isinstance(v, bool) for v in value):
            return tuple(operator.index(v) for v in value)
    except TypeError:
        pass
    raise DTypeError(f"{what} takes whole numbers such as (64, 32), not {value!r}")

"""The inner loops of products by how a matrix is stored.

All of them multiply 16 rows with a few columns, product(at, k, stride, count, xs, sums):

    at       address of the rows
    k        length of a row: elements, or groups of 32 of a weight in tiles
    stride   bytes from row to row ("rows"), from element to element ("lanes"), else not used
    count    rows that the matrix has here, 1 to 16; tiles always have 16
    xs       address of a table: the address of each column
    sums     f32 [columns][16]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pyggml.backends.host_tiles import FORMS

How = Literal["quantized", "exact", "rows", "lanes"]

#: Columns of the widest loop.
WIDE = 8


@dataclass(frozen=True, slots=True)
class Inner:
    """How a matrix of this type is multiplied.

    quantized  in tiles, by columns as groups of 8-bit integers
    exact      in tiles, by f32 columns
    rows       floats, the elements of a row adjacent, by f32 columns
    lanes      floats, the elements of a column adjacent, by f32 columns
    """

    type: str
    how: How

    @property
    def name(self) -> str:
        return f"{self.type}_{self.how}"


def times(inner: Inner) -> Any:
    """times(at, k, stride, count, xs, n, sums) for 1 to `WIDE` columns.

    The table has `WIDE` addresses; those past n must repeat a column, and their sums are garbage.
    """
    from pyggml.backends.cpu.native.isa import isa
    from pyggml.backends.cpu.native.memory import inner as compiled

    product = _product(inner)
    one, four = product(1), product(4)
    # 8 columns need 16 sums, which AVX2 does not have the registers for. Rows have 4 sums a column.
    if isa().avx512 and inner.how != "rows":
        eight = product(WIDE)

        @compiled
        def run(at: int, k: int, stride: int, count: int, xs: int, n: int, sums: int) -> None:
            if n > 4:
                eight(at, k, stride, count, xs, sums)
            elif n > 1:
                four(at, k, stride, count, xs, sums)
            else:
                one(at, k, stride, count, xs, sums)

    else:

        @compiled
        def run(at: int, k: int, stride: int, count: int, xs: int, n: int, sums: int) -> None:
            if n > 1:
                for c in range(0, n, 4):
                    four(at, k, stride, count, xs + 8 * c, sums + 64 * c)
            else:
                one(at, k, stride, count, xs, sums)

    return run


def _product(inner: Inner) -> Any:
    """From a number of columns to the intrinsic."""
    from pyggml.backends.cpu.linear import exact, floats, tile

    if inner.how == "quantized":
        return lambda columns: tile.product(FORMS[inner.type], columns)
    if inner.how == "exact":
        return lambda columns: exact.product(FORMS[inner.type], columns)
    if inner.how == "lanes":
        return lambda columns: floats.lanes(inner.type, columns)
    return lambda columns: floats.rows(inner.type, columns)

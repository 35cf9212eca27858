"""Products with weights of plain types: f32 sums of exact products, or cuBLAS."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pyggml.backends.cuda.geometry import C_TYPES, over_rows, pack_width
from pyggml.backends.cuda.launch import Call, Operand
from pyggml.backends.cuda.linear.common import (
    PREPARE,
    VEC,
    Shape,
    aligned,
    dense,
    is_narrow,
    rows_in,
    shape_of,
)
from pyggml.dtypes import F16, F32, DType
from pyggml.spec import Ne

#: Most bytes of b converted at a time for cuBLAS.
PIECE = 64 << 20


def can_vector(a: Operand, b: Operand) -> bool:
    """Whether `vec_plain` may read 16 bytes at a time."""
    size = a.dtype.nbytes
    step = 16 // size * b.dtype.nbytes
    return (
        a.nb[0] == size
        and b.nb[0] == b.dtype.nbytes
        and a.ne[0] % (16 // size) == 0
        and a.aligned(16)
        and b.aligned(min(step, 16))
    )


def plain_warps(a: Operand, vector: bool) -> int:
    return min(8, max(1, a.ne[0] // (32 * (16 // a.dtype.nbytes if vector else 1) * 2)))


def vec_plain(call: Call, a: Operand, b: Operand, y: Operand) -> None:
    shape, vector = shape_of(a.ne, b.ne), can_vector(a, b)
    chunk = 1 if shape.columns == 1 else 4 if shape.columns <= 4 else 8
    # Blocks of four rows read the columns less often, but a router or a mixer has too few of them.
    few = chunk == 1 and -(-a.ne[1] // 4) * shape.batches <= call.device.sms
    rows = 1 if few else 4
    types = f"{C_TYPES[a.dtype.name]}, {C_TYPES[b.dtype.name]}"
    call.launch(
        VEC,
        f"vec_plain<{types}, {chunk}, {rows}, {str(vector).lower()}>",
        grid=(-(-a.ne[1] // rows), -(-shape.columns // chunk), shape.batches),
        block=(32, plain_warps(a, vector)),
        args=[a.tensor, b.tensor, y.tensor, shape.heads, is_narrow(y)],
    )


def copy_rows(call: Call, source: Operand, dtype: DType, to: int, first: int, columns: int) -> None:
    """Record rows from `first` on, converted to contiguous rows of another type."""
    width = pack_width(source)
    grid, block = over_rows(source.ne[0] // width, columns)
    call.launch(
        PREPARE,
        f"copy_rows<{C_TYPES[source.dtype.name]}, {C_TYPES[dtype.name]}, {width}>",
        grid=grid,
        block=block,
        args=[source.tensor, np.uint64(to), np.uint32(first)],
    )


def leading(a: Operand, rows: int) -> tuple[int, bool] | None:
    """(leading dimension, transposed) of a matrix [k, rows] for cuBLAS; None if it cannot read
    it."""
    size = a.dtype.nbytes
    k = a.ne[0]
    if a.nb[0] == size and (rows == 1 or (a.nb[1] % size == 0 and a.nb[1] >= k * size)):
        return (k if rows == 1 else a.nb[1] // size), True
    if a.nb[1] == size and a.nb[0] % size == 0 and a.nb[0] >= rows * size:
        return a.nb[0] // size, False
    return None


def cublas_scratch(a: Ne, dtype: DType, b: Ne, exact: bool) -> int:
    """Bytes for all of b, or for one matrix of a with pieces of b and of the result."""
    size, columns = (F32 if exact else dtype).nbytes, shape_of(a, b).columns
    piece = min(columns, piece_columns(a, b, size))
    whole = rows_in(b) * b[0] * size
    by_piece = aligned(a[0] * a[1] * size, piece * b[0] * size, piece * a[1] * 4)
    return max(by_piece, aligned(whole)) if whole <= PIECE else by_piece


def piece_columns(a: Ne, b: Ne, size: int) -> int:
    return max(1, PIECE // max(b[0] * size, a[1] * 4))


def cublas(call: Call, a: Operand, b: Operand, y: Operand, exact: bool) -> None:
    """Record cuBLAS products: all heads at once if the strides allow it, else matrix by matrix."""
    dtype, ratio = F32 if exact else a.dtype, b.ne[2] // a.ne[2]
    ready = b.dtype is dtype and is_even(b, ratio)
    fits = ready or rows_in(b.ne) * b.ne[0] * dtype.nbytes <= PIECE
    row = leading(a, a.ne[1])
    even = a.nb[2] % a.dtype.nbytes == 0 and is_even(y, ratio)
    writable = y.dtype is F32 or y.dtype is dtype is F16
    if a.dtype is not dtype or row is None or not writable or not even or not fits:
        by_matrix(call, a, b, y, dtype)
        return
    if not ready:
        b = contiguous(call, b, dtype)
    step_b, step_y = (x.nb[2 if x.ne[1] == 1 else 1] // x.dtype.nbytes for x in (b, y))
    n = b.ne[1] * ratio
    for i3 in range(b.ne[3]):
        call.gemm(
            a.ne[1],
            n,
            a.ne[0],
            a.ptr + i3 * a.ne[3] // b.ne[3] * a.nb[3],
            b.ptr + i3 * b.nb[3],
            y.ptr + i3 * y.nb[3],
            types=(dtype.name, dtype.name, y.dtype.name),
            leading=(row[0], step_b if n > 1 else b.ne[0], step_y if n > 1 else a.ne[1]),
            transposed=(row[1], False),
            batch=a.ne[2],
            strides=(
                a.nb[2] // dtype.nbytes,
                b.nb[2] * ratio // dtype.nbytes,
                y.nb[2] * ratio // y.dtype.nbytes,
            ),
        )


def is_even(x: Operand, ratio: int) -> bool:
    """Whether cuBLAS can read or write it: contiguous rows at equal distances, also from head to
    head if `ratio` heads share a matrix."""
    size = x.dtype.nbytes
    step = x.nb[2 if x.ne[1] == 1 else 1]
    return (
        x.nb[0] == size
        and x.nb[2] % size == 0
        and step % size == 0
        and (step >= x.ne[0] * size or x.ne[1] * ratio == 1)
        and (ratio == 1 or x.nb[2] == x.ne[1] * step)
    )


def contiguous(call: Call, b: Operand, dtype: DType) -> Operand:
    """Record a contiguous copy in scratch, converted to `dtype`."""
    copy = dense(call.scratch(rows_in(b.ne) * b.ne[0] * dtype.nbytes), b.ne, dtype)
    copy_rows(call, b, dtype, copy.ptr, 0, rows_in(b.ne))
    return copy


def by_matrix(call: Call, a: Operand, b: Operand, y: Operand, dtype: DType) -> None:
    """Record each matrix of a (copied if necessary) times pieces of b; results go through
    scratch."""
    k, m, shape = a.ne[0], a.ne[1], shape_of(a.ne, b.ne)
    piece = min(shape.columns, piece_columns(a.ne, b.ne, dtype.nbytes))
    row = leading(a, m) if a.dtype is dtype else None
    weights = 0 if row is not None else call.scratch(k * m * dtype.nbytes)
    x = call.scratch(piece * k * dtype.nbytes)
    product = call.scratch(piece * m * 4)
    for z, start in _pieces(shape, piece):
        i3, i2 = z // shape.a2 // shape.r3, z % shape.a2
        at = a.ptr + i2 * a.nb[2] + i3 * a.nb[3]
        if row is None:
            if start == 0:
                copy_rows(call, a, dtype, weights, (i3 * a.ne[2] + i2) * m, m)
            at = weights
        n = min(piece, shape.columns - start)
        first = z * shape.columns + start
        copy_rows(call, b, dtype, x, first, n)
        call.gemm(
            m,
            n,
            k,
            at,
            x,
            product,
            types=(dtype.name, dtype.name, "f32"),
            leading=(k if row is None else row[0], k, m),
            transposed=(True if row is None else row[1], False),
        )
        put_rows(call, product, y, first, n)


def _pieces(shape: Shape, piece: int) -> Iterator[tuple[int, int]]:
    for z in range(shape.batches):
        for start in range(0, shape.columns, piece):
            yield z, start


def put_rows(call: Call, product: int, y: Operand, first: int, columns: int) -> None:
    """Record contiguous f32 rows written to the rows of y from `first` on."""
    width = min(pack_width(y), 4)
    grid, block = over_rows(y.ne[0] // width, columns)
    call.launch(
        PREPARE,
        f"put_rows<{C_TYPES[y.dtype.name]}, {width}>",
        grid=grid,
        block=block,
        args=[np.uint64(product), y.tensor, np.uint32(first)],
    )

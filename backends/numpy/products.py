"""Matrix products; those of few rows do not wake the threads of BLAS.

Threads of BLAS spin while they wait for each other. If another program has one of their cores, each
product waits for the scheduler: milliseconds instead of microseconds. A prompt is worth that risk,
a token is not. So products of few rows are cut into pieces that OpenBLAS computes in the calling
thread, and NumPy loops over the pieces in one call.

The design that lost sets OpenBLAS's number of threads to 1 around each product, through ctypes. The
number belongs to the process, so a prompt in another Python thread would lose its threads too; the
function has another name in each build of NumPy; and it is slower from two rows on, because
OpenBLAS does not pack small matrices. Microseconds of x [n, 1024] times the transpose of a tile
[1024, 1024], the shortest of many, on two cores (OpenBLAS 0.3.31, AVX-512):

    n                          1     2     4     8
    all threads               28   373   375   396
    one thread by ctypes      55   663   680   758
    pieces                    69    62    90   171

In a loop, while other processes kept both cores busy, the median with all threads was 12,000 to
36,000; that of the others hardly changed.
The fastest token of the `small` model takes 720 ms instead of 1,200. While one busy loop
and other work were running, it took 1,670 instead of 7,750.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np

from pyggml.backends.host_memory import Floats
from pyggml.backends.numpy.threads import for_each
from pyggml.backends.numpy.tiling import split

#: Products of at most this many rows do not wake the threads of BLAS.
FEW = 8
#: The most multiplications for which OpenBLAS uses one thread: matrix and vector, two matrices.
#: (interface/gemv.c: 2304 * 4; interface/gemm.c: 65536 * 4.) A dot product may have 10,000.
VECTOR, MATRIX, DOT = 9215, 262144, 8192
#: Rows of w at a time if their products are summed up from parts; limits NumPy's temporaries.
SUMMED = 512
#: Elements of w that one thread computes at a time, at least and at most: 0.15 to 0.3 ms for one
#: row of x. The number of parts is even, for two threads.
#: Milliseconds of 4096x1x4096 by their elements, beside 1.08 of BLAS's threads: 1 << 20 1.69,
#: 1 << 21 1.17, 1 << 22 1.09, 1 << 23 1.08. While BLAS's threads still spin after another product,
#: a part waits for a processor: 1.5 in place of 0.8 for 16 heads of 4096x192.
LEAST, MOST = 1 << 21, 1 << 22


def row_products(x: Floats, w: Floats, out: Floats) -> None:
    """out = x w^T: [.., n, k] times [.., m, k] is [.., n, m]. BLAS can read x and w in place.

    Outer axes of x and w are broadcast. The sums depend on the shapes only.
    """
    n, k = x.shape[-2:]
    m = w.shape[-2]
    small = n * m * k <= (VECTOR if 1 in (n, m) else MATRIX)
    if n > FEW or small:
        np.matmul(x, w.swapaxes(-1, -2), out=out)
        return

    strided = n == 1 and not _adjacent(w)

    def compute(part: tuple[slice, slice]) -> None:
        heads, rows = part
        x_part, w_part, target = x[heads], w[heads][..., rows, :], out[heads][..., rows]
        if strided:
            np.einsum("...k,...mk->...m", x_part[..., 0, :], w_part, out=target[..., 0, :])
        else:
            _by_parts(x_part, w_part, target)

    alike = w.ndim > 2 and len(x) == len(w) == len(out) and x.ndim == w.ndim == out.ndim
    for_each(compute, _ranges(w, n, len(w) if alike else 1))


def _ranges(w: Floats, n: int, n_heads: int) -> list[tuple[slice, slice]]:
    """Which of the first axis, and which rows of w, one thread computes at a time; from the shapes
    only. Whole heads where they are small: a column of V is read 64 bytes at a time."""
    m, k = w.shape[-2:]
    row = max(1, math.prod(w.shape[:-2]) // n_heads) * k
    total = n_heads * m * row
    size = total if total < 2 * LEAST else -(-total // (2 * -(-total // (2 * MOST))))
    if n_heads > 1 and m * row <= size:
        return [(heads, slice(m)) for heads in split(n_heads, -(-size // (m * row)))]
    unit = SUMMED if k > _depth(w, n) else 1 if 1 in (n, m) else _piece(n, m, k)
    heads = split(n_heads, 1) if n_heads > 1 else [slice(None)]
    return list(product(heads, split(m, -(-size // (row * unit)) * unit)))


def _depth(w: Floats, n: int) -> int:
    """Elements of a row in a piece, at most."""
    m = w.shape[-2]
    return DOT if 1 in (n, m) else MATRIX // (n * min(m, 8 if _adjacent(w) else 64))


def _adjacent(w: Floats) -> bool:
    """Whether the elements of a row are side by side."""
    return w.shape[-1] == 1 or w.strides[-1] == w.itemsize


def _by_parts(x: Floats, w: Floats, out: Floats) -> None:
    """The product as a sum over parts of k; one part if a piece can have whole rows."""
    n, k = x.shape[-2:]
    for part in split(k, _depth(w, n)):
        factors = x[..., part], w[..., part]
        if part.start == 0:
            _pieces(*factors, out)
        else:
            addend = np.empty_like(out)
            _pieces(*factors, addend)
            out += addend


def _piece(n: int, m: int, k: int) -> int:
    """Rows of w of a piece."""
    return min(m, MATRIX // (n * k))


def _pieces(x: Floats, w: Floats, out: Floats) -> None:
    """The product, piece by piece: some rows of w with all rows of x, or dot products."""
    n, k = x.shape[-2:]
    m = w.shape[-2]
    if 1 in (n, m):
        np.vecdot(x[..., :, None, :], w[..., None, :, :], out=out)
        return
    rows = _piece(n, m, k)
    whole = m - m % rows
    pieces = w[..., :whole, :].reshape(*w.shape[:-2], -1, rows, k).swapaxes(-1, -2)
    results = out[..., :whole].reshape(*out.shape[:-1], -1, rows)
    np.matmul(x[..., None, :, :], pieces, out=results.swapaxes(-2, -3))
    if whole < m:  # the last piece overlaps the one before: a single row would be a vector
        np.matmul(x, w[..., -rows:, :].swapaxes(-1, -2), out=out[..., -rows:])

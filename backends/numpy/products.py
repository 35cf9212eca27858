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
#: Least elements of w in a range of rows that one thread computes: 0.3 ms for one row of x.
#: Milliseconds of 4096x1x4096 by the rows of a range: all 2.48, 64 2.85, 256 2.67, 512 1.54.
RANGE = 1 << 21


def row_products(x: Floats, w: Floats, out: Floats) -> None:
    """out = x w^T: [.., n, k] times [.., m, k] is [.., n, m]. BLAS can read x and w in place.

    Outer axes of x and w are broadcast. The sums depend on the shapes only.
    """
    n, k = x.shape[-2:]
    m = w.shape[-2]
    small = n * m * k <= (VECTOR if 1 in (n, m) else MATRIX)
    if n > FEW or small:
        np.matmul(x, w.swapaxes(-1, -2), out=out)
    elif n == 1 and not _adjacent(w):
        np.einsum("...k,...mk->...m", x[..., 0, :], w, out=out[..., 0, :])
    else:
        _by_parts(x, w, out)


def _adjacent(w: Floats) -> bool:
    """Whether the elements of a row are side by side."""
    return w.shape[-1] == 1 or w.strides[-1] == w.itemsize


def _by_parts(x: Floats, w: Floats, out: Floats) -> None:
    """The product as a sum over parts of k; one part if a piece can have whole rows.

    Threads share ranges of rows of w. The ranges depend on the shapes only, not on the threads.
    """
    n, k = x.shape[-2:]
    m = w.shape[-2]
    depth = DOT if 1 in (n, m) else MATRIX // (n * min(m, 8 if _adjacent(w) else 64))
    unit = SUMMED if k > depth else 1 if 1 in (n, m) else _piece(n, m, k)
    step = -(-RANGE // (k * unit)) * unit

    def compute(rows: slice) -> None:
        target = out[..., rows]
        for part in split(k, depth):
            factors = x[..., part], w[..., rows, part]
            if part.start == 0:
                _pieces(*factors, target)
            else:
                addend = np.empty_like(target)
                _pieces(*factors, addend)
                target += addend

    for_each(compute, split(m, step))


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

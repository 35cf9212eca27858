"""Which operands BLAS can read in place.

NumPy copies others before it calls BLAS, which takes memory that no plan counts.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import as_strided

from pyggml.backends.host_memory import Array, Floats, Packed
from pyggml.dtypes import F32
from pyggml.node import Node


def blas_view(x: Array) -> Floats | None:
    """A view of x whose matrices (the last two axes) BLAS can read in place; None if it cannot."""
    if isinstance(x, Packed) or x.dtype != np.float32:
        return None
    rows, columns = x.shape[-2:]
    *outer, row_step, step = x.strides
    # The stride of an axis of size 1 is arbitrary, but BLAS requires it in order.
    if columns == 1:
        step = 4
    if rows == 1:
        row_step = 4 * columns if step == 4 else 4
    if not (step == 4 and row_step >= 4 * columns) and not (row_step == 4 and step >= 4 * rows):
        return None
    strides = (*outer, row_step, step)
    return x if strides == x.strides else as_strided(x, strides=strides)


def has_blas_view(node: Node) -> bool:
    """Whether `blas_view` is certain to have a view of the node's tensor."""
    (n0, n1, *_), (nb0, nb1, *_) = node.ne, node.nb
    if node.dtype is not F32:
        return False
    # A tensor may be placed inside a wider one; then only the elements of a row are adjacent.
    rows_known = node.root.ne[0] > 1
    fits = (nb0 == 4 and nb1 >= 4 * n0) or (nb1 == 4 and nb0 >= 4 * n1)
    return 1 in (n0, n1) or (rows_known and fits)

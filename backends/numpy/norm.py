"""Normalization of rows."""

from __future__ import annotations

import numpy as np

from pyggml import ops
from pyggml.backends.host_memory import Raw, Scratch
from pyggml.backends.numpy.table import kernel
from pyggml.backends.numpy.tiling import PIECE, pieces, scratch_bytes, shaped


def _rows(n: int) -> int:
    """Rows of a piece."""
    return max(1, PIECE // n)


@kernel(ops.rms_norm, inplace=("a",), scratch=lambda node: scratch_bytes(_rows(node.ne[0])))
def rms_norm(out: Raw, a: Raw, *, scratch: Scratch, eps: float) -> None:
    n = a.shape[3]
    memory = scratch.array(_rows(n))
    for index in pieces(a.shape[:3], _rows(n)):
        x = a[index]
        factor = shaped(memory, *x.shape[:-1])
        np.vecdot(x, x, out=factor)
        factor /= n
        factor += np.float32(eps)
        np.sqrt(factor, out=factor)
        np.divide(x, factor[..., None], out=out[index])


@kernel(ops.norm, inplace=("a",), scratch=lambda node: scratch_bytes(*(_rows(node.ne[0]),) * 2))
def norm(out: Raw, a: Raw, *, scratch: Scratch, eps: float) -> None:
    """The mean of f32 is off by its rounding: the mean of what is left corrects it."""
    n = a.shape[3]
    means, squares = scratch.array((2, _rows(n)))
    for index in pieces(a.shape[:3], _rows(n)):
        x, y = a[index], out[index]
        mean, factor = (shaped(memory, *x.shape[:-1]) for memory in (means, squares))
        for source in (x, y):
            np.sum(source, axis=-1, out=mean)
            mean /= n
            np.subtract(source, mean[..., None], out=y)
        np.vecdot(y, y, out=factor)
        factor /= n
        factor += np.float32(eps)
        np.sqrt(factor, out=factor)
        np.copyto(factor, 1, where=factor == 0)
        y /= factor[..., None]

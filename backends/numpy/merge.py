"""Merges results of one attention over different keys: two at a time, or in a running sum."""

from __future__ import annotations

import numpy as np

from pyggml import ops
from pyggml.backends.host_memory import Raw, Scratch
from pyggml.backends.numpy.gather import IDS
from pyggml.backends.numpy.reduce import FLOOR
from pyggml.backends.numpy.table import kernel
from pyggml.backends.numpy.tiling import PIECE, pieces, scratch_bytes, shaped
from pyggml.node import Node

#: The sum is rescaled when a part outweighs the reference by more than e^GROWTH, long before an
#: overflow.
GROWTH = 16.0


def rows_of(n: int) -> int:
    """Rows of a piece, if a row has n elements."""
    return max(1, min(IDS, PIECE // n))


def _merge_scratch(node: Node) -> int:
    rows = rows_of(node.ne[0])
    return scratch_bytes(*(rows,) * 4, rows * node.ne[0])


@kernel(ops.merge_lse, inplace=("a", "b"), scratch=_merge_scratch)
def merge_lse(out: Raw, a: Raw, b: Raw, *, scratch: Scratch) -> None:
    """Weights each part by exp(its lse - the larger lse)."""
    n = out.shape[3]
    rows = rows_of(n)
    stats, spare = scratch.array((4, rows)), scratch.array(rows * n)
    for index in pieces(out.shape[:3], rows):
        y, u, v = out[index], a[index], b[index]
        top, total, w_u, w_v = (shaped(s, *y.shape[:-1], 1) for s in stats)
        np.maximum(u[..., -1:], v[..., -1:], out=top)
        np.maximum(top, FLOOR, out=total)
        for part, weight in ((u, w_u), (v, w_v)):
            np.subtract(part[..., -1:], total, out=weight)
            np.exp(weight, out=weight)
        np.add(w_u, w_v, out=total)
        np.copyto(total, 1, where=total == 0)
        w_u /= total
        w_v /= total
        weighted = shaped(spare, *y.shape[:-1], n - 1)
        np.multiply(v[..., :-1], w_v, out=weighted)
        np.multiply(u[..., :-1], w_u, out=y[..., :-1])
        y[..., :-1] += weighted
        np.log(total, out=total)
        np.add(total, top, out=y[..., -1:])


def _sum_scratch(node: Node) -> int:
    rows = rows_of(node.ne[0])
    return scratch_bytes(rows, rows, rows, rows * node.ne[0])


@kernel(ops.lse_sum, scratch=_sum_scratch, inplace=("c",))
def lse_sum(out: Raw, a: Raw, c: Raw | None, *, scratch: Scratch) -> None:
    n = out.shape[3]
    stats, spare = scratch.array((3, rows_of(n))), scratch.array(rows_of(n) * n)
    for index in pieces(out.shape[:3], rows_of(n)):
        y, part = out[index], a[index]
        top, fix, weight = (shaped(s, *y.shape[:-1], 1) for s in stats)
        lse = part[..., -1:]
        if c is None:
            np.maximum(lse, np.finfo(np.float32).min, out=top)
        else:
            # The reference changes only in rows that outgrow it; in others the factor exp(0) is 1.
            np.subtract(lse, GROWTH, out=weight)
            np.copyto(top, c[index][..., -1:])
            np.copyto(top, lse, where=weight > top)
            np.subtract(c[index][..., -1:], top, out=fix)
            np.exp(fix, out=fix)
        np.subtract(lse, top, out=weight)
        np.exp(weight, out=weight)
        added = shaped(spare, *y.shape[:-1], n - 1)
        np.multiply(part[..., :-1], weight, out=added[..., :-1])
        np.copyto(added[..., -1:], weight)
        if c is None:
            np.copyto(y[..., :-1], added)
        else:
            np.multiply(c[index][..., :-1], fix, out=y[..., :-1])
            y[..., :-1] += added
        np.copyto(y[..., -1:], top)


@kernel(ops.lse_finish, scratch=lambda node: scratch_bytes(rows_of(node.ne[0])))
def lse_finish(out: Raw, c: Raw, *, scratch: Scratch, lse: bool) -> None:
    d_v = c.shape[3] - 2
    stat = scratch.array(rows_of(c.shape[3]))
    for index in pieces(c.shape[:3], rows_of(c.shape[3])):
        y, part = out[index], c[index]
        total = shaped(stat, *part.shape[:-1], 1)
        np.copyto(total, part[..., d_v : d_v + 1])
        with np.errstate(divide="ignore"):
            if lse:
                np.log(total, out=y[..., d_v:])
                y[..., d_v:] += part[..., d_v + 1 :]
        total += total == 0  # a row without keys becomes 0 / 1
        np.divide(part[..., :d_v], total, out=y[..., :d_v])

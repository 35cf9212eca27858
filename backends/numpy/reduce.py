"""Sums, softmax and sorting of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml import ops
from pyggml.backends.host_memory import Floats, Raw, Scratch
from pyggml.backends.numpy.arrays import codec_bytes, work_of
from pyggml.backends.numpy.gather import IDS
from pyggml.backends.numpy.masks import Mask, alibi_slopes
from pyggml.backends.numpy.table import kernel
from pyggml.backends.numpy.tiling import PIECE, pieces, scratch_bytes, shaped, split
from pyggml.node import Node
from pyggml.ops.reduce import row_length

#: The maximum of a row without keys. It is finite, so such a row has no NaN.
FLOOR = np.finfo(np.float32).min


@kernel(ops.sum_rows)
def sum_rows(out: Raw, a: Raw) -> None:
    np.sum(a, axis=3, keepdims=True, out=out)


def _softmax_tile(n: int, rows: int, heads: int) -> tuple[int, int]:
    """Rows and heads of a piece; it has several heads only if they fit with all their rows."""
    piece_rows = max(1, PIECE // n)
    return min(rows, piece_rows), min(heads, max(1, piece_rows // rows))


def _softmax_scratch(node: Node) -> int:
    n, rows, heads, _ = node.ne
    rows, heads = _softmax_tile(n, rows, heads)
    mask = node.get("mask")
    bias = scratch_bytes(rows * n) + codec_bytes(mask) if mask is not None else 0
    return bias + scratch_bytes(2 * rows * heads)


@kernel(ops.soft_max_ext, inplace=("a",), scratch=_softmax_scratch)
def soft_max_ext(
    out: Raw,
    a: Raw,
    mask: Raw | None,
    sinks: Raw | None,
    *,
    scratch: Scratch,
    scale: float,
    max_bias: float,
    head0: int,
    n_head: int,
) -> None:
    """Computes piece by piece in `out`. A mask that all heads share is decoded once for them."""
    n3, n_heads, n_rows, n = a.shape
    slopes = alibi_slopes(n_heads, head0, n_head, max_bias)
    rows, heads = _softmax_tile(n, n_rows, n_heads)
    stats = scratch.array((2, rows * heads))
    if mask is not None:
        bias, work = scratch.array(rows * n), work_of(scratch, mask)
    for i3 in range(n3):
        for r in split(n_rows, rows):
            if mask is not None:
                tile = Mask(mask[i3 % len(mask), :, r], slopes, bias, work)
            for h in split(n_heads, heads):
                y = out[i3, h, r]
                np.multiply(a[i3, h, r], np.float32(scale), out=y)
                if mask is not None:
                    tile.add_to(y, h.start)
                sink = None if sinks is None else sinks[0, 0, 0, h, None, None]
                _softmax(y, sink, stats)


def _softmax(y: Floats, sink: Floats | None, stats: Floats) -> None:
    top, total = (shaped(s, *y.shape[:2], 1) for s in stats)
    np.max(y, axis=2, keepdims=True, out=top)
    np.maximum(top, FLOOR if sink is None else np.maximum(sink, FLOOR), out=top)
    y -= top
    np.exp(y, out=y)
    np.sum(y, axis=2, keepdims=True, out=total)
    if sink is not None:
        np.subtract(sink, top, out=top)
        np.exp(top, out=top)
        total += top
    # A row without keys is all zeros; dividing by 1 leaves it so.
    np.copyto(total, 1, where=total == 0)
    y /= total


def sort_keys(a: Floats, keys: NDArray[np.int64], descending: bool) -> None:
    """Fill `keys` with integers that sort like the values of each row, and by id for equal values.
    The low half of a key is the id.

    The bits of floats sort like the floats if those of negative floats are inverted. Every NaN gets
    the same bits, above those of infinity, because its sign and payload depend on the CPU.
    """
    values = keys.view(np.float32)[..., ::2]
    np.add(a, 0, out=values)  # -0 becomes +0, so the two are equal
    if np.isnan(np.max(a)):
        for s in split(a.shape[-1], IDS):
            np.copyto(values[..., s], np.float32(np.nan), where=np.isnan(values[..., s]))
    np.left_shift(keys, 32, out=keys)
    bits = keys.view(np.int32)[..., 1::2]
    sign = keys.view(np.int32)[..., ::2]
    np.right_shift(bits, 31, out=sign)
    sign &= 0x7FFFFFFF
    bits ^= sign
    if descending:
        np.invert(bits, out=bits)
    for s in split(a.shape[-1], IDS):
        sign[..., s] = np.arange(s.start, s.stop, dtype=np.int32)


def _row_pieces(a: Raw) -> Iterator[Any]:
    return pieces(a.shape[:3], max(1, min(IDS, PIECE // a.shape[3])))


def _sort_scratch(node: Node) -> int:
    return scratch_bytes(2 * max(PIECE, row_length(node)))


@kernel(ops.argsort, scratch=_sort_scratch)
def argsort(out: Raw, a: Raw, *, scratch: Scratch, order: str) -> None:
    _sorted_ids(out, a, order == "desc", scratch)


@kernel(ops.top_k, scratch=_sort_scratch)
def top_k(out: Raw, a: Raw, *, scratch: Scratch, k: int) -> None:
    _sorted_ids(out, a, True, scratch)


def _sorted_ids(out: Raw, a: Raw, descending: bool, scratch: Scratch) -> None:
    memory = scratch.array(max(PIECE, a.shape[3]), np.int64)
    for index in _row_pieces(a):
        part = a[index]
        keys = shaped(memory, *part.shape)
        sort_keys(part, keys, descending)
        np.copyto(out[index], first_ids(keys, out.shape[3]))


def first_ids(keys: NDArray[np.int64], k: int) -> NDArray[np.int32]:
    """The ids of the k smallest keys of each row, in order. Reorders the keys."""
    if k < keys.shape[-1]:
        keys.partition(k - 1)
    first = keys[..., :k]
    first.sort()
    return ids_of(first)


def ids_of(keys: NDArray[np.int64]) -> NDArray[np.int32]:
    """The ids in the low halves of the keys."""
    return keys.view(np.int32)[..., ::2]


@kernel(ops.argmax, scratch=lambda node: scratch_bytes(max(PIECE, row_length(node))))
def argmax(out: Raw, a: Raw, *, scratch: Scratch) -> None:
    memory = scratch.array(max(PIECE, a.shape[3]))
    for index in _row_pieces(a):
        part = a[index]
        row = shaped(memory, *part.shape)  # NumPy would copy a strided part
        np.copyto(row, part)
        out[0][index] = row.argmax(axis=-1)

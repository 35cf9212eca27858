"""Matrix products: BLAS on tiles of weights decoded to f32, dense and by expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml import ops
from pyggml.backends.host_memory import Array, Raw, Scratch, raw_of, shape_of
from pyggml.backends.numpy.arrays import Work, codec_bytes, decoded, work_of
from pyggml.backends.numpy.blas import blas_view, has_blas_view
from pyggml.backends.numpy.gather import IDS, gather
from pyggml.backends.numpy.products import row_products
from pyggml.backends.numpy.table import kernel
from pyggml.backends.numpy.tiling import TILE, scratch_bytes, shaped, split
from pyggml.dtypes import F32, DType
from pyggml.node import Node

#: Most f32 elements of converted activations for one pass over the weights.
BATCH = 1 << 22


def tile_rows(m: int, k: int) -> int:
    """Rows of a tile of decoded weights; at least 32 (of m), as BLAS is slow on fewer."""
    return min(m, max(32, TILE // k))


def weight_tile(dtype: DType, part: Raw, memory: Raw, work: Work) -> Raw:
    """Rows of weights [.., rows, k] as f32. The result is transposed in memory if `part` is."""
    if dtype.block == 1 and part.strides[-1] > part.strides[-2]:
        return decoded(dtype, part.swapaxes(-1, -2), memory, work).swapaxes(-1, -2)
    return decoded(dtype, part, memory, work)


def weights_at(matrix: Array, index: tuple[Any, ...], memory: Raw, work: Work) -> Raw:
    """Rows of weights as f32: in place if BLAS can read them, else decoded into `memory`."""
    dtype, raw = raw_of(matrix)
    direct = blas_view(raw[index]) if dtype is F32 else None
    return weight_tile(dtype, raw[index], memory, work) if direct is None else direct


def _head_tile(m: int, k: int, heads: int) -> int:
    """Whole matrices in a tile of weights."""
    return min(heads, max(1, TILE // (m * k)))


def _mul_mat_scratch(node: Node) -> int:
    a, b = node["a"], node["b"]
    if has_blas_view(a) and has_blas_view(b) and node.dtype is F32:
        return 0
    k, m, heads, _ = a.ne
    tile, rows = _head_tile(m, k, heads), tile_rows(m, k)
    shared = tile * (b.ne[2] // heads) * (b.ne[3] // a.ne[3])
    convert = 0 if has_blas_view(b) else shared * k
    narrow = 0 if node.dtype is F32 else shared * rows
    return scratch_bytes(
        0 if has_blas_view(a) else tile * rows * k,
        min(b.ne[1] * convert, max(BATCH, convert)),
        min(b.ne[1] * narrow, max(BATCH, narrow)),
    ) + codec_bytes(a, b)


def _by_matrix(x: Raw, a3: int, heads: int) -> Raw:
    """[B3, B2, n, k] as [A3, B3 / A3, A2, B2 / A2, n, k]: rows grouped by their matrix of a."""
    b3, b2, n, k = x.shape
    return x.reshape(a3, b3 // a3, heads, b2 // heads, n, k)


def _even(x: Raw) -> bool:
    """Whether all rows of the heads that share a matrix are the same number of bytes apart."""
    *_, sharing, n, _ = x.shape
    return sharing == 1 or n == 1 or bool(x.strides[3] == n * x.strides[4])


def _together(x: Raw) -> Raw:
    """The rows of the heads that share a matrix as the rows of one head."""
    return x.reshape(*x.shape[:3], 1, -1, x.shape[-1])


@kernel(ops.mul_mat, types=None, scratch=_mul_mat_scratch)
def mul_mat(out: Raw, a: Array, b: Array, *, scratch: Scratch, prec: str, dtype: str) -> None:
    """One product if BLAS can read all operands in place; else tiles of `a`, each decoded once."""
    a3, heads, m, k = shape_of(a)
    w, x = blas_view(a), blas_view(b)
    (a_type, raw_a), (b_type, raw_b) = raw_of(a), raw_of(b)
    xs, y = _by_matrix(raw_b if x is None else x, a3, heads), _by_matrix(out, a3, heads)
    if _even(xs) and _even(y):
        xs, y = _together(xs), _together(y)
    wide = out.dtype == np.float32
    if w is not None and x is not None and wide:
        row_products(xs, w[:, None, :, None], y)
        return

    tile, rows, n = _head_tile(m, k, heads), tile_rows(m, k), xs.shape[4]
    shared = tile * xs.shape[1] * xs.shape[3]
    columns = min(n, max(1, BATCH // (shared * max(k if x is None else 1, 1 if wide else rows))))
    work = work_of(scratch, a, b)
    weights = scratch.array(0 if w is not None else tile * rows * k)
    converted = scratch.array(columns * shared * k if x is None else 0)
    product = scratch.array(0 if wide else columns * shared * rows)
    for i3, h, c in np.ndindex(a3, -(-heads // tile), -(-n // columns)):
        matrices, column = slice(h * tile, (h + 1) * tile), slice(c * columns, (c + 1) * columns)
        part = xs[i3, :, matrices, :, column]
        if x is None:
            part = decoded(b_type, part, converted, work)
        for r in split(m, rows):
            if w is None:
                w_tile = weight_tile(a_type, raw_a[i3, matrices, r], weights, work)
            else:
                w_tile = w[i3, matrices, r]
            target = y[i3, :, matrices, :, column, r]
            result = target if wide else shaped(product, *target.shape)
            row_products(part, w_tile[:, None], result)
            if not wide:
                np.copyto(target, result, casting="unsafe")


def _pairs(n_pairs: int, k: int) -> int:
    """Most (token, slot) pairs that an expert's matrix is multiplied with at once."""
    return min(n_pairs, IDS, max(256, BATCH // k))


def expert_scratch(tiles: int) -> Callable[[Node], int]:
    """Scratch of `by_expert` with this number of tiles of products."""

    def scratch(node: Node) -> int:
        matrices = [node[name] for name in node.op.weights]
        k, m, *_ = matrices[0].ne
        count = node["ids"].spec.elements
        pairs, rows, order = _pairs(count, k), tile_rows(m, k), 2 * count
        size = scratch_bytes(order, pairs * k, rows * k, *(pairs * rows,) * tiles)
        return size + codec_bytes(*matrices, node["b"])

    return scratch


def _sorted_pairs(ids: Raw, n_experts: int, keys: NDArray[np.int64]) -> list[int]:
    """Sort (token, slot) pairs by expert into keys = id * 2^32 + pair. Returns where the pairs of
    each expert start; pairs before entry 0 have negative ids."""
    keys.reshape(ids.shape)[...] = ids
    keys <<= 32
    for s in split(len(keys), IDS):
        keys[s] += np.arange(s.start, s.stop)
    keys.sort()
    return [int(i) for i in np.searchsorted(keys, np.arange(n_experts + 1) << 32)]


def by_expert(
    out: Raw,
    experts: Sequence[Array],
    b: Raw,
    ids: Raw,
    scratch: Scratch,
    tiles: int,
    finish: Callable[[list[Raw]], Raw],
) -> None:
    """out[t, e] = finish(products of row b[t, e % n_b] with the matrices of expert ids[t, e]).

    Rows are gathered by expert. The matrices of an expert without rows are not read.
    """
    _, n_experts, m, k = shape_of(experts[0])
    n_used, n_b = ids.shape[3], b.shape[2]
    keys = scratch.array(ids.size, np.int64)
    starts = _sorted_pairs(ids[0, 0], n_experts, keys)
    b_type, rows_b = raw_of(b)
    flat = b.reshape(-1, k) if b.flags.c_contiguous else None
    pairs, rows = _pairs(ids.size, k), tile_rows(m, k)
    gathered, weights = scratch.array(pairs * k), scratch.array(rows * k)
    products = [scratch.array(pairs * rows) for _ in range(tiles)]
    work = work_of(scratch, *experts, b)

    def tokens_and_slots(start: int, stop: int) -> tuple[Any, Any]:
        return np.divmod(keys[start:stop] & 0xFFFFFFFF, n_used)

    for s in split(starts[0], IDS):
        out[0][tokens_and_slots(s.start, s.stop)] = 0
    for expert in np.flatnonzero(np.diff(starts)):
        for s in split(starts[expert + 1] - starts[expert], pairs):
            start = starts[expert]
            token, slot = tokens_and_slots(start + s.start, start + s.stop)
            x = shaped(gathered, len(token), k)
            slot_b = slot % n_b
            if flat is None:
                gather(b_type, rows_b[0], (token, slot_b), x, work)
            else:
                gather(b_type, flat, (token * n_b + slot_b,), x, work)
            for r in split(m, rows):
                ys = [shaped(p, len(token), r.stop - r.start) for p in products]
                for matrix, y in zip(experts, ys):
                    w = weights_at(matrix, (0, expert, r), weights, work)
                    row_products(x, w, y)
                out[0][token, slot, r] = finish(ys)


@kernel(ops.mul_mat_id, types=None, scratch=expert_scratch(1))
def mul_mat_id(out: Raw, experts: Array, b: Raw, ids: Raw, *, scratch: Scratch, prec: str) -> None:
    by_expert(out, (experts,), b, ids, scratch, 1, lambda ys: ys[0])

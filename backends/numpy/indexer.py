"""The indexer's scores in tiles: some tokens with all heads, against some rows of the cache.

A tile holds the products of every head, [tokens, heads, rows]; then its heads are weighted and
summed. The products of a single token are those of a few heads at a time, which do not wake the
threads of BLAS (see products.py). Hidden rows become -inf at the end, so what they hold has no
effect.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from pyggml import ops
from pyggml.backends.host_memory import Array, Floats, Raw, Scratch, raw_of, shape_of
from pyggml.backends.numpy.arrays import Work, codec_bytes, decoded, work_of
from pyggml.backends.numpy.blas import blas_view
from pyggml.backends.numpy.masks import HIDDEN
from pyggml.backends.numpy.products import FEW, row_products
from pyggml.backends.numpy.table import kernel
from pyggml.backends.numpy.tiling import TILE, scratch_bytes, shaped, split
from pyggml.dtypes import F16
from pyggml.node import Node

#: Most tokens and rows of a tile.
TOKENS, ROWS = 64, 4096


def _tile(n_kv: int, n_head: int, n_tokens: int, d: int) -> tuple[int, int]:
    """Tokens and rows of a tile: its products and the decoded rows have at most TILE elements,
    unless a single token's have more."""
    tokens = min(n_tokens, TOKENS, max(1, TILE // (256 * n_head)))
    rows = min(n_kv, ROWS, max(64, TILE // max(tokens * n_head, d)))
    return tokens, rows


def _counts(d: int, heads: int, tokens: int, rows: int) -> tuple[int, ...]:
    """Elements of a tile's queries, decoded rows, products, weights and mask of one token."""
    return tokens * heads * d, rows * d, tokens * heads * rows, tokens * heads, rows


def _scratch(node: Node) -> int:
    q, k = node["q"], node["k"]
    d, heads, n_tokens, _ = q.ne
    counts = _counts(d, heads, *_tile(k.ne[1], heads, n_tokens, d))
    return scratch_bytes(*counts) + codec_bytes(k, node.get("mask"))


@kernel(ops.lightning_indexer, types=None, scratch=_scratch)
def lightning_indexer(
    out: Raw,
    q: Raw,
    k: Array,
    weights: Raw,
    mask: Raw | None,
    kv_len: Raw | None,
    *,
    scratch: Scratch,
) -> None:
    n3, n_tokens, heads, d = q.shape
    n_kv = shape_of(k)[2]
    tokens, rows = _tile(n_kv, heads, n_tokens, d)
    queries, keys, scores, factors, bias = (
        scratch.array(n) for n in _counts(d, heads, tokens, rows)
    )
    work, in_place = work_of(scratch, k, mask), blas_view(k)
    k_type, k_raw = raw_of(k)
    live = n_kv if kv_len is None else max(0, min(n_kv, int(kv_len[0, 0, 0, 0])))
    out[..., live:] = -np.inf
    for i3, t in product(range(n3), split(n_tokens, tokens)):
        count = t.stop - t.start
        block = shaped(queries, count, heads, d)
        np.copyto(block, q[i3, t])
        w = shaped(factors, count, heads, 1)
        np.copyto(w[..., 0], weights[i3, 0, t])
        for j in split(live, rows):
            if in_place is None:
                tile = decoded(k_type, k_raw[i3, 0, j], keys, work)
            else:
                tile = in_place[i3, 0, j]
            products = shaped(scores, count * heads, j.stop - j.start)
            for h in split(count * heads, FEW if count == 1 else count * heads):
                row_products(block.reshape(-1, d)[h], tile, products[h])
            np.maximum(products, 0, out=products)
            products = products.reshape(count, heads, -1)
            products *= w
            np.add.reduce(products, axis=1, out=out[i3, 0, t, j])
            if mask is not None:
                for i in range(count):
                    part = mask[i3 % len(mask), 0, t.start + i, j]
                    _add_mask(out[i3, 0, t.start + i, j], part, bias, work)


def _add_mask(y: Floats, mask: Raw, memory: Floats, work: Work) -> None:
    """y += mask, and -inf where the mask hides a row that may hold NaN."""
    y += decoded(F16, mask, memory, work)
    np.copyto(y, -np.inf, where=mask == HIDDEN)

"""The online softmax of fused attention: it sees the keys block by block.

A hidden key must have no effect, whatever its rows of K and V contain. Adding -inf to its score and
weighting its values with 0 achieves that only if both are finite. So two results are checked, at a
thousandth of the cost of the products: the largest score of a row must not be NaN, and the weighted
sums of values must be finite. If a check fails, the mask is read again: hidden scores become -inf,
and the sums leave out rows of values that are not finite, except for queries that see the key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from pyggml.backends.host_memory import Floats, Raw
from pyggml.backends.numpy.masks import Mask
from pyggml.backends.numpy.products import row_products
from pyggml.backends.numpy.reduce import FLOOR
from pyggml.backends.numpy.tiling import PIECE, shaped, split

T = TypeVar("T")


class Parts(NamedTuple, Generic[T]):
    """The f32 arrays that attention keeps in its scratch, or their sizes.

    queries  scaled queries
    sums     sums of weighted values
    stats    five numbers for each row of scores
    products weighted values of one block
    bias     decoded mask
    keys, values  decoded K and V
    """

    queries: T
    sums: T
    stats: T
    scores: T
    products: T
    bias: T
    keys: T
    values: T


@dataclass(frozen=True, slots=True)
class Blocks:
    """How the work is divided. A pass is some queries of some heads over all keys.

    ratio    query heads for each head of K
    queries  of a pass
    heads    of K in a pass
    keys     of a block
    group    heads of K whose scores are computed together
    in_place whether K and V are read where they are, so that none is decoded
    """

    ratio: int
    queries: int
    heads: int
    keys: int
    group: int
    d_k: int
    d_v: int
    in_place: bool = False

    @property
    def rows(self) -> int:
        """Rows of scores for one head of K: all queries of its first query head, then the next."""
        return self.ratio * self.queries

    def sizes(self) -> Parts[int]:
        """Elements of each array."""
        pass_rows, rows, keys = self.heads * self.rows, self.group * self.rows, self.keys
        decoded = 0 if self.in_place else self.group
        return Parts(
            queries=pass_rows * self.d_k,
            sums=pass_rows * self.d_v,
            stats=5 * pass_rows,
            scores=rows * keys,
            products=rows * self.d_v,
            bias=self.queries * keys,
            keys=decoded * keys * self.d_k,
            values=max(1, decoded) * keys * self.d_v,
        )


class OnlineSoftmax:
    """One pass: for each row its largest score so far, the sum of its weights, and the sum of its
    weighted values.

    shape  (query heads, queries)
    """

    def __init__(self, blocks: Blocks, memory: Parts[Raw], shape: tuple[int, int]) -> None:
        heads, queries = self.shape = shape
        n, self.rows = heads // blocks.ratio, blocks.ratio * queries
        self.memory = memory
        self.q = shaped(memory.queries, n, self.rows, blocks.d_k)
        self.sums = shaped(memory.sums, n, self.rows, blocks.d_v)
        stats = shaped(memory.stats, 5, n, self.rows, 1)
        self.top, self.total, self.new_top, self.shrink, self.block_total = stats

    def begin(self, q: Raw, scale: float, sinks: Raw | None) -> None:
        """Start with queries q [heads, queries, d_k]. A sink counts as a key without a value."""
        np.multiply(q, np.float32(scale), out=self.q.reshape(q.shape))
        self.sums.fill(0)
        self.top.fill(FLOOR)
        self.total.fill(0)
        if sinks is not None:
            top, total = (x.reshape(self.shape) for x in (self.top, self.total))
            np.maximum(top, sinks[:, None], out=top)
            np.subtract(sinks[:, None], top, out=total)
            np.exp(total, out=total)

    def add(self, g: slice, k: Floats, v: Floats, cap: float, mask: Mask | None, head: int) -> None:
        """Add a block of keys to heads `g` of the pass.

        head  the number of the first query head of `g` in the tensor
        """
        queries = self.shape[1]
        scores = shaped(self.memory.scores, len(k), self.rows, k.shape[1])
        row_products(self.q[g], k, scores)
        if cap:
            np.tanh(scores, out=scores)
            scores *= np.float32(cap)
        if mask is not None:
            mask.add_to(scores.reshape(-1, queries, k.shape[1]), head)
        top, new_top, block_total, shrink = (
            x[g].reshape(-1, 1) for x in (self.top, self.new_top, self.block_total, self.shrink)
        )
        flat = scores.reshape(-1, k.shape[1])
        for r in split(len(flat), max(1, PIECE // k.shape[1])):
            x, m = flat[r], new_top[r]
            np.max(x, axis=1, keepdims=True, out=m)
            if mask is not None and np.isnan(m).any():
                mask.hide(x, head, r.start)
                np.max(x, axis=1, keepdims=True, out=m)
            np.maximum(m, top[r], out=m)
            x -= m
            np.exp(x, out=x)
            np.sum(x, axis=1, keepdims=True, out=block_total[r])
        np.subtract(top, new_top, out=shrink)
        np.exp(shrink, out=shrink)
        np.copyto(top, new_top)
        self.total[g] *= self.shrink[g]
        self.total[g] += self.block_total[g]
        products = shaped(self.memory.products, len(k), self.rows, v.shape[2])
        row_products(scores, v.swapaxes(1, 2), products)
        if mask is not None and not np.isfinite(products.sum()):
            self._weight_visible(products, scores, v, mask, head)
        self.sums[g] *= self.shrink[g]
        self.sums[g] += products

    def _weight_visible(
        self, products: Floats, weights: Floats, v: Floats, mask: Mask, head: int
    ) -> None:
        """products = weights v, but hidden keys add nothing even if their values are not finite."""
        foreign = not np.may_share_memory(v, self.memory.values)
        ratio = weights.shape[1] // self.shape[1]
        for n, (x, w, values) in enumerate(zip(products, weights, v)):
            if foreign:
                clean = shaped(self.memory.values, *values.shape)
                np.copyto(clean, values)
                values = clean
            heads = range(head + n * ratio, head + (n + 1) * ratio)
            odd = np.flatnonzero(~np.isfinite(values.sum(axis=1)))
            odd_values = values[odd]
            values[odd] = 0
            row_products(w, values.T, x)
            for j, row in zip(odd, odd_values):
                rows = np.flatnonzero(mask.visible(heads, int(j)))
                for s in split(len(rows), max(1, PIECE // len(row))):
                    x[rows[s]] += np.multiply.outer(w[rows[s], j], row)

    def end(self, out: Raw, lse: bool) -> None:
        """Write the result to out [heads, queries, d_v], with lse=True [heads, queries, d_v + 1]:
        the log-sum-exp is the last element."""
        d_v = self.sums.shape[2]
        top, total = (x.reshape(*self.shape, 1) for x in (self.top, self.total))
        empty = self.new_top.view(np.bool_)[..., :1].reshape(total.shape)
        np.equal(total, 0, out=empty)
        np.copyto(total, 1, where=empty)
        np.divide(self.sums.reshape(*self.shape, d_v), total, out=out[..., :d_v])
        if lse:
            np.log(total, out=total)
            total += top
            np.copyto(total, -np.inf, where=empty)
            np.copyto(out[..., d_v:], total)

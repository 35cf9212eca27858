"""Fused attention over blocks of keys with an online softmax, and its mask.

A hidden key takes no part, whatever its rows of K and V hold. Adding -inf to its score and weighing
its values by 0 does that only where they are finite, so both results are looked at, which costs a
thousandth of the products: NaN in a row's largest score, and anything but finite numbers in the
weighted sums of values. Only then is the mask read again, and values are summed without the rows
that are not finite; those that do see such a key get it afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from pyggml import ops
from pyggml.backends.host_memory import Array, Floats, Raw, Scratch, raw_of, shape_of
from pyggml.backends.numpy.arrays import Work, codec_bytes, decoded, work_of
from pyggml.backends.numpy.blas import blas_view
from pyggml.backends.numpy.masks import HIDDEN, Mask, alibi_slopes
from pyggml.backends.numpy.reduce import FLOOR
from pyggml.backends.numpy.table import kernel
from pyggml.backends.numpy.tiling import PIECE, TILE, scratch_bytes, shaped, split
from pyggml.errors import IdError
from pyggml.node import Node

MINUS_INFINITY = int(HIDDEN.view(np.uint16))
#: f32 elements of scores and of decoded keys and values at a time.
SCORES = DECODED = 2 * TILE
#: f32 elements of scaled queries and sums of values that are held at a time.
HELD = 4 * TILE


@dataclass(frozen=True, slots=True)
class _Cut:
    """How the work is cut. A pass is some queries of some heads, over all keys.

    queries, heads  of a pass; heads are heads of k, each with `ratio` heads of q
    keys, group     keys of a block, and how many heads of a pass share one tile of scores
    """

    ratio: int
    queries: int
    heads: int
    keys: int
    group: int
    d_k: int
    d_v: int

    @property
    def rows(self) -> int:
        """Rows of scores of one head of k: its heads of q one below the other."""
        return self.ratio * self.queries

    def sizes(self) -> tuple[int, ...]:
        """Elements: queries; sums; row stats; scores; products; bias; keys; values."""
        held, tile, block = self.heads * self.rows, self.group * self.rows, self.group * self.keys
        return (
            held * self.d_k,
            held * self.d_v,
            5 * held,
            tile * self.keys,
            tile * self.d_v,
            self.queries * self.keys,
            block * self.d_k,
            block * self.d_v,
        )


def _cut_of(n_q: int, heads: int, heads_kv: int, n_kv: int, d_k: int, d_v: int) -> _Cut:
    ratio = heads // heads_kv
    queries = min(n_q, 512, max(1, 1024 // ratio))
    rows = ratio * queries
    together = min(heads_kv, max(1, HELD // (rows * (d_k + d_v))))
    keys = min(n_kv, max(256, min(4096, SCORES // rows, DECODED // (d_k + d_v))))
    group = min(together, max(1, min(SCORES // (rows * keys), DECODED // (keys * (d_k + d_v)))))
    return _Cut(ratio, queries, together, keys, group, d_k, d_v)


def _flash_scratch(node: Node) -> int:
    q, k, v = node["q"], node["k"], node["v"]
    cut = _cut_of(q.ne[1], q.ne[2], k.ne[2], k.ne[1], k.ne[0], v.ne[0])
    return scratch_bytes(*cut.sizes()) + codec_bytes(k, v, node.get("mask"))


def _inside(k: Array, v: Array) -> int | None:
    """Where v's rows start in those of k, if v is a view of it (the latent cache of MLA)."""
    (kind, a), (kind_v, b) = raw_of(k), raw_of(v)
    if kind != kind_v or a.strides != b.strides or a.shape[1:3] != b.shape[1:3]:
        return None
    start, rest = divmod(_address(b) - _address(a), kind.nbytes)
    fits = rest == 0 <= start and start + b.shape[3] <= a.shape[3]
    return start * kind.block if fits else None


def _address(a: Raw) -> int:
    return int(a.__array_interface__["data"][0])


class _Source:
    """Keys or values as f32: where they lie if BLAS can read them there, else decoded."""

    def __init__(self, x: Array, memory: Raw, work: Work) -> None:
        self.kind, self.raw = raw_of(x)
        self.memory, self.work = memory, work
        direct = blas_view(x)
        self.direct = direct is not None
        self.raw = self.raw if direct is None else direct

    def at(self, index: tuple[Any, ...]) -> Floats:
        part = self.raw[index]
        return part if self.direct else decoded(self.kind, part, self.memory, self.work)


class _Pass:
    """The running softmax of some heads and queries: largest score, sum, weighted sum of values."""

    def __init__(self, cut: _Cut, memory: list[Raw], shape: tuple[int, int]) -> None:
        heads, queries = self.shape = shape
        n, self.rows = heads // cut.ratio, cut.ratio * queries
        queried, sums, stats, self.scores, self.products, *_, self.values = memory
        self.q = shaped(queried, n, self.rows, cut.d_k)
        self.sums = shaped(sums, n, self.rows, cut.d_v)
        self.top, self.total, self.new, self.fix, self.part = shaped(stats, 5, n, self.rows, 1)

    def begin(self, q: Raw, scale: float, sinks: Raw | None) -> None:
        """q [heads, queries, d_k]; a sink is a key that was seen before and has no value."""
        np.multiply(q, np.float32(scale), out=self.q.reshape(q.shape))
        self.sums.fill(0)
        self.top.fill(FLOOR)
        self.total.fill(0)
        if sinks is not None:
            top, total = (x.reshape(self.shape) for x in (self.top, self.total))
            np.maximum(top, sinks[:, None], out=top)
            np.subtract(sinks[:, None], top, out=total)
            np.exp(total, out=total)

    def see(self, g: slice, k: Floats, v: Floats, cap: float, mask: Mask | None, head: int) -> None:
        """Heads `g` of the pass (the first is `head` of the tensor) see a block of keys."""
        queries = self.shape[1]
        scores = shaped(self.scores, len(k), self.rows, k.shape[1])
        np.matmul(self.q[g], k.swapaxes(1, 2), out=scores)
        if cap:
            np.tanh(scores, out=scores)
            scores *= np.float32(cap)
        if mask is not None:
            mask.add_to(scores.reshape(-1, queries, k.shape[1]), head)
        top, new, part, fix = (
            x[g].reshape(-1, 1) for x in (self.top, self.new, self.part, self.fix)
        )
        flat = scores.reshape(-1, k.shape[1])
        for r in split(len(flat), max(1, PIECE // k.shape[1])):
            x, m = flat[r], new[r]
            np.max(x, axis=1, keepdims=True, out=m)
            if mask is not None and np.isnan(m).any():
                mask.hide(x, head, r.start)
                np.max(x, axis=1, keepdims=True, out=m)
            np.maximum(m, top[r], out=m)
            x -= m
            np.exp(x, out=x)
            np.sum(x, axis=1, keepdims=True, out=part[r])
        np.subtract(top, new, out=fix)
        np.exp(fix, out=fix)
        np.copyto(top, new)
        self.total[g] *= self.fix[g]
        self.total[g] += self.part[g]
        products = shaped(self.products, len(k), self.rows, v.shape[2])
        np.matmul(scores, v, out=products)
        if mask is not None and not np.isfinite(products.sum()):
            self._weigh_seen(products, scores, v, mask, head)
        self.sums[g] *= self.fix[g]
        self.sums[g] += products

    def _weigh_seen(
        self, products: Floats, weights: Floats, v: Floats, mask: Mask, head: int
    ) -> None:
        """products = weights v, where a row that does not see a key takes nothing of its values."""
        clean = shaped(self.values, *v.shape)
        if clean.ctypes.data != v.ctypes.data or clean.strides != v.strides:
            np.copyto(clean, v)
        ratio = weights.shape[1] // self.shape[1]
        for n, (x, w, values) in enumerate(zip(products, weights, clean)):
            heads = range(head + n * ratio, head + (n + 1) * ratio)
            odd = np.flatnonzero(~np.isfinite(values.sum(axis=1)))
            rows = values[odd]
            values[odd] = 0
            np.matmul(w, values, out=x)
            for j, row in zip(odd, rows):
                seeing = np.flatnonzero(mask.seeing(heads, int(j)))
                for s in split(len(seeing), max(1, PIECE // len(row))):
                    x[seeing[s]] += np.multiply.outer(w[seeing[s], j], row)

    def end(self, out: Raw, lse: bool) -> None:
        """out: [heads, queries, d_v], and one more for the log-sum-exp."""
        d_v = self.sums.shape[2]
        top, total = (x.reshape(*self.shape, 1) for x in (self.top, self.total))
        dead = self.new.view(np.bool_)[..., :1].reshape(total.shape)
        np.equal(total, 0, out=dead)
        np.copyto(total, 1, where=dead)
        np.divide(self.sums.reshape(*self.shape, d_v), total, out=out[..., :d_v])
        if lse:
            np.log(total, out=total)
            total += top
            np.copyto(total, -np.inf, where=dead)
            np.copyto(out[..., d_v:], total)


def _live(n_kv: int, kv_len: Raw | None, kv0: int) -> int:
    """How many of the keys count."""
    return n_kv if kv_len is None else max(0, min(n_kv, int(kv_len[0, 0, 0, 0]) - kv0))


@kernel(ops.flash_attn_ext, types=None, scratch=_flash_scratch)
def flash_attn_ext(
    out: Raw,
    q: Raw,
    k: Array,
    v: Array,
    mask: Raw | None,
    sinks: Raw | None,
    kv_len: Raw | None,
    *,
    scratch: Scratch,
    scale: float,
    max_bias: float,
    logit_softcap: float,
    prec: str,
    lse: bool,
    head0: int,
    n_head: int,
    kv0: int,
) -> None:
    n3, heads, n_q, d_k = q.shape
    _, heads_kv, n_kv, d_v = shape_of(v)
    cut = _cut_of(n_q, heads, heads_kv, n_kv, d_k, d_v)
    memory = [scratch.array(n) for n in cut.sizes()]
    work = work_of(scratch, k, v, mask)
    bias = memory[5]
    keys, values = (_Source(x, m, work) for x, m in zip((k, v), memory[-2:]))
    start = None if keys.direct else _inside(k, v)
    slopes = alibi_slopes(heads, head0, n_head, max_bias)
    if logit_softcap:
        scale /= logit_softcap
    for i3, h, i in product(range(n3), split(heads_kv, cut.heads), split(n_q, cut.queries)):
        mine = slice(h.start * cut.ratio, h.stop * cut.ratio)
        run = _Pass(cut, memory, (mine.stop - mine.start, i.stop - i.start))
        run.begin(q[i3, mine, i], scale, None if sinks is None else sinks[0, 0, 0, mine])
        for j in split(_live(n_kv, kv_len, kv0), cut.keys):
            tile = None
            if mask is not None:
                part = mask[i3 % len(mask), :, i, j]
                low, high = _range(part)
                if low == high == MINUS_INFINITY:
                    continue
                if high:
                    tile = Mask(part, slopes, bias, work)
            for g in split(h.stop - h.start, cut.group):
                some = slice(h.start + g.start, h.start + g.stop)
                ks = keys.at((i3, some, j))
                vs = values.at((i3, some, j)) if start is None else ks[..., start : start + d_v]
                run.see(g, ks, vs, logit_softcap, tile, some.start * cut.ratio)
        run.end(out[i3, i, mine].swapaxes(0, 1), lse)


def _range(mask: Raw) -> tuple[int, int]:
    """Least and largest bit pattern of f16 numbers: 0 and 0 where all are 0."""
    bits = mask.view(np.uint16)
    return int(bits.min()), int(bits.max())


def _mask_piece(n_kv: int, n_tokens: int) -> int:
    return min(n_kv * n_tokens, max(PIECE, n_kv))


@kernel(ops.causal_mask, scratch=lambda node: scratch_bytes(*(_mask_piece(*node.ne[:2]),) * 2))
def causal_mask(out: Raw, pos: Raw, *, scratch: Scratch, n_kv: int, window: int | None) -> None:
    last = int(pos.max())
    if last >= n_kv:
        raise IdError(
            f"position {last} is past the keys: n_kv={n_kv}, counted from 0, so its own key would "
            "not be seen; a negative position sees none"
        )
    piece = _mask_piece(n_kv, out.shape[2])
    memory, flags = scratch.array(piece, np.int32), scratch.array(piece, np.bool_)
    for t in split(out.shape[2], max(1, PIECE // n_kv)):
        rows = out[0, 0, t]
        ahead = shaped(memory, *rows.shape)  # j - pos[i]
        for j in split(n_kv, 4096):
            ahead[:, j] = np.arange(j.start, j.stop, dtype=np.int32)
        # Every position below 0 sees nothing; -1 stands for all of them, as j + 2^31 is no int32.
        ahead -= np.maximum(pos[0, 0, 0, t, None], -1)
        hidden = shaped(flags, *rows.shape)
        np.greater(ahead, 0, out=hidden)
        rows.fill(0)
        np.copyto(rows, HIDDEN, where=hidden)
        if window is not None:
            np.less_equal(ahead, -window, out=hidden)
            np.copyto(rows, HIDDEN, where=hidden)

"""Fused attention: blocks of keys and an online softmax."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from pyggml import ops
from pyggml.backends.host_memory import (
    Array,
    Floats,
    Raw,
    Scratch,
    address_of,
    raw_of,
    shape_of,
)
from pyggml.backends.numpy.arrays import Work, codec_bytes, decoded, work_of
from pyggml.backends.numpy.blas import blas_view
from pyggml.backends.numpy.listed import Lists, listed_scratch
from pyggml.backends.numpy.masks import HIDDEN, Mask, alibi_slopes
from pyggml.backends.numpy.online_softmax import Blocks, OnlineSoftmax, Parts
from pyggml.backends.numpy.table import kernel
from pyggml.backends.numpy.tiling import TILE, scratch_bytes, split
from pyggml.dtypes import F32
from pyggml.node import Node

HIDDEN_BITS = int(HIDDEN.view(np.uint16))
#: Most f32 elements of scores, and of decoded keys and values, at a time.
SCORES = DECODED = 2 * TILE
#: Most f32 elements of the queries and sums of a pass.
PASS = 4 * TILE
#: Most f32 elements of the scores of several heads that are read in place; for few queries.
DIRECT = TILE // 4


def _blocks(
    n_q: int, heads: int, heads_kv: int, n_kv: int, d_k: int, d_v: int, in_place: bool
) -> Blocks:
    ratio = heads // heads_kv
    queries = min(n_q, 512, max(1, 1024 // ratio))
    rows = ratio * queries
    pass_heads = min(heads_kv, max(1, PASS // (rows * (d_k + d_v))))
    keys = min(n_kv, max(256, min(4096, SCORES // rows, DECODED // (d_k + d_v))))
    group = min(SCORES // (rows * keys), DECODED // (keys * (d_k + d_v)))
    if in_place:
        group = max(group, DIRECT // (rows * keys))
    group = min(pass_heads, max(1, group))
    return Blocks(ratio, queries, pass_heads, keys, group, d_k, d_v, in_place)


def _flash_scratch(node: Node) -> int:
    q, k, v = node["q"], node["k"], node["v"]
    if node.get("ids") is not None:
        return listed_scratch(node)
    shape = q.ne[1], q.ne[2], k.ne[2], k.ne[1], k.ne[0], v.ne[0]
    ways = (False, True) if k.dtype is v.dtype is F32 else (False,)  # the run knows the strides
    attention = max(scratch_bytes(*_blocks(*shape, in_place).sizes()) for in_place in ways)
    return attention + codec_bytes(k, v, node.get("mask"))


class _Reader:
    """Reads parts of K or V as f32: in place if BLAS can, else decoded into `memory`."""

    def __init__(self, x: Array, memory: Raw, work: Work) -> None:
        self.dtype, self.raw = raw_of(x)
        self.memory, self.work = memory, work
        self.in_place = blas_view(x)

    def read(self, index: tuple[Any, ...]) -> Floats:
        if self.in_place is not None:
            part: Floats = self.in_place[index]
            return part
        return decoded(self.dtype, self.raw[index], self.memory, self.work)


def _columns_of_k(k: Array, v: Array) -> int | None:
    """The column of k at which v begins, if v is a view of k's columns (the latent cache of MLA);
    else None."""
    (k_type, k_raw), (v_type, v_raw) = raw_of(k), raw_of(v)
    if k_type != v_type or k_raw.strides != v_raw.strides or k_raw.shape[1:3] != v_raw.shape[1:3]:
        return None
    start, remainder = divmod(address_of(v_raw) - address_of(k_raw), k_type.nbytes)
    fits = remainder == 0 <= start and start + v_raw.shape[3] <= k_raw.shape[3]
    return start * k_type.block if fits else None


def _live(n_kv: int, kv_len: Raw | None, kv0: int) -> int:
    """The number of keys before kv_len."""
    return n_kv if kv_len is None else max(0, min(n_kv, int(kv_len[0, 0, 0, 0]) - kv0))


def _bit_range(mask: Raw) -> tuple[int, int]:
    """The least and the largest bit pattern of f16 numbers; both are 0 if all numbers are 0."""
    bits = mask.view(np.uint16)
    return int(bits.min()), int(bits.max())


@kernel(ops.flash_attn_ext, types=None, scratch=_flash_scratch)
def flash_attn_ext(
    out: Raw,
    q: Raw,
    k: Array,
    v: Array,
    mask: Raw | None,
    sinks: Raw | None,
    kv_len: Raw | None,
    ids: Raw | None,
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
    slopes = alibi_slopes(heads, head0, n_head, max_bias)
    if logit_softcap:
        scale /= logit_softcap
    live = _live(n_kv, kv_len, kv0)
    if ids is not None:
        start = _columns_of_k(k, v)
        lists = Lists(k, v, start, mask, slopes, ids, live, scratch, heads)
        lists.attend(out, q, sinks, scale, logit_softcap, lse)
        return
    in_place = blas_view(k) is not None and blas_view(v) is not None
    blocks = _blocks(n_q, heads, heads_kv, n_kv, d_k, d_v, in_place)
    memory = Parts(*(scratch.array(n) for n in blocks.sizes()))
    work = work_of(scratch, k, v, mask)
    keys, values = _Reader(k, memory.keys, work), _Reader(v, memory.values, work)
    v_start = _columns_of_k(k, v) if keys.in_place is None else None
    for i3, h, i in product(range(n3), split(heads_kv, blocks.heads), split(n_q, blocks.queries)):
        q_heads = slice(h.start * blocks.ratio, h.stop * blocks.ratio)
        shape = (q_heads.stop - q_heads.start, i.stop - i.start)
        softmax = OnlineSoftmax(blocks, memory, shape)
        softmax.begin(q[i3, q_heads, i], scale, None if sinks is None else sinks[0, 0, 0, q_heads])
        for j in split(live, blocks.keys):
            tile = None
            if mask is not None:
                part = mask[i3 % len(mask), :, i, j]
                low, high = _bit_range(part)
                if low == high == HIDDEN_BITS:
                    continue
                if high:
                    tile = Mask(part, slopes, memory.bias, work)
            for g in split(h.stop - h.start, blocks.group):
                group = slice(h.start + g.start, h.start + g.stop)
                ks = keys.read((i3, group, j))
                if v_start is None:
                    vs = values.read((i3, group, j))
                else:
                    vs = ks[..., v_start : v_start + d_v]
                softmax.add(g, ks, vs, logit_softcap, tile, group.start * blocks.ratio)
        softmax.end(out[i3, i, q_heads].swapaxes(0, 1), lse)

"""Attention over a window of tokens and over compressed rows of all before (DeepSeek V4).

A layer has one key head, whose rows are the values, too. Its ratio says what it attends to:

0     the window: the last tokens
4     the window, and the top_k best rows of an overlapping compressor (compressor.py). An indexer
      with heads and compressed rows of its own scores them
128   the window, and all rows of a plain compressor

One softmax is over both parts and a sink. Values were rotated as keys were, so the result is
rotated back by the query's position. The heads' results are multiplied in groups (attn_output_a),
and the groups' products are joined by attn_output_b.
T is the number of tokens, H of heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from pyggml.models.batch import Batch, Options
from pyggml.models.cache import ring_rows
from pyggml.models.compressor import (
    CompressedCache,
    Compressor,
    compress,
    compressed_cache,
    compressor_states,
)
from pyggml.models.keys import Keys, key
from pyggml.models.layers import SWAP, Rope, attend_plain, linear, listed, norm, unpacked
from pyggml.models.weights import Layer
from pyggml.node import Node
from pyggml.ops import (
    cast,
    causal_mask,
    concat,
    flash_attn_ext,
    lightning_indexer,
    merge_lse,
    mul_mat,
    permute,
    repeat,
    reshape,
    rms_norm,
    scale,
    state,
    top_k,
    view,
)
from pyggml.ops.copy import flat

#: The ratios that files may have.
PLAIN, SPARSE, HEAVY = 0, 4, 128
Sizes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressed:
    """The numbers of the attention, from a file's keys.

    d         elements of a head of queries, keys and values
    n_group   groups of heads, whose products with attn_output_a have out_rank elements each
    n_index, d_index, top_k   the indexer's heads, their elements, and how many rows it chooses
    freq_base of the rope in layers with a compressor; the others have rope.freq_base, and no
              scaling
    """

    n_head: int = key("attention.head_count")
    d: int = key("attention.key_length")
    n_rot: int = key("rope.dimension_count")
    q_rank: int = key("attention.q_lora_rank")
    window: int = key("attention.sliding_window")
    n_group: int = key("attention.output_group_count")
    out_rank: int = key("attention.output_lora_rank")
    n_index: int = key("attention.indexer.head_count")
    d_index: int = key("attention.indexer.key_length")
    top_k: int = key("attention.indexer.top_k")
    freq_base: float = key("attention.compress_rope_freq_base")

    def check(self, keys: Keys) -> None:
        """Raise a GGUFError for numbers that do not fit."""
        keys.equal("attention.head_count_kv", 1, "the one head of keys that this model has")
        keys.equal("attention.value_length", self.d, "attention.key_length: keys are values")
        most = min(self.d, self.d_index)
        if self.n_rot % 2 or self.n_rot > most:
            keys.fail("rope.dimension_count", f"{self.n_rot}, must be even and at most {most}")
        if self.n_head % self.n_group:
            problem = f"{self.n_group}, must divide {self.n_head} heads"
            keys.fail("attention.output_group_count", problem)

    def fields(self) -> dict[str, int]:
        """Keys that follow from others."""
        return {"attention.head_count_kv": 1, "attention.value_length": self.d}

    def tensors(self, n_embd: int, ratio: int) -> Sizes:
        """The tensors of a layer."""
        heads = self.n_head * self.d
        sizes: Sizes = {
            "attn_q_a": (n_embd, self.q_rank),
            "attn_q_a_norm": (self.q_rank,),
            "attn_q_b": (self.q_rank, heads),
            "attn_kv": (n_embd, self.d),
            "attn_kv_a_norm": (self.d,),
            "attn_sinks": (self.n_head,),
            "attn_output_a": (heads // self.n_group, self.out_rank, self.n_group),
            "attn_output_b": (self.n_group * self.out_rank, n_embd),
        }
        if ratio:
            sizes |= _compressor_tensors("attn_compressor", n_embd, self.d, ratio)
        if ratio == SPARSE:
            sizes["indexer.attn_q_b"] = (self.q_rank, self.n_index * self.d_index)
            sizes["indexer.proj"] = (n_embd, self.n_index)
            sizes |= _compressor_tensors("indexer_compressor", n_embd, self.d_index, ratio)
        return sizes

    def cache(
        self, il: int, ratio: int, n_ctx: int, n_batch: int, options: Options
    ) -> CompressedCache:
        """cache_kv_lIL, and the states of the layer's compressors: cache_comp and cache_index."""

        def compressor(name: str, d: int, type_: str) -> Compressor:
            return compressor_states(
                il, name, n_ctx, n_batch, d=d, ratio=ratio, overlapping=ratio == SPARSE,
                type=type_,
            )  # fmt: skip

        n_rows = ring_rows(self.window, n_ctx, n_batch)
        window = state(f"cache_kv_l{il}", options.cache_k, ne=(self.d, n_rows))
        compressors = [compressor("comp", self.d, options.cache_k)] if ratio else []
        if ratio == SPARSE:
            compressors.append(compressor("index", self.d_index, options.cache_i))
        return compressed_cache(window, self.window, *compressors)

    def rope(self, rope: Rope, ratio: int) -> Rope:
        """The rope of a layer. Its cosines and sines have no factor, whatever YaRN says."""
        if not ratio:
            return Rope(freq_base=rope.freq_base, n_ctx_orig=rope.n_ctx_orig, scaling="none")
        factor = 1.0
        if rope.scaling == "yarn":
            factor = 1 / (1 - 0.1 * float(np.log(rope.freq_scale)))
        return replace(rope, freq_base=self.freq_base, attn_factor=factor)


def _compressor_tensors(name: str, n_embd: int, d: int, ratio: int) -> Sizes:
    w = d * (1 + (ratio == SPARSE))
    return {
        f"{name}_kv": (n_embd, w),
        f"{name}_gate": (n_embd, w),
        f"{name}_ape": (w, ratio),
        f"{name}_norm": (d,),
    }


# -- graphs -------------------------------------------------------------------------------------


def attention(
    layer: Layer,
    x: Node,
    cache: CompressedCache,
    batch: Batch,
    a: Compressed,
    rope: Rope,
    eps: float,
) -> Node:
    """f32 [n_embd, T]; x is normalized, and `rope` that of the layer."""

    def rotate(y: Node, pos: Node, *, back: bool = False) -> Node:
        """The last elements of each row."""
        offset = y.ne[0] - a.n_rot
        return rope.rotate(y, pos, n_rot=a.n_rot, mode="normal", offset=offset, back=back)

    n_tokens = x.ne[1]
    qr = norm(layer, "attn_q_a_norm", linear(layer, "attn_q_a", x), eps)
    q = reshape(linear(layer, "attn_q_b", qr), ne=(a.d, a.n_head, n_tokens))
    q = permute(layer.label(rotate(rms_norm(q, eps=eps), batch.pos), "Qcur"), axes=SWAP)
    kv = norm(layer, "attn_kv_a_norm", linear(layer, "attn_kv", x), eps)
    kv = rotate(reshape(kv, ne=(a.d, 1, n_tokens)), batch.pos)
    kv = layer.label(reshape(kv, ne=(a.d, n_tokens)), "Kcur")
    rows = cache.write(0, kv, batch)
    compressors, past = cache.compressors, None
    if compressors:
        old = compress(layer, x, "attn_compressor", compressors[0], batch, rotate, eps)
        ratio, n_rows = compressors[0].ratio, compressors[0].visible(batch.n_kv)
        mask, ids = causal_mask(batch.pos, n_kv=n_rows, stride=ratio), None
        if len(compressors) > 1:
            keys = compress(layer, x, "indexer_compressor", compressors[1], batch, rotate, eps)
            ids = _chosen(layer, x, qr, keys, mask, batch, a, rotate)
        past = Past(old, mask, ids)
    attend = _attend_flash if batch.options.flash else _attend_plain
    y = attend(layer, q, rows, cache.mask(batch), past, a.d**-0.5)
    y = rotate(layer.label(y, "kqv"), batch.pos, back=True)
    return layer.label(_output(layer, layer.label(y, "kqv_out"), a), "attn_out")


class Past(NamedTuple):
    """What a layer attends to besides the window.

    rows  [d, n]             compressed rows
    mask  f16 [n, T]
    ids   i32 [top_k, T]     the rows that a token attends to; None: all
    """

    rows: Node
    mask: Node
    ids: Node | None


def _attend_flash(
    layer: Layer, q: Node, rows: Node, mask: Node, past: Past | None, scale: float
) -> Node:
    """[d, H, T]: attention to each part by itself, then merged.

    q     [d, T, H]
    rows  [d, n_window]        keys and values of the window
    mask  f16 [n_window, T]
    """
    sinks = layer["attn_sinks"]
    y = flash_attn_ext(q, rows, rows, mask, sinks, scale=scale, lse=past is not None)
    if past is None:
        return y
    old, ids = past.rows, past.ids
    y = merge_lse(y, flash_attn_ext(q, old, old, past.mask, ids=ids, scale=scale, lse=True))
    return view(y, ne=(rows.ne[0], *y.ne[1:3]))


def _attend_plain(
    layer: Layer, q: Node, rows: Node, mask: Node, past: Past | None, scale: float
) -> Node:
    """The same without flash attention: one softmax over the rows of both parts, side by side. With
    ids each token has rows of its own, so the window is repeated for each."""
    n, n_tokens, ids = rows.ne[1], q.ne[1], None
    if past is not None:
        old, seen, ids = unpacked(past.rows), past.mask, past.ids
        rows = unpacked(rows)
        if ids is not None:
            q, old, _, seen = listed(q, old, old, seen, ids)
            if rows.dtype != old.dtype:
                rows = cast(rows, dtype=old.dtype)
            rows = repeat(reshape(rows, ne=(rows.ne[0], n, 1, 1)), ne=(rows.ne[0], n, 1, n_tokens))
            mask = reshape(mask, ne=(n, 1, 1, n_tokens))
        rows, mask = concat(rows, old, dim=1), concat(mask, seen, dim=0)
    kqv = attend_plain(layer, q, rows, rows, mask, scale=scale, sinks=layer["attn_sinks"])
    return permute(kqv, axes=SWAP) if ids is None else reshape(kqv, ne=(kqv.ne[0], *kqv.ne[2:]))


def _chosen(
    layer: Layer,
    x: Node,
    qr: Node,
    keys: Node,
    mask: Node,
    batch: Batch,
    a: Compressed,
    rotate: Callable[[Node, Node], Node],
) -> Node | None:
    """The rows that the indexer chooses, i32 [top_k, T]; None if there are no more than that."""
    if keys.ne[1] <= a.top_k:
        return None
    n_tokens = x.ne[1]
    q = reshape(linear(layer, "indexer.attn_q_b", qr), ne=(a.d_index, a.n_index, n_tokens))
    q = layer.label(rotate(q, batch.pos), "index_q")
    w = mul_mat(layer["indexer.proj"], x, prec="f32")
    w = layer.label(scale(w, s=(a.n_index * a.d_index) ** -0.5), "indexer_weights")
    scores = layer.label(lightning_indexer(q, keys, w, mask), "indexer_score")
    return layer.label(top_k(scores, k=a.top_k), "top_k")


def _output(layer: Layer, y: Node, a: Compressed) -> Node:
    """attn_output_b of the groups' products: f32 [n_embd, T] from y [d, H, T]."""
    n_tokens = y.ne[2]
    y = reshape(y, ne=(a.d * a.n_head // a.n_group, a.n_group, n_tokens))
    y = permute(linear(layer, "attn_output_a", permute(y, axes=SWAP)), axes=SWAP)
    return linear(layer, "attn_output_b", flat(y, a.out_rank * a.n_group, n_tokens))

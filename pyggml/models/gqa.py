"""Attention whose query heads share fewer heads of K and V (grouped queries).

T is the number of tokens, and n_kv the number of cache rows that the attention reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyggml.models.base import Architecture
from pyggml.models.batch import Batch, Options
from pyggml.models.cache import Cache, kv_cache
from pyggml.models.keys import Keys, group, key, same
from pyggml.models.layers import SWAP, Rope, attend, joined, linear, norm
from pyggml.models.weights import Layer
from pyggml.node import Node
from pyggml.ops import permute, reshape


def _head_size(keys: Keys) -> int:
    return keys.integer("embedding_length") // keys.integer("attention.head_count")


def _key_size(keys: Keys) -> int:
    return keys.integer("attention.key_length", _head_size(keys))


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """The heads of a model, from its keys.

    n_head, n_head_kv  how many of queries, and of keys and values; n_head_kv divides n_head
    d_k, d_v           elements of a head of queries and keys, and of one of values
    n_rot              elements of a head of queries and keys that are rotated
    """

    n_head: int = key("attention.head_count")
    n_head_kv: int = key("attention.head_count_kv", same("attention.head_count"))
    d_k: int = key("attention.key_length", _head_size)
    d_v: int = key("attention.value_length", _head_size)
    n_rot: int = key("rope.dimension_count", _key_size)

    def check(self, keys: Keys) -> None:
        """Raise a GGUFError for numbers that do not fit."""
        if self.n_head % self.n_head_kv:
            keys.fail("attention.head_count_kv", f"{self.n_head_kv}, must divide {self.n_head}")
        if self.n_rot % 2 or self.n_rot > self.d_k:
            keys.fail("rope.dimension_count", f"{self.n_rot}, must be even and at most {self.d_k}")

    def tensors(self, n_embd: int) -> dict[str, tuple[int, ...]]:
        """The matrices of `gqa`."""
        return {
            "attn_q": (n_embd, self.n_head * self.d_k),
            "attn_k": (n_embd, self.n_head_kv * self.d_k),
            "attn_v": (n_embd, self.n_head_kv * self.d_v),
            "attn_output": (self.n_head * self.d_v, n_embd),
        }

    def norms(self) -> dict[str, tuple[int, ...]]:
        """The norms of `gqa` with norm_eps."""
        return {"attn_q_norm": (self.d_k,), "attn_k_norm": (self.d_k,)}

    def cache(
        self, il: int, n_ctx: int, options: Options, *, window: int | None = None, n_batch: int = 0
    ) -> Cache:
        """The cache of layer `il`; with a window, one for batches of up to `n_batch` tokens."""
        return kv_cache(
            il, n_ctx, d_k=self.d_k, d_v=self.d_v, n_head_kv=self.n_head_kv,
            types=(options.cache_k, options.cache_v), window=window, n_batch=n_batch,
        )  # fmt: skip


def gqa(
    layer: Layer,
    x: Node,
    cache: Cache,
    batch: Batch,
    heads: Heads,
    rope: Rope,
    *,
    mode: Literal["normal", "neox"],
    scale: float | None = None,
    norm_eps: float | None = None,
    freq_factors: Node | None = None,
) -> Node:
    """f32 [n_embd, T]. Write K and V of the batch to the cache, and attend to it.

    scale     of k.q; 1/sqrt(d_k) by default
    norm_eps  normalize each head of q and k (attn_q_norm, attn_k_norm) with this epsilon
    """

    def split(name: str, n: int, d: int) -> Node:
        return reshape(linear(layer, name, x), ne=(d, n, x.ne[1]))

    def rotated(name: str, n: int) -> Node:
        y = split(name, n, heads.d_k)
        if norm_eps is not None:
            y = norm(layer, f"{name}_norm", y, norm_eps)
        return rope.rotate(y, batch.pos, n_rot=heads.n_rot, mode=mode, freq_factors=freq_factors)

    q = layer.label(rotated("attn_q", heads.n_head), "Qcur")
    k = layer.label(rotated("attn_k", heads.n_head_kv), "Kcur")
    v = layer.label(split("attn_v", heads.n_head_kv, heads.d_v), "Vcur")
    keys = cache.write(0, permute(k, axes=SWAP), batch)
    values = cache.write(1, permute(v, axes=SWAP), batch)
    y = attend(
        layer,
        permute(q, axes=SWAP),
        keys,
        values,
        cache.mask(batch),
        scale=heads.d_k**-0.5 if scale is None else scale,
        flash=batch.options.flash,
        sinks=layer.get("attn_sinks"),
    )
    return layer.label(linear(layer, "attn_output", layer.label(joined(y), "kqv_out")), "attn_out")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedQueries(Architecture):
    """What architectures whose layers all call `gqa` have in common.

    n_ff  width of the feed-forward net, of layers without experts
    """

    n_ff: int = key("feed_forward_length")
    heads: Heads = group(Heads)
    rope: Rope = group(Rope)

    def check(self, keys: Keys) -> None:
        self.heads.check(keys)

    def cache(self, il: int, n_ctx: int, n_batch: int, options: Options) -> Cache:
        return self.heads.cache(il, n_ctx, options)

"""gpt-oss (20b, 120b): a sliding window in every other layer, sinks, and experts with biases."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pyggml.gguf import GGUFFile
from pyggml.models.base import Sizes, register
from pyggml.models.batch import Batch, Options
from pyggml.models.cache import Cache
from pyggml.models.gqa import GroupedQueries, gqa
from pyggml.models.keys import Keys, group, key
from pyggml.models.moe import Experts, moe
from pyggml.models.weights import Layer
from pyggml.node import Node
from pyggml.ops import clamp, mul, scale, sigmoid

#: Constants of the activation, in no key: llama.cpp and transformers have them in their code.
ALPHA, LIMIT = 1.702, 7.0


def swiglu_oai(gate: Node, up: Node) -> Node:
    """g sigmoid(ALPHA g) (u + 1), with g = min(gate, LIMIT), u = clip(up, -LIMIT, LIMIT)."""
    g = clamp(gate, min=float("-inf"), max=LIMIT)
    u = clamp(up, min=-LIMIT, max=LIMIT)
    return mul(mul(g, sigmoid(scale(g, s=ALPHA))), scale(u, s=1.0, b=1.0))


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class GptOss(GroupedQueries):
    """Layers 0, 2, 4, ... see only the last `window` tokens.

    The published models do not round the range of pairs in which YaRN blends frequencies
    (`truncate: false` in config.json): it is 8.09 to 17.40. No key says so, and llama.cpp's rope
    rounds it for every file, to 8 and 18. So does pyggml: its logits are llama.cpp's, not exactly
    OpenAI's.
    """

    name = "gpt-oss"
    norms = ("attn_norm", "post_attention_norm")

    window: int = key("attention.sliding_window")
    n_ff: int = key("feed_forward_length", 0, least=0)  # unused: all layers have experts
    experts: Experts = group(Experts)

    @classmethod
    def derived(cls, keys: Keys, file: GGUFFile, values: dict[str, Any]) -> dict[str, Any]:
        return {"experts": replace(values["experts"], gating_func=3)}

    def check(self, keys: Keys) -> None:
        GroupedQueries.check(self, keys)
        self.experts.check(keys, self.n_layer)

    def layer_tensors(self, il: int) -> Sizes:
        sizes: Sizes = {name: (self.n_embd,) for name in self.norms}
        products = self.heads.tensors(self.n_embd) | self.experts.tensors(self.n_embd)
        sizes |= products | {f"{name}.bias": ne[1:] for name, ne in products.items()}
        return sizes | {"attn_sinks": (self.heads.n_head,)}

    def cache(self, il: int, n_ctx: int, n_batch: int, options: Options) -> Cache:
        window = None if il % 2 else self.window
        return self.heads.cache(il, n_ctx, options, window=window, n_batch=n_batch)

    def attention(self, x: Node, layer: Layer, cache: Cache, batch: Batch) -> Node:
        return gqa(layer, x, cache, batch, self.heads, self.rope, mode="neox")

    def feed_forward(self, x: Node, layer: Layer, batch: Batch) -> Node:
        return moe(layer, x, self.experts, fused=False, gated=swiglu_oai)

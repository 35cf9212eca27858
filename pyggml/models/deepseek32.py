"""DeepSeek V3.2: V3 with sparse attention."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from pyggml.errors import ShapeError
from pyggml.gguf import GGUFFile
from pyggml.models.base import Architecture, Sizes, register
from pyggml.models.batch import Batch, Options
from pyggml.models.cache import Cache, latent_cache
from pyggml.models.indexer import Indexer
from pyggml.models.keys import Keys, group, key
from pyggml.models.latent import Latent, has_choice_bias, head_sizes, yarn_log_mul
from pyggml.models.mla import mla
from pyggml.models.moe import Experts, has_merged
from pyggml.models.weights import Layer
from pyggml.node import Node


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSeek32(Latent):
    """Latent attention over the rows that an indexer (indexer.py) chooses for each token.

    A graph that reads at most top_k rows attends to all of them, and computes only the keys of the
    indexer. Above, each token reads top_k rows, in the latent form for prompts, too.

    index_mode  which elements of the indexer's heads rotate together
    """

    name = "deepseek32"
    mla_forms = (1, 3)
    index_mode: ClassVar[Literal["normal", "neox"]] = "neox"

    q_lora_rank: int = key("attention.q_lora_rank")
    indexer: Indexer = group(Indexer)

    @classmethod
    def derived(cls, keys: Keys, file: GGUFFile, values: dict[str, Any]) -> dict[str, Any]:
        experts = replace(
            cls.gated(keys, values["experts"]), choice_bias=has_choice_bias(file, values)
        )
        return head_sizes(keys, values, absorbed=True) | {
            "experts": experts,
            "yarn_log_mul": yarn_log_mul(keys, values["yarn_log_mul"]),
            "merged": has_merged(file),
        }

    @classmethod
    def gated(cls, keys: Keys, experts: Experts) -> Experts:
        """The experts with their gating function."""
        if experts.gating_func not in (1, 2):
            keys.integer("expert_gating_func", least=1, most=2)  # raises
        return experts

    def check(self, keys: Keys) -> None:
        Latent.check(self, keys)
        self.indexer.check(keys, self.n_rot)

    def fields(self) -> dict[str, Any]:
        keys = {
            "head_count_kv": 1,
            "key_length": self.kv_lora_rank + self.n_rot,
            "value_length": self.kv_lora_rank,
            "key_length_mla": self.d_k,
            "value_length_mla": self.d_v,
        }
        own = {f"{self.name}.attention.{key}": value for key, value in keys.items()}
        return Architecture.fields(self) | own

    @property
    def rope_attn_factor(self) -> float:
        """a = A / (1 + yarn_log_multiplier L) with the key attn_factor A and L = ln(factor).

        rope_ext multiplies it by 1 + 0.1 L, as transformers and llama.cpp do; in V3.2 the product
        is 1. Without YaRN, a = A.
        """
        if self.rope.scaling == "yarn":
            return self.rope.attn_factor / (1 + self.yarn_log_mul * self.log_factor)
        return self.rope.attn_factor

    @property
    def kq_scale(self) -> float:
        """Scale of q.k: (1 + yarn_log_multiplier L)^2 / sqrt(d_k), as in transformers.

        llama.cpp has 0.1 in place of the multiplier, which is 0.1 in V3.2.
        """
        ms = 1 + self.yarn_log_mul * self.log_factor
        return ms * ms / math.sqrt(self.d_k)

    def has_indexer(self, il: int) -> bool:
        """Whether layer `il` chooses rows; else it uses those of the layer before."""
        return True

    def layer_tensors(self, il: int) -> Sizes:
        sizes = Latent.layer_tensors(self, il)
        if self.has_indexer(il):
            sizes |= self.indexer.tensors(self.n_embd, self.q_lora_rank)
        return sizes

    # -- graphs -------------------------------------------------------------------------------

    def dense_rows(self) -> int:
        return self.indexer.top_k

    def cache(self, il: int, n_ctx: int, n_batch: int, options: Options) -> Cache:
        if options.mla not in self.mla_forms:
            raise ShapeError(
                f"mla={options.mla}: {self.name} has sparse attention, which reads a latent cache; "
                "use mla=1 or mla=3"
            )
        row = self.kv_lora_rank + self.n_rot
        index = (self.indexer.d, options.cache_i) if self.has_indexer(il) else None
        return latent_cache(il, n_ctx, row, options.cache_k, index=index)

    def attention(self, x: Node, layer: Layer, cache: Cache, batch: Batch) -> Node:
        sparse = batch.n_kv > self.indexer.top_k

        def choose(q_a: Node) -> Node | None:
            if self.has_indexer(layer.il):
                batch.chosen = self._choice(x, q_a, layer, cache, batch, sparse)
            return batch.chosen

        return mla(
            layer, x, Cache(cache.states[:1]), batch, self.mla_numbers, self.rotation(batch),
            form="latent" if sparse else self.form(batch), choose=choose,
        )  # fmt: skip

    def _choice(
        self, x: Node, q_a: Node, layer: Layer, cache: Cache, batch: Batch, sparse: bool
    ) -> Node | None:
        """The rows that each token attends to; None: all. Writes the indexer's keys."""

        def rotate(y: Node) -> Node:
            return self.rope.rotate(y, batch.pos, n_rot=self.n_rot, mode=self.index_mode,
                                    attn_factor=self.rope_attn_factor)  # fmt: skip

        rows = cache.write(1, self.indexer.key(layer, x, rotate), batch)
        if not sparse:
            return None
        return self.indexer.choose(layer, x, q_a, rows, cache.mask(batch), rotate)

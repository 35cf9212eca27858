"""GLM-5, 5.1 and 5.2."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pyggml.gguf import GGUFFile
from pyggml.models.base import register
from pyggml.models.deepseek32 import DeepSeek32
from pyggml.models.keys import Keys
from pyggml.models.moe import Experts

#: Context of the first model with shared layers, by which llama.cpp knows it without the key.
GLM_52_CTX = 1 << 20


def default_types(n_layer: int, n_ctx_train: int) -> tuple[bool, ...]:
    """Which layers have an indexer in files without the key.

    All in GLM-5 and 5.1. In GLM-5.2 layers 0, 1, 2, 6, 10, 14, ...
    """
    if n_ctx_train < GLM_52_CTX:
        return (True,) * n_layer
    return tuple(il < 2 or il % 4 == 2 for il in range(n_layer))


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class GlmDsa(DeepSeek32):
    """DeepSeek V3.2's layers, but neighbours rotate together in the indexer, too.

    types  of each layer, whether it has an indexer ("full"). Others ("shared") have none and no
           cache for it: they attend to the rows that the nearest full layer before them chose
    """

    name = "glm-dsa"
    index_mode = "normal"

    types: tuple[bool, ...]

    @classmethod
    def derived(cls, keys: Keys, file: GGUFFile, values: dict[str, Any]) -> dict[str, Any]:
        n_layer = values["n_block"] - values["n_nextn"]
        types = _types(keys, n_layer, values["n_ctx_train"])
        return super(GlmDsa, cls).derived(keys, file, values) | {"types": types}

    @classmethod
    def gated(cls, keys: Keys, experts: Experts) -> Experts:
        return DeepSeek32.gated(keys, replace(experts, gating_func=experts.gating_func or 2))

    def fields(self) -> dict[str, Any]:
        types = {f"{self.name}.attention.indexer.types": np.array(self.types, np.bool_)}
        return DeepSeek32.fields(self) | types

    def has_indexer(self, il: int) -> bool:
        return self.types[il]


def _types(keys: Keys, n_layer: int, n_ctx_train: int) -> tuple[bool, ...]:
    name = "attention.indexer.types"
    if not keys.has(name):
        return default_types(n_layer, n_ctx_train)
    value = keys.fields[f"{keys.architecture}.{name}"]
    if not isinstance(value, np.ndarray) or value.dtype != np.bool_:
        keys.fail(name, "must be an array of bools")
    if len(value) != n_layer:
        keys.fail(name, f"{len(value)} values, must be {n_layer}, one for each layer")
    if not value[0]:
        keys.fail(name, "layer 0 must have an indexer: there is none before it")
    return tuple(map(bool, value))

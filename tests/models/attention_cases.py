"""Attention layers for tests: weights, input, and the output expected of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

import pyggml as gg
from pyggml.models.batch import Batch, Options
from pyggml.models.deepseek2 import DeepSeek2
from pyggml.models.presets import TINY
from pyggml.models.weights import Layer
from tests.models.stand_ins import layer_of
from tests.reference.deepseek import attention_f64

#: All forms that exist; the second element is flash attention.
FORMS = [
    ("standard", True),
    ("standard", False),
    ("latent", True),
    ("latent", False),
    ("expanded", True),
]
IDS = ["standard-fa", "standard", "latent-fa", "latent", "expanded-fa"]
all_forms = pytest.mark.parametrize(("form", "flash"), FORMS, ids=IDS)
both_layouts = pytest.mark.parametrize("kv_b", ["joined", "split"])
MLA = {"standard": 0, "latent": 1, "expanded": 3}
#: Bound of f32 sums against float64; measured errors are 5e-7 to 1e-6.
EXACT = 1e-5

Array = np.ndarray[Any, Any]


def options(form: str, flash: bool = True, cache_type: str = "f16") -> Options:
    """Options whose graphs have this form for any number of tokens."""
    return Options(
        mla=MLA[form], expand_from=1, flash=flash, cache_k=cache_type, cache_v=cache_type
    )


class CaseBatch(Batch):
    """A batch whose tokens have positions for rope, and others for the mask; `ids` is a type."""

    def __init__(self, n_tokens: int, n_kv: int, options: Options, ids: str) -> None:
        super().__init__(n_tokens, n_kv, options, n_tokens)
        self.rows = gg.input("ids", ids, ne=(n_tokens,))
        self.mask_pos = gg.input("mask_pos", "i32", ne=(n_tokens,))

    def mask(self, n_kv: int, window: int | None = None) -> gg.Node:
        return gg.causal_mask(self.mask_pos, n_kv=n_kv, window=window)


@dataclass
class AttentionCase:
    """A layer, the hidden states of some tokens, and the layer's output for them in float64."""

    arch: DeepSeek2
    layer: Layer
    x: Array
    expected: Array
    first_position: int = 0

    def plan(
        self,
        options: Options,
        n_tokens: int,
        n_kv: int,
        store: gg.Store,
        n_ctx: int | None = None,
        amb: float | None = None,
        ids: str = "i32",
    ) -> gg.Plan:
        """A plan for n_tokens tokens that reads n_kv rows of the cache."""
        batch = CaseBatch(n_tokens, n_kv, options, ids)
        cache = self.arch.cache(self.layer.il, n_ctx or n_kv, n_tokens, options)
        x = gg.input("x", ne=(self.arch.n_embd, n_tokens))
        y = self.arch.attention(x, self.layer, cache, batch)
        return gg.compile({"y": y}, store=store, amb=amb)

    def feed(self, plan: gg.Plan, start: int, stop: int) -> Array:
        """The output for tokens start to stop - 1, which go to the cache rows of these numbers."""
        rows = np.arange(start, stop)
        pos = rows + self.first_position
        return plan.run(x=self.x[start:stop], pos=pos, mask_pos=rows, ids=rows)["y"]

    def run(
        self,
        options: Options,
        batches: Sequence[int],
        n_kv: int = 32,
        store: gg.Store | None = None,
        **more: Any,
    ) -> Array:
        """The layer's output for consecutive batches of these sizes; one run for each batch."""
        store = store or gg.Store()
        plans = {n: self.plan(options, n, n_kv, store, **more) for n in set(batches)}
        ends = np.cumsum(batches)
        return np.concatenate([self.feed(plans[n], end - n, end) for n, end in zip(batches, ends)])


def split_kv_b(weights: dict[str, Array], n_head: int, d_nope: int) -> dict[str, Array]:
    """The weights with attn_k_b and attn_v_b in place of attn_kv_b."""
    weights = dict(weights)
    joined = weights.pop("attn_kv_b")
    by_head = joined.reshape(n_head, -1, joined.shape[-1])
    weights["attn_k_b"] = np.ascontiguousarray(by_head[:, :d_nope].swapaxes(1, 2))
    weights["attn_v_b"] = np.ascontiguousarray(by_head[:, d_nope:])
    return weights


def sizes_of(arch: DeepSeek2) -> dict[str, Any]:
    """The keywords of attention_f64."""
    return {
        "n_head": arch.n_head,
        "qk_nope": arch.d_nope,
        "qk_rope": arch.n_rot,
        "v_dim": arch.d_v,
        "kv_lora": arch.kv_lora_rank,
        "eps": arch.rms_eps,
        "kq_scale": arch.kq_scale,
        "freq_base": arch.rope.freq_base,
        "freq_scale": arch.rope.freq_scale,
        "ext_factor": arch.rope.ext_factor,
        "attn_factor": arch.rope_attn_factor,
        "n_ctx_orig": arch.rope.n_ctx_orig,
        "beta_fast": arch.rope.beta_fast,
        "beta_slow": arch.rope.beta_slow,
        "temperature_scale": arch.temperature_scale,
        "temperature_length": arch.temperature_length or arch.rope.n_ctx_orig,
    }


def random_case(
    n_head: int,
    kv_b: str,
    type: str = "f32",
    n_tokens: int = 24,
    q_lora: int | None = None,
    factors: bool = False,
    **changes: Any,
) -> AttentionCase:
    """A layer with V3's YaRN, weights of `type`, and sizes that are multiples of 32.

    `factors` gives every product a factor and divides its weights by it.
    """
    arch = replace(
        TINY, n_embd=96, n_head=n_head, q_lora_rank=q_lora, kv_lora_rank=64, d_nope=32, n_rot=32,
        d_v=64, kv_b=kv_b, **changes,
    )  # fmt: skip
    rng = np.random.default_rng(n_head)
    matrices = random_matrices(arch, rng)
    scales: dict[str, Array] = {}
    if factors:
        scales = {f"{k}.scale": np.float32([2.0 ** -(9 + i)]) for i, k in enumerate(matrices)}
        matrices = {k: w / scales[f"{k}.scale"] for k, w in matrices.items()}
    nodes = {k: gg.constant(w.astype("f4"), dtype=type, name=k) for k, w in matrices.items()}
    weights = {k: round_to(type, w, nodes[k]) for k, w in matrices.items()}
    norms = {"attn_kv_a_norm": 64} | ({"attn_q_a_norm": q_lora} if q_lora else {})
    for key, n in norms.items():
        weights[key] = 1 + 0.3 * rng.standard_normal(n).astype("f4")
    nodes |= {k: gg.constant(w, name=k) for k, w in weights.items() if k in norms}
    in_layer = {f"{k}.weight": node for k, node in nodes.items()}
    in_layer |= {k: gg.constant(w, name=k) for k, w in scales.items()}
    x = rng.standard_normal((n_tokens, 96)).astype("f4")
    in_file = {f"{k}.weight": w for k, w in weights.items()} | scales
    expected = attention_f64(in_file, x, np.arange(n_tokens), **sizes_of(arch))
    return AttentionCase(arch, layer_of(in_layer, 3), x, expected)


def random_matrices(arch: DeepSeek2, rng: np.random.Generator) -> dict[str, Array]:
    """Matrices in NumPy shape that keep the scale of their input."""
    n_embd, n_head = arch.n_embd, arch.n_head
    shapes = {
        "attn_kv_a_mqa": (arch.kv_lora_rank + arch.n_rot, n_embd),
        "attn_kv_b": (n_head * (arch.d_nope + arch.d_v), arch.kv_lora_rank),
        "attn_output": (n_embd, n_head * arch.d_v),
    }
    if arch.q_lora_rank is None:
        shapes["attn_q"] = (n_head * arch.d_k, n_embd)
    else:
        shapes["attn_q_a"] = (arch.q_lora_rank, n_embd)
        shapes["attn_q_b"] = (n_head * arch.d_k, arch.q_lora_rank)
    matrices = {k: rng.standard_normal(s) * s[-1] ** -0.5 for k, s in shapes.items()}
    return split_kv_b(matrices, n_head, arch.d_nope) if arch.kv_b == "split" else matrices


def round_to(type: str, matrix: Array, node: gg.Node) -> Array:
    """The matrix as a constant of this type holds it; q8_0 is decoded by gguf-py, not by pyggml."""
    if type == "f32":
        return matrix
    if type == "q8_0":
        raw = np.asarray(gg.ops.leaf.data_of(node))
        return dequantize(raw, GGMLQuantizationType.Q8_0)
    return matrix.astype(np.float16)

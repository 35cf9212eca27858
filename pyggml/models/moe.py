"""Mixtures of experts: routing, and the sum of the chosen experts.

T is the number of tokens. The gate is a softmax of the logits or a sigmoid (V3's bias and the group
limit affect only which experts are chosen; their weights are the gate's values without the bias).
Sources: DeepSeek-V2 (arXiv 2405.04434, 2.2) and DeepSeek-V3 (arXiv 2412.19437, 2.1.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyggml.models.layers import extras, scaled, swiglu_mlp
from pyggml.models.weights import Layer
from pyggml.node import Node
from pyggml.ops import (
    add,
    add_id,
    clamp,
    div,
    get_rows,
    glu,
    grouped_topk,
    moe_up_gate,
    mul,
    mul_mat,
    mul_mat_id,
    mul_multi_add,
    reshape,
    scale,
    sigmoid,
    silu,
    soft_max,
    sum_rows,
    top_k,
)

Gating = Literal["softmax", "sigmoid", "softmax_weight"]
#: Lower limit of the sum that normalizes expert weights: the smallest normal f16, as in llama.cpp.
LEAST_SUM = 6.103515625e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How experts are chosen and weighted.

    gating         softmax or sigmoid of the logits; softmax_weight: the softmax is taken over the
                   logits of the chosen experts only (gpt-oss)
    weights_norm   divide the chosen experts' weights by their sum
    weights_scale  then multiply them; 0 and 1 scale nothing
    n_group, n_group_used, n_group_top   choose the n_group_used groups of experts whose best
                   n_group_top scores have the largest sum, and experts only of these groups
    """

    n_expert: int
    n_expert_used: int
    gating: Gating = "softmax"
    weights_norm: bool = False
    weights_scale: float = 0.0
    n_group: int = 1
    n_group_used: int = 1
    n_group_top: int = 1


def route(layer: Layer, x: Node, r: Routing) -> tuple[Node, Node]:
    """Choose experts: their ids, i32 [n_expert_used, T], and weights, f32 [1, n_expert_used, T].

    x  f32 [n_embd, T]
    """
    n_tokens = x.ne[1]
    logits = scaled(layer, "ffn_gate_inp", mul_mat(layer["ffn_gate_inp"], x, prec="f32"))
    probs = logits = layer.label(logits, "ffn_moe_logits")
    if r.gating != "softmax_weight":
        probs = soft_max(logits) if r.gating == "softmax" else sigmoid(logits)
        probs = layer.label(probs, "ffn_moe_probs")
    bias = layer.get("exp_probs_b.bias")
    scores = probs if bias is None else add(probs, bias)
    if r.n_group > 1:
        ids = grouped_topk(
            scores, n_group=r.n_group, n_group_used=r.n_group_used, n_top=r.n_group_top,
            k=r.n_expert_used,
        )  # fmt: skip
    else:
        ids = top_k(scores, k=r.n_expert_used)
    ids = layer.label(ids, "ffn_moe_topk")
    weights = get_rows(reshape(probs, ne=(1, r.n_expert, n_tokens)), ids)
    flat = reshape(weights, ne=(r.n_expert_used, n_tokens))
    if r.gating == "softmax_weight":
        weights = reshape(soft_max(flat), ne=weights.ne[:3])
    if r.weights_norm:
        sums = clamp(sum_rows(flat), min=LEAST_SUM, max=float("inf"))
        weights = reshape(div(flat, sums), ne=weights.ne[:3])
    if r.weights_scale not in (0.0, 1.0):
        weights = scale(weights, s=r.weights_scale)
    return ids, layer.label(weights, "ffn_moe_weights")


def moe(layer: Layer, x: Node, routing: Routing, *, fused: bool) -> Node:
    """The weighted sum of each token's experts, plus the shared experts if there are any."""
    routed = experts(layer, x, routing, fused=fused)
    if "ffn_gate_shexp" not in layer:
        return layer.label(routed, "ffn_out")
    shared = layer.label(swiglu_mlp(layer, x, "_shexp", fused=fused), "ffn_shexp")
    return layer.label(add(routed, shared), "ffn_out")


def experts(layer: Layer, x: Node, routing: Routing, *, fused: bool) -> Node:
    """The weighted sum of each token's n_expert_used experts, f32 [n_embd, T]."""
    ids, weights = route(layer, x, routing)
    b = reshape(x, ne=(x.ne[0], 1, x.ne[1]))
    up, gate = "ffn_up_exps", "ffn_gate_exps"
    if "ffn_gate_up_exps" in layer:
        hidden = glu(expert_product(layer, "ffn_gate_up_exps", b, ids))  # rows of gate, then of up
    elif fused and not extras(layer, up, gate):
        hidden = moe_up_gate(layer[up], layer[gate], b, ids)
    else:
        gated = silu(expert_product(layer, gate, b, ids))
        hidden = mul(gated, expert_product(layer, up, b, ids))
    hidden = layer.label(hidden, "ffn_moe_hidden")
    down = layer.label(expert_product(layer, "ffn_down_exps", hidden, ids), "ffn_moe_down")
    return layer.label(mul_multi_add(down, weights), "ffn_moe_out")


def expert_product(layer: Layer, name: str, b: Node, ids: Node) -> Node:
    """Each token times its experts' matrices, with their factors and biases, if any."""
    y = mul_mat_id(layer[name], b, ids)
    n_used, n_tokens = ids.ne[:2]
    factors, biases = layer.get(f"{name}.scale"), layer.get(f"{name}.bias")
    if factors is not None:
        table = reshape(factors, ne=(1, factors.ne[0]))
        chosen = get_rows(table, reshape(ids, ne=(n_used * n_tokens,)))
        y = mul(y, reshape(chosen, ne=(1, n_used, n_tokens)))
    return y if biases is None else add_id(y, biases, ids)

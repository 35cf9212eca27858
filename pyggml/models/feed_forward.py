"""The feed-forward half of a DeepSeek-2 layer, dense or with experts, and a layer as a whole.

T tokens. Gating (`expert_gating_func`): softmax in V2, sigmoid in V3. The bias of V3 and the limit
on groups choose experts only; their weights are the gate's own values. Sources: DeepSeek-V2
(arXiv 2405.04434, 2.2) and DeepSeek-V3 (arXiv 2412.19437, 2.1.2).
"""

from __future__ import annotations

from pyggml.models.deepseek2 import AttentionOptions, Cache, Layer, attention, norm
from pyggml.node import Node
from pyggml.ops import (
    add,
    clamp,
    div,
    fused_up_gate,
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

#: Least sum of weights that others are divided by: the smallest normal f16, as in llama.cpp.
LEAST_SUM = 6.103515625e-5


def layer_output(
    x: Node,
    pos: Node,
    rows: Node,
    mask: Node,
    layer: Layer,
    cache: Cache,
    options: AttentionOptions,
    *,
    fused: bool = True,
) -> Node:
    """One layer.   h = x + attention(norm(x)),   y = h + feed_forward(norm(h)).

    x      f32 [n_embd, T]; pos, rows, mask as `attention` takes them
    fused  up, gate and activation as one op (-fmoe)
    """
    h = layer.name(
        add(x, attention(norm(layer, x, "attn_norm"), pos, rows, mask, layer, cache, options)),
        "ffn_inp",
    )
    made = feed_forward(norm(layer, h, "ffn_norm"), layer, fused=fused)
    return layer.name(add(h, made), "l_out")


def feed_forward(x: Node, layer: Layer, *, fused: bool = True) -> Node:
    """down(silu(gate x) * (up x)), or the layer's experts. x, y: f32 [n_embd, T]."""
    if "ffn_gate_inp" not in layer.weights:
        return layer.name(_dense(x, layer, "", fused), "ffn_out")
    routed = _experts(x, layer, fused)
    if "ffn_gate_shexp" not in layer.weights:
        return layer.name(routed, "ffn_out")
    shared = layer.name(_dense(x, layer, "_shexp", fused), "ffn_shexp")
    return layer.name(add(routed, shared), "ffn_out")


def _dense(x: Node, layer: Layer, suffix: str, fused: bool) -> Node:
    w = layer.weights
    up, gate = f"ffn_up{suffix}", f"ffn_gate{suffix}"
    if fused and not _any_scaled(layer, up, gate):
        hidden = fused_up_gate(w[up], w[gate], x)
    else:
        hidden = mul(silu(layer.product(gate, x)), layer.product(up, x))
    return layer.product(f"ffn_down{suffix}", hidden)


def _experts(x: Node, layer: Layer, fused: bool) -> Node:
    """Every token through its n_expert_used experts, summed by their weights."""
    c, w = layer.config, layer.weights
    ids, weights = route(x, layer)
    b = reshape(x, ne=(c.n_embd, 1, x.ne[1]))
    up, gate = "ffn_up_exps", "ffn_gate_exps"
    if "ffn_gate_up_exps" in w:
        hidden = glu(_expert_product(layer, "ffn_gate_up_exps", b, ids))  # rows of gate, then of up
    elif fused and not _any_scaled(layer, up, gate):
        hidden = moe_up_gate(w[up], w[gate], b, ids)
    else:
        gated = silu(_expert_product(layer, gate, b, ids))
        hidden = mul(gated, _expert_product(layer, up, b, ids))
    hidden = layer.name(hidden, "ffn_moe_hidden")
    made = layer.name(_expert_product(layer, "ffn_down_exps", hidden, ids), "ffn_moe_down")
    return layer.name(mul_multi_add(made, weights), "ffn_moe_out")


def _any_scaled(layer: Layer, *weights: str) -> bool:
    """Whether products of these have factors, which the ops that fuse them do not take."""
    return any(f"{weight}.scale" in layer.weights for weight in weights)


def _expert_product(layer: Layer, weight: str, b: Node, ids: Node) -> Node:
    """The product of each token with its experts' matrices, times the factors of those experts."""
    y = mul_mat_id(layer.weights[weight], b, ids)
    factors = layer.weights.get(f"{weight}.scale")
    if factors is None:
        return y
    n_used, n_tokens = ids.ne[:2]
    chosen = get_rows(
        reshape(factors, ne=(1, factors.ne[0])), reshape(ids, ne=(n_used * n_tokens,))
    )
    return mul(y, reshape(chosen, ne=(1, n_used, n_tokens)))


def route(x: Node, layer: Layer) -> tuple[Node, Node]:
    """The experts of each token, i32 [n_expert_used, T], and their weights, [1, n_expert_used, T].

    x  f32 [n_embd, T]
    """
    c, w = layer.config, layer.weights
    logits = layer.scaled("ffn_gate_inp", mul_mat(w["ffn_gate_inp"], x, prec="f32"))
    logits = layer.name(logits, "ffn_moe_logits")
    gated = soft_max(logits) if c.gating == "softmax" else sigmoid(logits)
    probs = layer.name(gated, "ffn_moe_probs")
    chosen = add(probs, w["exp_probs_b.bias"]) if "exp_probs_b.bias" in w else probs
    if c.n_group > 1:
        ids = grouped_topk(
            chosen, n_group=c.n_group, n_group_used=c.n_group_used, n_top=c.n_group_top,
            k=c.n_expert_used,
        )  # fmt: skip
    else:
        ids = top_k(chosen, k=c.n_expert_used)
    ids = layer.name(ids, "ffn_moe_topk")
    weights = get_rows(reshape(probs, ne=(1, c.n_expert, x.ne[1])), ids)
    if c.weights_norm:
        flat = reshape(weights, ne=(c.n_expert_used, x.ne[1]))
        least = clamp(sum_rows(flat), min=LEAST_SUM, max=float("inf"))
        weights = reshape(div(flat, least), ne=(1, c.n_expert_used, x.ne[1]))
    if c.weights_scale not in (0.0, 1.0):
        weights = scale(weights, s=c.weights_scale)
    return ids, layer.name(weights, "ffn_moe_weights")

"""The feed-forward half of a DeepSeek-2 layer, dense or with experts, and the whole layer.

T is the number of tokens. The gate (`expert_gating_func`) is a softmax in V2 and a sigmoid in V3.
V3's bias and the group limit affect only which experts are chosen; their weights are the gate's
values without the bias. Sources: DeepSeek-V2 (arXiv 2405.04434, 2.2) and DeepSeek-V3
(arXiv 2412.19437, 2.1.2).
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

#: Lower limit of the sum that normalizes expert weights: the smallest normal f16, as in llama.cpp.
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

    x, y             f32 [n_embd, T]
    pos, rows, mask  as in `attention`, which calls `rows` ids
    fused            run up, gate and activation as one op (-fmoe)
    """
    h = layer.name(
        add(x, attention(norm(layer, x, "attn_norm"), pos, rows, mask, layer, cache, options)),
        "ffn_inp",
    )
    ffn = feed_forward(norm(layer, h, "ffn_norm"), layer, fused=fused)
    return layer.name(add(h, ffn), "l_out")


def feed_forward(x: Node, layer: Layer, *, fused: bool = True) -> Node:
    """y = down(silu(gate x) * (up x)), or the sum of the layer's experts. x, y: f32 [n_embd, T]."""
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
    """The weighted sum of each token's n_expert_used experts."""
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
    down = layer.name(_expert_product(layer, "ffn_down_exps", hidden, ids), "ffn_moe_down")
    return layer.name(mul_multi_add(down, weights), "ffn_moe_out")


def _any_scaled(layer: Layer, *weights: str) -> bool:
    """Whether any of these weights has a factor; the fused ops do not support factors."""
    return any(f"{weight}.scale" in layer.weights for weight in weights)


def _expert_product(layer: Layer, weight: str, b: Node, ids: Node) -> Node:
    """Each token times its experts' matrices and, if the file has them, their factors."""
    y = mul_mat_id(layer.weights[weight], b, ids)
    factors = layer.weights.get(f"{weight}.scale")
    if factors is None:
        return y
    n_used, n_tokens = ids.ne[:2]
    factors = get_rows(
        reshape(factors, ne=(1, factors.ne[0])), reshape(ids, ne=(n_used * n_tokens,))
    )
    return mul(y, reshape(factors, ne=(1, n_used, n_tokens)))


def route(x: Node, layer: Layer) -> tuple[Node, Node]:
    """Choose experts: their ids, i32 [n_expert_used, T], and weights, f32 [1, n_expert_used, T].

    x  f32 [n_embd, T]
    """
    c, w = layer.config, layer.weights
    logits = layer.scaled("ffn_gate_inp", mul_mat(w["ffn_gate_inp"], x, prec="f32"))
    logits = layer.name(logits, "ffn_moe_logits")
    probs = soft_max(logits) if c.gating == "softmax" else sigmoid(logits)
    probs = layer.name(probs, "ffn_moe_probs")
    scores = add(probs, w["exp_probs_b.bias"]) if "exp_probs_b.bias" in w else probs
    if c.n_group > 1:
        ids = grouped_topk(
            scores, n_group=c.n_group, n_group_used=c.n_group_used, n_top=c.n_group_top,
            k=c.n_expert_used,
        )  # fmt: skip
    else:
        ids = top_k(scores, k=c.n_expert_used)
    ids = layer.name(ids, "ffn_moe_topk")
    weights = get_rows(reshape(probs, ne=(1, c.n_expert, x.ne[1])), ids)
    if c.weights_norm:
        flat = reshape(weights, ne=(c.n_expert_used, x.ne[1]))
        sums = clamp(sum_rows(flat), min=LEAST_SUM, max=float("inf"))
        weights = reshape(div(flat, sums), ne=(1, c.n_expert_used, x.ne[1]))
    if c.weights_scale not in (0.0, 1.0):
        weights = scale(weights, s=c.weights_scale)
    return ids, layer.name(weights, "ffn_moe_weights")

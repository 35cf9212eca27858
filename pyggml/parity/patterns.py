"""Small graphs that test fusion: nodes that a backend may fuse, and nodes that it must not.

Each graph has its own inputs, weights and states. `PATTERNS` holds them by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np

from pyggml.node import Node
from pyggml.ops import (
    add,
    clamp,
    concat,
    div,
    fused_up_gate,
    gelu,
    get_rows,
    grouped_topk,
    moe_up_gate,
    mul,
    mul_mat,
    mul_mat_id,
    mul_multi_add,
    norm,
    relu,
    reshape,
    rms_norm,
    rope_ext,
    scale,
    set_rows,
    sigmoid,
    silu,
    soft_max,
    softplus,
    sqr,
    sqrt,
    sum_rows,
    top_k,
    view,
)
from pyggml.ops.leaf import input as input_
from pyggml.ops.leaf import state
from pyggml.parity import attention_patterns, decode_patterns
from pyggml.parity.pattern_maker import Maker, Pattern, T

K = 256


def norm_and_products(m: Maker) -> Pattern:
    """A sum with other readers, its norm times a row, products with that; a sum without readers."""
    h = add(m.floats("a", K, T), m.floats("b", K, T))
    normed = mul(rms_norm(h, eps=1e-6), m.weight("row", K))
    alone = mul(rms_norm(add(h, normed), eps=1e-6), m.weight("other", K))
    up, gate = (m.weight(name, K, 96, type="iq4_nl") for name in ("up", "gate"))
    wide = fused_up_gate(up, gate, normed)
    plain = mul_mat(m.weight("router", K, 8), normed)
    return m.done(wide=wide, plain=plain, alone=alone, h=scale(h, s=2.0))


def norms_of_a_prompt(m: Maker) -> Pattern:
    """Norms of many rows, which are outputs too, and products that read them as f16: of rows in one
    part and in several, of rows that are no whole tiles, and of a norm of a norm."""
    outputs: dict[str, Node] = {}
    for n in (K, 96, 4160, 8256):
        x = m.floats(f"x{n}", n, 3, 4)
        normed = mul(rms_norm(add(x, x) if n == 96 else x, eps=1e-6), m.weight(f"row{n}", n))
        w = m.weight(f"w{n}", n, 24, type="q8_0")
        outputs |= {f"y{n}": mul_mat(w, normed), f"n{n}": normed}
    wide = m.weight("wide", K, 24, type="iq4_nl")
    again = mul(rms_norm(outputs["n256"], eps=1e-6), m.weight("other", K))
    return m.done(**outputs, wide=mul_mat(wide, again))


def layer_norms(m: Maker) -> Pattern:
    """Norms with a weight and a bias, with a weight only, with a bias per token, and one whose
    product is an output."""
    x = m.floats("x", K, T)

    def weighted(name: str, x: Node) -> Node:
        return mul(norm(x, eps=1e-5), m.weight(name, K))

    kept = weighted("kept", scale(x, s=3.0))
    return m.done(
        both=add(weighted("both", x), m.weight("bias", K)), one=weighted("one", relu(x)),
        each=add(weighted("each", sqr(x)), m.floats("b", K, T)),
        kept=kept, sum=add(kept, m.weight("other", K)),
    )  # fmt: skip


def shared_activations(m: Maker) -> Pattern:
    """Products with one b that is not a norm, and one with a view of b's rows."""
    x = silu(m.floats("x", K, T))
    one, two = (m.weight(name, K, 40, type="q8_0") for name in ("one", "two"))
    part = view(x, ne=(K, 2), start=(0, 1))
    return m.done(one=mul_mat(one, x), two=mul_mat(two, x), part=mul_mat(two, part))


def experts(m: Maker) -> Pattern:
    """Routing by softmax, products with the chosen experts, their weighted sum and a residual."""
    x, h = m.floats("x", K, T), m.floats("h", K, T)
    probs = soft_max(mul_mat(m.weight("router", K, 16), x, prec="f32"))
    ids = top_k(probs, k=3)
    weights = get_rows(reshape(probs, ne=(1, 16, T)), ids)
    b = reshape(x, ne=(K, 1, T))
    down = mul_mat_id(m.weight("down", K, K, 16, type="q8_0"), b, ids)
    y = add(h, add(mul_multi_add(down, weights), mul_mat(m.weight("shared", K, K), x)))
    return m.done(y=y, ids=ids)


def experts_of_a_prompt(m: Maker) -> Pattern:
    """Last products of many tokens' experts and their weighted sums, of tokens with two, one or no
    experts: with a residual, behind up and gate, and of a product that is an output, too."""
    tokens = 150
    m.inputs["ids"] = m.rng.integers(-1, 2, (tokens, 2)).astype(np.int32)
    chosen, x = input_("ids", "i32", ne=(2, tokens)), silu(m.floats("x", 64, 2, tokens))
    shares = m.floats("shares", 1, 2, tokens)
    up, gate = (m.weight(name, 64, 64, 2, type="iq4_nl") for name in ("up", "gate"))
    one = view(x, ne=(64, 1, tokens))
    hidden = moe_up_gate(up, gate, one, chosen)
    products = {
        name: mul_mat_id(m.weight(name, 64, 40, 2, type=type), b, chosen)
        for name, type, b in (
            ("more", "iq4_nl", x),
            ("gated", "q8_0", hidden),
            ("kept", "iq4_nl", x),
        )
    }
    sums = {name: mul_multi_add(product, shares) for name, product in products.items()}
    sums["more"] = add(m.floats("h", 40, tokens), sums["more"])
    return m.done(**sums, down=products["kept"])


def feed_forward_of_a_prompt(m: Maker) -> Pattern:
    """A norm, and experts and a product of all tokens that read it, both with up and gate."""
    tokens = 150
    m.inputs["ids"] = m.rng.integers(-1, 2, (tokens, 2)).astype(np.int32)
    chosen, shares = input_("ids", "i32", ne=(2, tokens)), m.floats("shares", 1, 2, tokens)
    b = mul(rms_norm(m.floats("x", K, tokens), eps=1e-6), m.weight("row", K))
    up, gate = (m.weight(name, K, 192, type="iq4_nl") for name in ("up", "gate"))
    routed_up, routed_gate = (m.weight(f"r_{x}", K, 64, 2, type="q8_0") for x in ("up", "gate"))
    hidden = moe_up_gate(routed_up, routed_gate, reshape(b, ne=(K, 1, tokens)), chosen)
    down = m.weight("r_down", 64, 40, 2, type="iq4_nl")
    return m.done(
        all=mul_mat(m.weight("down", 192, 40, type="iq4_nl"), fused_up_gate(up, gate, b)),
        routed=mul_multi_add(mul_mat_id(down, hidden, chosen), shares),
    )


def norms_behind_experts(m: Maker) -> Pattern:
    """Norms of sums over the experts of many tokens, which a product reads, of tokens with two, one
    or no experts: the sum is read again or not; the norm is an output, too; rows for more than 256
    threads; rows of 96, of which there is no f16."""
    tokens, outputs = 150, {}
    m.inputs["ids"] = m.rng.integers(-1, 2, (tokens, 2)).astype(np.int32)
    chosen, shares = input_("ids", "i32", ne=(2, tokens)), m.floats("shares", 1, 2, tokens)
    for name, n in (("kept", 192), ("alone", 64), ("long", 2112), ("narrow", 96)):
        down = m.weight(f"{name}_down", 64, n, 2, type="q8_0")
        sums = mul_multi_add(mul_mat_id(down, m.floats(f"{name}_x", 64, 2, tokens), chosen), shares)
        for more in ("shared", "h"):
            sums = add(sums, m.floats(f"{name}_{more}", n, tokens))
        y = mul(rms_norm(sums, eps=1e-6), m.weight(f"{name}_row", n))
        outputs[name] = mul_mat(m.weight(f"{name}_q", n, 24, type="iq4_nl"), y)
        if name in ("kept", "narrow"):
            outputs |= {f"{name}_y": y, f"{name}_sums": sums}
    return m.done(**outputs)


def grouped_experts(m: Maker) -> Pattern:
    """Routing as in V3: sigmoid, a bias for the choice, the best groups, normalized weights."""
    probs = sigmoid(m.floats("scores", 32, T))
    biased = add(probs, m.weight("bias", 32))
    ids = grouped_topk(biased, n_group=4, n_group_used=2, n_top=2, k=5)
    flat = reshape(get_rows(reshape(probs, ne=(1, 32, T)), ids), ne=(5, T))
    flat = div(flat, clamp(sum_rows(flat), min=6e-5, max=float("inf")))
    return m.done(ids=ids, w=scale(reshape(flat, ne=(1, 5, T)), s=2.5))


def root_routing(m: Maker) -> Pattern:
    """Routing as in V4: the root of softplus, a bias for the choice, normalized weights."""
    probs = sqrt(softplus(m.floats("scores", 32, T)))
    ids = top_k(add(probs, m.weight("bias", 32)), k=6)
    return m.done(ids=ids, w=_normalized(probs, ids))


def given_routing(m: Maker) -> Pattern:
    """The same, with experts that the token alone determines."""
    probs = sqrt(softplus(m.floats("scores", 32, T)))
    table = np.arange(6 * 40, dtype=np.int32).reshape(40, 6) * 7 % 32
    m.inputs["table"], m.inputs["tokens"] = table, np.arange(T, dtype=np.int32) * 3
    ids = get_rows(input_("table", "i32", ne=(6, 40)), input_("tokens", "i32", ne=(T,)))
    return m.done(w=_normalized(probs, ids))


def experts_of_devices(m: Maker) -> Pattern:
    """Ids of the experts that a device has among several; those of all are an output once."""
    outputs = {}
    for name in ("own", "kept"):
        probs = soft_max(m.floats(f"scores.{name}", 32, T))
        ids = top_k(probs, k=6)
        if name == "kept":
            outputs["ids"] = ids
        outputs[name] = decode_patterns.ranks_of(f"table.{name}", ids, 32, range(3, 21))
        outputs[f"w.{name}"] = _normalized(probs, ids)
    return m.done(**outputs)


def _normalized(probs: Node, ids: Node) -> Node:
    """The probabilities of ids [6, T], divided by their sum and scaled, [1, 6, T]."""
    flat = reshape(get_rows(reshape(probs, ne=(1, probs.ne[0], T)), ids), ne=(6, T))
    flat = div(flat, clamp(sum_rows(flat), min=6e-5, max=float("inf")))
    return scale(reshape(flat, ne=(1, 6, T)), s=1.5)


def divided_weights(m: Maker) -> Pattern:
    """Normalized weights without a scale; the choice is biased."""
    probs = soft_max(m.floats("scores", 32, T))
    ids = top_k(add(probs, m.weight("bias", 32)), k=5)
    flat = reshape(get_rows(reshape(probs, ne=(1, 32, T)), ids), ne=(5, T))
    return m.done(ids=ids, w=div(flat, clamp(sum_rows(flat), min=6e-5, max=0.1)))


def probabilities_kept(m: Maker) -> Pattern:
    """Routing whose probabilities are an output."""
    probs = soft_max(m.floats("scores", 16, T))
    ids = top_k(probs, k=3)
    return m.done(p=probs, w=get_rows(reshape(probs, ne=(1, 16, T)), ids))


def squares(m: Maker) -> Pattern:
    """Products and sums of a node with itself."""
    x, row = m.floats("x", K, T), m.floats("one", K)
    opened, normed = relu(x), rms_norm(row, eps=1e-6)
    total = mul_multi_add(m.floats("a", K, 3, T), m.floats("w", 1, 3, T))
    return m.done(act=mul(opened, opened), norm=mul(normed, normed), sum=add(total, total))


def odd_routing(m: Maker) -> Pattern:
    """Routing whose ids have no other reader, and weights divided by one sum over all tokens."""
    probs = soft_max(m.floats("scores", 32, T))
    ids = top_k(probs, k=4)
    weights = get_rows(reshape(probs, ne=(1, 32, T)), ids)
    other = soft_max(m.floats("others", 32, T))
    unread = get_rows(reshape(other, ne=(1, 32, T)), top_k(other, k=2))
    every = clamp(sum_rows(reshape(weights, ne=(4 * T,))), min=0.0, max=9.0)
    return m.done(ids=ids, unread=unread, share=div(reshape(weights, ne=(4, T)), every))


def flat_weights(m: Maker) -> Pattern:
    """Weights in another shape than routing uses."""
    probs = soft_max(m.floats("scores", 32, T))
    ids = top_k(probs, k=4)
    weights = get_rows(reshape(probs, ne=(1, 32, T)), ids)
    return m.done(ids=ids, flat=scale(reshape(weights, ne=(4 * T,)), s=2.0))


def _latent(m: Maker, type: str, mode: Literal["normal", "neox"]) -> Pattern:
    both, pos = m.floats("kv", 576, T), m.positions()
    c = mul(rms_norm(view(both, ne=(512, T)), eps=1e-6), m.weight("row", 512))
    k = view(both, ne=(64, T), start=(512,))
    k = rope_ext(reshape(k, ne=(64, 1, T)), pos, n_dims=64, mode=mode)
    row = concat(c, reshape(k, ne=(64, T)), dim=0)
    cache = set_rows(state("cache", type, ne=(576, 32)), row, pos)
    return m.done(cache=scale(view(get_rows(cache, m.positions("rows")), ne=(576, T)), s=1.0))


def _turned(m: Maker, type: str) -> Pattern:
    """Keys of several heads, rotated and cached, one row per token."""
    pos = m.positions()
    turned = rope_ext(m.floats("k", 64, 3, T), pos, n_dims=48, offset=16)
    cache = set_rows(state("cache", type, ne=(192, 32)), reshape(turned, ne=(192, T)), pos)
    return m.done(cache=get_rows(cache, m.positions("rows")))


def gated(m: Maker) -> Pattern:
    """Activations that gate a product on either side; one that has another reader."""
    x, g, h = m.floats("x", K, T), m.floats("g", K, T), m.floats("h", K, T)
    opened = gelu(h)
    return m.done(
        left=mul(silu(x), g), right=mul(g, relu(x)), row=mul(silu(g), m.weight("row", K)),
        kept=mul(opened, x), opened=opened,
    )  # fmt: skip


PATTERNS: dict[str, Callable[[Maker], Pattern]] = {
    **decode_patterns.PATTERNS,
    **attention_patterns.PATTERNS,
    **{
        graph.__name__: graph
        for graph in (
            norm_and_products, norms_of_a_prompt, layer_norms, shared_activations, experts,
            experts_of_a_prompt, feed_forward_of_a_prompt, norms_behind_experts, grouped_experts,
            root_routing, given_routing, experts_of_devices, divided_weights, probabilities_kept,
            squares, odd_routing, flat_weights, gated,
        )
    },
    **{f"turned_{kind}": partial(_turned, type=kind) for kind in ("f16", "bf16")},
    **{
        f"latent_row_{kind}_{mode}": partial(_latent, type=kind, mode=mode)
        for kind in ("f16", "bf16", "q8_0")
        for mode in ("normal", "neox")
    },
}  # fmt: skip


def pattern(name: str, seed: int = 0) -> Pattern:
    """The graph with this name, with values from a seed."""
    return PATTERNS[name](Maker(seed))

"""Graphs that test the fusions of a decode step: attention, hyper-connections, products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np

from pyggml.node import Node
from pyggml.ops import (
    add,
    cast,
    causal_mask,
    clamp,
    concat,
    cont,
    div,
    dsv4_hc_maps,
    dsv4_hc_post,
    dsv4_hc_pre,
    fill,
    flash_attn_ext,
    fused_up_gate,
    get_rows,
    grouped_topk,
    lightning_indexer,
    merge_lse,
    moe_up_gate,
    mul,
    mul_mat,
    mul_mat_id,
    mul_multi_add,
    permute,
    relu,
    reshape,
    rms_norm,
    rope_ext,
    scale,
    set_rows,
    sigmoid,
    soft_max,
    sub,
    sum_rows,
    top_k,
    view,
)
from pyggml.ops.leaf import constant, state
from pyggml.ops.leaf import input as input_
from pyggml.parity import row_patterns
from pyggml.parity.pattern_maker import Maker, Pattern, T


def small_numbers(m: Maker) -> Pattern:
    """What follows from positions, and other ops on a few numbers; some read a product."""
    pos = m.ids("pos", 17, 3, -5, 40, 0, 12)
    p = cast(pos, dtype="f32")
    t = cast(cast(div(p, fill(p, value=4.0)), dtype="i32"), dtype="f32")
    place = sub(p, scale(t, s=4.0))
    odd = cont(view(place, ne=(3,), start=(1,), step=(2,)))
    seen = clamp(scale(add(place, view(p, ne=(1,))), s=-1.0, b=15.0), min=0.0, max=1.0)
    y = reshape(mul_mat(m.weight("w", 32, 6), m.floats("x", 32, 1)), ne=(6,))
    late = add(mul(y, seen), div(y, scale(y, s=2.0, b=9.0)))
    return m.done(
        t=t, place=cast(place, dtype="i32"), odd=odd, seen=seen, same=scale(cont(p), s=2.0),
        late=late, next=sub(late, seen),
    )  # fmt: skip


def _connected(m: Maker, streams: Node, name: str) -> tuple[Node, Node, Node]:
    """The norm of a sublayer's input, and post and comb for its result."""
    n, hc, n_tokens, _ = streams.ne
    flat = rms_norm(reshape(streams, ne=(n * hc, n_tokens)), eps=1e-5)
    mixes = mul_mat(m.weight(f"{name}.fn", n * hc, (2 + hc) * hc), flat, prec="f32")
    base, factor = m.floats(f"{name}.base", (2 + hc) * hc), m.floats(f"{name}.scale", 3)
    maps = dsv4_hc_maps(mixes, factor, base, eps=1e-3, n_iter=4)
    rows = (view(maps, ne=(hc, 1, n_tokens), start=(0, i)) for i in range(2))
    pre, post = (permute(row, axes=(0, 2, 1, 3)) for row in rows)
    x = mul(rms_norm(dsv4_hc_pre(streams, pre), eps=1e-6), m.weight(f"{name}.norm", n))
    return x, post, view(maps, ne=(hc, hc, n_tokens), start=(0, 2))


def hyper_connections(m: Maker, n: int = 160, hc: int = 4, n_tokens: int = 1) -> Pattern:
    """Three sublayers: one that a product follows, one after a sum over experts, and the last.
    Maps of other mixes."""
    streams = m.floats("streams", n, hc, n_tokens)
    x, post, comb = _connected(m, streams, "one")
    y = mul_mat(m.weight("w", n, 12, type="iq4_nl"), x)
    streams = dsv4_hc_post(scale(x, s=2.0), streams, post, comb)
    x, post, comb = _connected(m, streams, "two")
    a, w = m.floats("a", n, 3, n_tokens), m.floats("shares", 1, 3, n_tokens)
    streams = dsv4_hc_post(add(mul_multi_add(a, w), x), streams, post, comb)
    x, post, comb = _connected(m, streams, "three")
    base, factor = m.floats("base", (2 + hc) * hc), m.floats("scale", 3)
    alone = dsv4_hc_maps(m.floats("m", (2 + hc) * hc, n_tokens), factor, base, eps=0.1, n_iter=3)
    return m.done(x=x, y=y, streams=dsv4_hc_post(x, streams, post, comb), alone=alone)


def joined_products(m: Maker, n_tokens: int = 1) -> Pattern:
    """Products of a token or of some: several of a type, of another type and column, and an exact
    one; some with rows enough that a block takes two tiles of them."""
    x = mul(rms_norm(m.floats("x", 256, n_tokens), eps=1e-6), m.weight("row", 256))
    y = m.floats("y", 32, n_tokens)

    def product(
        name: str,
        b: Node,
        n: int,
        type: str = "iq4_nl",
        prec: Literal["default", "f32"] = "default",
    ) -> Node:
        return mul_mat(m.weight(name, b.ne[0], n, type=type), b, prec=prec)

    a, b, c = (product(name, x, n) for name, n in (("a", 20), ("b", 96), ("c", 8)))
    outputs = {f"long{n}": product(f"long{n}", y, n) for n in (4100, 4101)}
    outputs |= {"d": product("d", x, 16, "q8_0"), "e": product("e", x, 16, prec="f32")}
    return m.done(a=scale(a, s=2.0), b=b, c=relu(c), **outputs)


def turned_products(m: Maker, n_tokens: int = T, type: str = "iq4_nl") -> Pattern:
    """Values of heads side by side, as a product reads them, of which others read some or all; and
    dimensions in other orders."""
    d, heads = 24, 4
    x, out = m.floats("x", 64, heads, n_tokens), m.weight("out", d * heads, 40, type=type)

    def values(name: str, i: float) -> Node:
        b = permute(scale(x, s=i), axes=(0, 2, 1))
        return mul_mat(m.weight(name, 64, d, heads, type=type), b)

    y, kept = (permute(values(name, i), axes=(0, 2, 1)) for name, i in (("v", 1), ("kept", 2)))
    side = cont(kept)
    back = cont(permute(values("back", 3), axes=(0, 3, 2, 1)))
    across = cont(permute(values("across", 4), axes=(1, 0, 2)))
    return m.done(
        y=mul_mat(out, reshape(cont(y), ne=(d * heads, n_tokens))),
        kept=relu(kept), side=side, back=back, across=across,
    )  # fmt: skip


def products_behind_norms(m: Maker) -> Pattern:
    """Products of one token that alone read a norm: of the input, and of a sum that is also added
    to another product, with rows that leave lanes without a group."""
    x, h = m.floats("x", 256, 1), add(m.floats("o", 1056, 1), m.floats("h", 1056, 1))
    norms = (
        mul(rms_norm(x, eps=1e-6), m.weight("row", 256)),
        mul(rms_norm(h, eps=1e-6), m.weight("long_row", 1056)),
    )
    rows = {"a": (20, 96, 8), "b": (1056, 9)}
    outputs = {
        f"{name}{n}": mul_mat(m.weight(f"{name}{n}", y.ne[0], n, type=type), y)
        for (name, each), y, type in zip(rows.items(), norms, ("iq4_nl", "q8_0"))
        for n in each
    }
    return m.done(**{**outputs, "b1056": add(h, outputs["b1056"])})


def _cached(m: Maker, name: str, n: int, hidden: range, type: str, d: int = 512) -> Node:
    """Rows of d in a state; hidden ones are NaN and infinite, as if never written."""
    rows = m.rng.standard_normal((n, d)).astype(np.float32)
    rows[hidden], rows[hidden[::2]] = np.nan, np.inf
    m.inputs[f"{name}.rows"] = rows
    every = m.ids(f"{name}.every", *range(n))
    return set_rows(
        state(name, type, ne=(d, n)), input_(f"{name}.rows", ne=(d, n)), every
    )  # fmt: skip


def _window(m: Maker, q: Node, pos: Node, type: str, n: int, lse: bool) -> Node:
    """Attention to a ring of n rows, the last 10 of which have not been written, under a window."""
    k = _cached(m, "window", n, range(n - 10, n), type)
    ends = np.zeros(n, np.int32)
    ends[: n - 10] = 1 + np.arange(n - 10) * 7 % (n - 10)
    m.inputs["ends"] = ends
    mask = causal_mask(pos, input_("ends", "i32", ne=(n,)), n_kv=n, window=n * 2 // 3)
    return flash_attn_ext(q, k, k, mask, m.floats("sinks", q.ne[2]), scale=0.04, lse=lse)


def attention_to_a_window(m: Maker, heads: int = 20, n_tokens: int = 1) -> Pattern:
    """Attention to a window that is rotated back, and whose groups of heads a product reads."""
    q, pos = m.floats("q", 512, n_tokens, heads), m.ids("pos", *range(85, 85 + n_tokens))
    y = rope_ext(_window(m, q, pos, "f16", 100, False), pos, n_dims=64, offset=448, back=True)
    groups = permute(reshape(y, ne=(2048, heads // 4, n_tokens)), axes=(0, 2, 1, 3))
    return m.done(y=scale(y, s=1.0), groups=mul_mat(m.weight("w", 2048, 12, type="iq4_nl"), groups))


def attention_to_both(
    m: Maker, type: str = "f16", listed: bool = False, heads: int = 16, n_tokens: int = 1
) -> Pattern:
    """Attention to a window merged with one to compressed rows, or to a list of them."""
    q, pos = m.floats("q", 512, n_tokens, heads), m.ids("pos", *range(45, 45 + n_tokens))
    old = _cached(m, "old", 40, range((45 + n_tokens) // 2, 40), type)
    mask, ids = causal_mask(pos, n_kv=40, stride=2), None
    if listed:  # every third row, some hidden, and places without one
        ids = input_("ids", "i32", ne=(24, n_tokens))
        lists = [np.where(np.arange(24) % 7 == 3, -1, np.arange(24) * 3 % 40)] * n_tokens
        m.inputs["ids"] = np.stack(lists).astype(np.int32)
    y = _window(m, q, pos, type, 60, True)
    y = merge_lse(y, flash_attn_ext(q, old, old, mask, ids=ids, scale=0.04, lse=True))
    y = view(y, ne=(512, heads, n_tokens))
    return m.done(y=scale(rope_ext(y, pos, n_dims=64, offset=448, back=True), s=1.0))


def values_of_heads(
    m: Maker,
    type: str = "f16",
    weights: str = "iq4_nl",
    heads: int = 3,
    n: int = 96,
    n_tokens: int = 1,
    n_kv: int = 200,
    listed: bool = False,
    kept: bool = False,
) -> Pattern:
    """Latent attention of a few tokens, whose last rows are not seen, and the products of each head
    and of all heads side by side. listed: to lists of rows, with sinks; kept: something else reads
    the attention, so that nothing is fused."""
    q, pos = m.floats("q", 576, n_tokens, heads), m.ids("pos", *range(n_kv - 20, n_kv))
    pos = view(pos, ne=(n_tokens,))
    k = _cached(m, "rows", n_kv, range(n_kv - 20 + n_tokens, n_kv), type, 576)
    ids, sinks = None, None
    if listed:  # places without a row, and rows that are not seen
        places = [np.where(np.arange(150) % 7 == 3, -1, np.arange(150) * 11 % n_kv)] * n_tokens
        m.inputs["ids"] = np.stack(places).astype(np.int32)
        ids, sinks = input_("ids", "i32", ne=(150, n_tokens)), m.floats("sinks", heads)
    v, mask = view(k, ne=(512, n_kv)), causal_mask(pos, n_kv=n_kv)
    y = flash_attn_ext(q, k, v, mask, sinks, ids=ids, scale=0.04)
    more = {"sums": scale(y, s=1.0)} if kept else {}
    y = mul_mat(m.weight("v_b", 512, n, heads, type=weights), permute(y, axes=(0, 2, 1, 3)))
    y = permute(y, axes=(0, 2, 1, 3))
    y = reshape(y if y.contiguous else cont(y), ne=(n * heads, n_tokens))
    return m.done(o=mul_mat(m.weight("o", n * heads, 40, type="q8_0"), y), **more)


def experts_of_token(
    m: Maker,
    type: str = "iq4_nl",
    n_ff: int = 512,
    n_shared: int = 0,
    grouped: bool = False,
    kept: bool = False,
    own: Sequence[int] | None = None,
    n_tokens: int = 1,
) -> Pattern:
    """The experts of a few tokens, some with shared experts: routing by softmax behind the norm of
    a sum that is added again, or by groups with a bias and weights that are normalized, and clamped
    gates. kept: the sum is an output, too, and the normed rows a part of a concat, which begins
    anywhere. own: the experts that this device has among several; if none, one that nobody chooses.

    Lanes of `down` have one to three groups; its last tile of rows may not be full.
    """
    k, n, used, limit = 1056, 12, 6, 3.0 if grouped else None
    rows = 84 if grouped else k
    h = x = m.floats("x", k, n_tokens)
    if not grouped:
        h = add(x, m.floats("o", k, n_tokens))
        x = mul(rms_norm(h, eps=1e-6), m.floats("norm", k))
    scores = mul_mat(m.weight("router", k, n), x, prec="f32")
    probs = sigmoid(scores) if grouped else soft_max(scores)
    table = reshape(probs, ne=(1, n, n_tokens))
    if grouped:
        ids = grouped_topk(
            add(probs, m.weight("bias", n)), n_group=4, n_group_used=3, n_top=2, k=used
        )
        shares = reshape(get_rows(table, ids), ne=(used, n_tokens))
        total = clamp(sum_rows(shares), min=6e-5, max=float("inf"))
        shares = scale(reshape(div(shares, total), ne=(1, used, n_tokens)), s=2.5)
    else:
        ids = top_k(probs, k=used)
        shares = get_rows(table, ids)
    if own is not None:
        n, ids = max(1, len(own)), ranks_of("own", ids, n, own)
    up, gate = (m.weight(name, k, n_ff, n, type=type) for name in ("up", "gate"))
    hidden = moe_up_gate(up, gate, reshape(x, ne=(k, 1, n_tokens)), ids, limit=limit)
    y = mul_multi_add(mul_mat_id(m.weight("down", n_ff, rows, n, type=type), hidden, ids), shares)
    if n_shared:
        up, gate = (m.weight(f"{name}_s", k, n_shared, type="q8_0") for name in ("up", "gate"))
        hidden = fused_up_gate(up, gate, x, limit=limit)
        y = add(y, mul_mat(m.weight("down_s", n_shared, rows, type="q8_0"), hidden))
    more = {}
    if kept:
        more = {"h": scale(h, s=2.0), "x": concat(m.floats("one", 1, n_tokens), x, dim=0)}
    return m.done(y=y if grouped else add(h, y), **more)


def ranks_of(name: str, ids: Node, n: int, own: Sequence[int]) -> Node:
    """For ids of n experts, their numbers among those that a device has; -1 for others."""
    table = np.full((n, 1), -1, np.int32)
    table[list(own), 0] = np.arange(len(own))
    flat = reshape(ids, ne=(ids.spec.elements,))
    return reshape(get_rows(constant(table, name=name), flat), ne=ids.ne[:2])


def absorbed_queries(
    m: Maker, type: str = "f16", weights: str = "iq4_nl", kept: bool = False, n_tokens: int = 1
) -> Pattern:
    """Queries for latent attention to a few tokens, and the rows of the cache behind them, one of
    which is not stored if there are several; kept: the rotated queries, too, so that nothing is
    fused."""
    heads, n_nope, n_rot, n_c = 3, 160, 32, 96
    pos = m.ids("pos", *range(7, 7 + n_tokens))
    q = reshape(mul_mat(m.weight("q", 64, heads * (n_nope + n_rot)), m.floats("x", 64, n_tokens)),
                ne=(n_nope + n_rot, heads, n_tokens))  # fmt: skip
    turned = rope_ext(q, pos, n_dims=n_rot, offset=n_nope)
    q = permute(turned, axes=(0, 2, 1, 3))
    nope = view(q, ne=(n_nope, n_tokens, heads))
    rope = view(q, ne=(n_rot, n_tokens, heads), start=(n_nope,))
    queries = concat(mul_mat(m.weight("w", n_nope, n_c, heads, type=weights), nope), rope, dim=0)
    kv = m.floats("kv", n_c + n_rot, n_tokens)
    c = mul(rms_norm(view(kv, ne=(n_c, n_tokens)), eps=1e-6), m.weight("norm", n_c))
    k = view(reshape(kv, ne=(n_c + n_rot, 1, n_tokens)), ne=(n_rot, 1, n_tokens), start=(n_c,))
    k = reshape(rope_ext(k, pos, n_dims=n_rot), ne=(n_rot, n_tokens))
    cache = state("cache", type, ne=(n_c + n_rot, 8))
    cache = set_rows(cache, concat(c, k, dim=0), m.ids("ids", *(5, -1, 1, 3)[:n_tokens]))
    rows = get_rows(cache, m.ids("rows", 0, 5))
    more = {"turned": scale(turned, s=1.0)} if kept else {}
    row = view(rows, ne=(n_c + n_rot, 1), start=(0, 1))  # so what reads the queries comes behind it
    return m.done(queries=add(queries, row), rows=scale(rows, s=1.0), **more)


def scored_rows(m: Maker, n: int = 12_300, k: int = 70) -> Pattern:
    """Attention to the rows that an indexer chooses for one token. The mask raises k rows so far
    that rounded scores give the same choice, and hides some."""
    mask = np.zeros((1, n), np.float16)
    mask[0, 17 * np.arange(k) * 10 % (n - 40)] = 3000
    mask[0, n - 40 :] = -np.inf
    m.inputs["mask"] = mask
    q, w = m.floats("index_q", 128, 32, 1), m.floats("index_weights", 32, 1)
    keys = m.floats("index_k", 128, n, type="f16")
    w = scale(w, s=0.3)
    ids = top_k(lightning_indexer(q, keys, w, input_("mask", "f16", ne=(n, 1))), k=k)
    rows = m.floats("rows", 512, n, type="f16")
    y = flash_attn_ext(m.floats("q", 512, 1, 16), rows, rows, ids=ids, scale=0.04)
    return m.done(y=scale(y, s=1.0))


PATTERNS: dict[str, Callable[[Maker], Pattern]] = {
    **row_patterns.PATTERNS,
    "small_numbers": small_numbers,
    "joined_products": joined_products,
    "joined_products_of_tokens": partial(joined_products, n_tokens=3),
    "joined_products_of_many": partial(joined_products, n_tokens=7),
    "turned_products": turned_products,
    "turned_products_q8_0": partial(turned_products, n_tokens=2, type="q8_0"),
    "products_behind_norms": products_behind_norms,
    "attention_to_a_window": attention_to_a_window,
    "attention_to_both": attention_to_both,
    "attention_to_both_bf16": partial(attention_to_both, type="bf16"),
    "scored_rows": scored_rows,
    "attention_to_lists": partial(attention_to_both, listed=True, n_tokens=2),
    "attention_to_lists_q8_0": partial(attention_to_both, listed=True, type="q8_0", heads=20),
    "values_of_heads": values_of_heads,
    "values_of_heads_q8_0": partial(
        values_of_heads, type="q8_0", weights="q8_0", heads=16, n=128, n_kv=9000
    ),
    "values_of_heads_bf16": partial(
        values_of_heads, type="bf16", weights="q5_1", n=256, n_tokens=2
    ),
    "values_of_heads_in_lists": partial(
        values_of_heads, weights="q4_0", heads=16, n=128, n_tokens=5, listed=True
    ),
    "values_of_long_heads_in_lists": partial(
        values_of_heads, type="q8_0", heads=16, n=160, n_tokens=5, listed=True
    ),
    "values_of_many_heads_in_lists": partial(
        values_of_heads, weights="q8_0", heads=128, n=32, listed=True
    ),
    "values_of_heads_kept": partial(values_of_heads, kept=True, n_tokens=3),
    "hyper_connections": hyper_connections,
    "hyper_connections_of_tokens": partial(hyper_connections, n=64, hc=2, n_tokens=T),
    "hyper_connections_of_three": partial(hyper_connections, n=4160, hc=3),
    "experts_of_token": partial(experts_of_token, n_shared=1056),
    "experts_of_token_alone": partial(experts_of_token, type="q8_0", n_ff=64, kept=True),
    "experts_of_token_grouped": partial(experts_of_token, type="q5_0", n_shared=96, grouped=True),
    "experts_of_device": partial(experts_of_token, n_shared=96, own=range(1, 6)),
    "experts_of_device_alone": partial(experts_of_token, type="q8_0", own=(11, 3, 8, 0, 6, 5, 2)),
    "experts_of_device_grouped": partial(
        experts_of_token, type="q5_0", n_shared=96, grouped=True, own=range(5, 12)
    ),
    "experts_of_others": partial(experts_of_token, n_shared=96, own=()),
    "experts_of_others_alone": partial(experts_of_token, type="q8_0", grouped=True, own=()),
    "experts_of_two_tokens": partial(experts_of_token, type="q8_0", n_shared=96, n_tokens=2),
    "experts_of_tokens": partial(
        experts_of_token, type="q5_0", n_ff=64, n_shared=96, grouped=True, n_tokens=3
    ),
    "experts_of_tokens_and_device": partial(
        experts_of_token, n_ff=64, n_shared=96, own=range(1, 6), n_tokens=3
    ),
    "experts_of_tokens_alone": partial(experts_of_token, n_ff=64, kept=True, n_tokens=8),
    "absorbed_queries": absorbed_queries,
    "absorbed_queries_q8_0": partial(absorbed_queries, type="q8_0", weights="q8_0"),
    "absorbed_queries_of_tokens": partial(absorbed_queries, n_tokens=4),
    "absorbed_queries_of_two_q8_0": partial(
        absorbed_queries, type="q8_0", weights="q5_0", n_tokens=2
    ),
    "absorbed_queries_kept": partial(absorbed_queries, kept=True),
}

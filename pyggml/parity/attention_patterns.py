"""Graphs that test what may be fused with attention: masks, lists of rows, scores, and prompts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pyggml.node import Node
from pyggml.ops import (
    add,
    cast,
    causal_mask,
    concat,
    cpy,
    flash_attn_ext,
    get_rows,
    mul_mat,
    permute,
    repeat,
    reshape,
    scale,
    soft_max_ext,
    top_k,
    transpose,
    view,
)
from pyggml.ops.leaf import input as input_
from pyggml.ops.leaf import state
from pyggml.parity.pattern_maker import Maker, Pattern, T


def _attention(m: Maker, name: str, mask: Node, q: Node | None = None) -> Node:
    q = m.floats(f"{name}.q", 64, T, 4) if q is None else q
    k, v = (m.floats(f"{name}.{x}", 64, 32, 2, type="f16") for x in "kv")
    return flash_attn_ext(q, k, v, mask, scale=0.125)


def shared_mask(m: Maker) -> Pattern:
    """Two attentions under one causal mask."""
    mask = causal_mask(m.positions(), n_kv=32)
    return m.done(one=_attention(m, "one", mask), two=_attention(m, "two", mask))


def mask_kept(m: Maker) -> Pattern:
    """A causal mask that is also an output."""
    mask = causal_mask(m.positions(), n_kv=32)
    return m.done(y=_attention(m, "one", mask), mask=mask)


def strided_mask(m: Maker) -> Pattern:
    """An attention under the causal mask of rows that stand for four positions each."""
    mask = causal_mask(m.positions(start=60), n_kv=32, stride=4)
    return m.done(y=_attention(m, "one", mask))


def moved_position(m: Maker) -> Pattern:
    """Positions in a state that is written between the mask and the attention."""
    pos = state("pos", "i32", ne=(T,))
    mask = causal_mask(pos, n_kv=32)
    moved = cpy(m.positions("next", 20), pos)
    zero = scale(get_rows(m.floats("table", 1, 64), moved), s=0.0)
    q = add(m.floats("q", 64, T, 4), zero)
    return m.done(y=_attention(m, "one", mask, q))


def hidden_rows(m: Maker) -> Pattern:
    """A cache whose rows after the last position are NaN or infinite, as if never written."""
    pos = m.positions()
    outputs = {}
    for name, d_k, d_v, heads in (("few", 64, 64, 4), ("latent", 576, 512, 4), ("odd", 40, 24, 2)):
        k = m.floats(f"{name}.k", d_k, 32, 1, type="f16")
        rows = np.array(m.inputs[f"{name}.k"])
        rows[:, T + 3 :], rows[:, T + 5 :: 2] = np.nan, np.inf
        m.inputs[f"{name}.k"] = rows
        v = view(k, ne=(d_v, 32, 1))
        q = m.floats(f"{name}.q", d_k, T, heads)
        for window in (None, 4):
            mask = causal_mask(pos, n_kv=32, window=window)
            outputs[f"{name}{window or ''}"] = flash_attn_ext(q, k, v, mask, scale=0.1)
    return m.done(**outputs)


def attention_of_a_prompt(m: Maker) -> Pattern:
    """Results that a product reads as f16, all heads of a token in a row: alone, and beside another
    reader. Values up to 65504; cache rows behind the last position are NaN or infinite."""
    tokens, n_kv = 70, 150
    m.inputs["pos"] = np.arange(40, 40 + tokens, dtype=np.int32)
    pos, outputs = input_("pos", "i32", ne=(tokens,)), dict[str, Node]()
    for name, d_k, d_v, type in (
        ("plain", 64, 64, "f16"), ("wide", 192, 128, "f16"), ("kept", 128, 128, "f16"),
        ("q8_0", 128, 128, "q8_0"),
    ):  # fmt: skip
        q = m.floats(f"{name}.q", d_k, tokens, 4)
        k, v = (m.floats(f"{name}.{x}", d, n_kv, 4, type=type) for x, d in (("k", d_k), ("v", d_v)))
        if name == "wide":
            values = np.array(m.inputs["wide.v"])
            values[1, :, 3], values[:, 111:], values[:, 112::2] = 65504, np.nan, np.inf
            m.inputs["wide.v"] = values
        y = flash_attn_ext(q, k, v, causal_mask(pos, n_kv=n_kv), scale=0.1)
        weight = m.weight(f"{name}.w", 4 * d_v, 24, type="iq4_nl")
        outputs[name] = mul_mat(weight, reshape(y, ne=(4 * d_v, tokens)))
        if name == "kept":
            outputs["result"] = y
    return m.done(**outputs)


def attention_of_a_prompt_bf16(m: Maker) -> Pattern:
    """Results over keys and values of bf16, which may be more than f16 holds: a product reads them
    as f32. Cache rows of a head behind the last position are NaN; others keep the rounding of
    bf16."""
    tokens, n_kv, d = 70, 150, 128
    m.inputs["pos"] = np.arange(40, 40 + tokens, dtype=np.int32)
    pos, q = input_("pos", "i32", ne=(tokens,)), m.floats("q", d, tokens, 4)
    k, v = (m.floats(name, d, n_kv, 4, type="bf16") for name in "kv")
    values = np.array(m.inputs["v"])
    values[1, 111:] = np.nan
    m.inputs["v"] = values
    y = flash_attn_ext(q, k, v, causal_mask(pos, n_kv=n_kv), scale=0.1)
    weight = m.weight("w", 4 * d, 24, type="iq4_nl")
    return m.done(y=mul_mat(weight, reshape(y, ne=(4 * d, tokens))))


def chosen_rows(m: Maker) -> Pattern:
    """Attention to chosen rows under a causal mask, which another attention reads too."""
    mask = causal_mask(m.positions(), n_kv=32)
    ids = top_k(m.floats("scores", 32, T), k=9)
    q, k = m.floats("q", 576, T, 4), m.floats("k", 576, 32, 1, type="f16")
    v = view(k, ne=(512, 32, 1))
    chosen = flash_attn_ext(q, k, v, mask, None, None, ids, scale=0.1)
    return m.done(chosen=chosen, all=flash_attn_ext(q, k, v, mask, scale=0.1))


def indexed_rows(m: Maker) -> Pattern:
    """Attention to rows that were chosen under the same causal mask; rows stand for four positions
    each."""
    mask = causal_mask(m.positions(start=60), n_kv=32, stride=4)
    ids = top_k(add(m.floats("scores", 32, T), cast(mask, dtype="f32")), k=9)
    q, k = m.floats("q", 512, T, 20), m.floats("k", 512, 32, 1, type="f16")
    return m.done(y=flash_attn_ext(q, k, k, mask, None, None, ids, scale=0.1, lse=True))


def moved_list(m: Maker) -> Pattern:
    """The same, with positions in a state that is written between the mask and the attention."""
    pos = state("pos", "i32", ne=(T,))
    mask = causal_mask(pos, n_kv=32)
    moved = cpy(m.positions("next", 20), pos)
    ids = top_k(add(m.floats("scores", 32, T), cast(mask, dtype="f32")), k=9)
    zero = scale(get_rows(m.floats("table", 1, 64), moved), s=0.0)
    q, k = add(m.floats("q", 512, T, 4), zero), m.floats("k", 512, 32, 1, type="f16")
    return m.done(y=flash_attn_ext(q, k, k, mask, None, None, ids, scale=0.1))


def keys_of_heads(m: Maker) -> Pattern:
    """Keys of products for each head and a part that all share, of f16 and of f32. One product has
    another reader, one has a single row."""
    outputs = {}
    sizes = ("f16", T, "f16"), ("f32", 9, "f32"), ("kept", T, "f16"), ("one", 1, "f16")
    for name, n, type in sizes:
        rows = m.floats(f"rows.{name}", 48, n, type="f16")
        c, rope = view(rows, ne=(32, n)), view(rows, ne=(16, n), start=(32,))
        product = mul_mat(m.weight(f"w.{name}", 32, 96, type="f16"), c, dtype=type)
        heads = permute(reshape(product, ne=(24, 4, n)), axes=(0, 2, 1, 3))
        shared = repeat(rope if type == "f16" else cast(rope, dtype=type), ne=(16, n, 4))
        outputs[name] = concat(heads, shared, dim=0)
        if name == "kept":
            outputs["product"] = product
    return m.done(**outputs)


def _scores(
    m: Maker, name: str, mask: Node | None, type: str = "f16", sinks: Node | None = None
) -> Node:
    """Attention without flash attention; two heads share a head of k and v."""
    k, v = (m.floats(f"{name}.{x}", 64, 32, 2, type=type) for x in "kv")
    q = permute(m.floats(f"{name}.q", 64, 4, T), axes=(0, 2, 1, 3))
    return mul_mat(transpose(v), soft_max_ext(mul_mat(k, q), mask, sinks, scale=0.125))


def scores_of_heads(m: Maker) -> Pattern:
    """Attentions without flash attention under one causal mask, one under a window with a sink."""
    pos = m.positions()
    mask, window = (causal_mask(pos, n_kv=32, window=n) for n in (None, 3))
    sinks = m.floats("sinks", 4)
    return m.done(
        one=_scores(m, "one", mask), two=_scores(m, "two", mask),
        last=_scores(m, "last", window, sinks=sinks), all=_scores(m, "all", None),
    )  # fmt: skip


def scores_bf16(m: Maker) -> Pattern:
    """Keys and values in bf16, under a mask that differs by head."""
    return m.done(y=_scores(m, "one", m.floats("mask", 32, T, 4), "bf16"))


def scores_of_f32(m: Maker) -> Pattern:
    """Keys and values in f32, which are not narrowed, so that another attention keeps the mask."""
    mask = causal_mask(m.positions(), n_kv=32)
    return m.done(one=_scores(m, "one", mask), two=_scores(m, "two", mask, "f32"))


def scores_of_moved_position(m: Maker) -> Pattern:
    """Positions in a state that is written between the mask and the attention."""
    pos = state("pos", "i32", ne=(T,))
    mask = causal_mask(pos, n_kv=32)
    moved = cpy(m.positions("next", 20), pos)
    zero = scale(get_rows(m.floats("table", 1, 64), moved), s=0.0)
    k, q = m.floats("k", 64, 32, 4, type="f16"), add(m.floats("q", 64, T, 4), zero)
    return m.done(y=mul_mat(transpose(k), soft_max_ext(mul_mat(k, q), mask)))


def scores_kept(m: Maker) -> Pattern:
    """Probabilities that are also an output, and scores."""
    k, v = (m.floats(x, 64, 32, 4, type="f16") for x in "kv")
    p = soft_max_ext(mul_mat(k, m.floats("q", 64, T, 4)), scale=0.125)
    s = mul_mat(k, m.floats("r", 64, T, 4))
    return m.done(p=p, y=mul_mat(transpose(v), p), s=s, z=mul_mat(transpose(v), soft_max_ext(s)))


PATTERNS: dict[str, Callable[[Maker], Pattern]] = {
    graph.__name__: graph
    for graph in (
        shared_mask, mask_kept, strided_mask, moved_position, hidden_rows, attention_of_a_prompt,
        attention_of_a_prompt_bf16, chosen_rows, indexed_rows, moved_list, keys_of_heads,
        scores_of_heads, scores_bf16, scores_of_f32, scores_of_moved_position, scores_kept,
    )
}  # fmt: skip

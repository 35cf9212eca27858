"""Parts of models for random graphs: attention over states, experts, norms, gates.

A budget cuts these and a GPU fuses them, so they vary in every way that users might write them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyggml.parity.fuzz_grower import Grower


def _heads_last(g: Grower, x: str) -> str:
    return g.op("permute", x, axes=(0, 2, 1, 3))


class Sizes:
    """Sizes of one attention: d of a head, n_kv, n_q, heads, heads_kv."""

    def __init__(self, g: Grower) -> None:
        d = g.draw
        self.d = d.pick((4, 8, 16, 32))
        self.n_kv = d.pick((7, 31, 61, 97, 128, d.size(520)))
        self.n_q = d.pick((1, 3, 5, 9, 33))
        self.heads_kv = d.pick((1, 1, 2, 3))
        self.rows = ""  # the state that keys are rows of
        self.heads = self.heads_kv * d.pick((1, 1, 2, 3, 12 if self.heads_kv == 1 else 4))


def _query(g: Grower, s: Sizes) -> str:
    """[d, n_q, heads]: an input, or a result with as many elements."""
    d = g.draw
    shape = (s.d, s.n_q, s.heads, 1)
    if g.results and d.chance(0.5):
        last, node = g.results[-1], g.node(g.results[-1])
        if node.dtype.name == "f32" and node.spec.elements == s.d * s.n_q * s.heads:
            return g.op("reshape", last if node.contiguous else g.op("cont", last), ne=shape)
    if d.chance(0.3):  # the order in which projections leave heads
        return _heads_last(g, g.leaf("f32", (s.d, s.heads, s.n_q)))
    return g.leaf("f32", shape)


def _keys(g: Grower, s: Sizes) -> str:
    """[d, n_kv, heads_kv]: an input, or a state that is read, written, cast or expanded."""
    d = g.draw
    dtype = d.pick(("f32", "f16", "q8_0" if s.d % 32 == 0 else "f16"))
    source = d.pick(("input", "state", "rows", "cast", "expanded", "written"))
    ne = (s.d, s.n_kv, s.heads_kv)
    if source == "input":
        return g.leaf("f32", ne)
    if source == "expanded":
        return _expanded(g, s, s.d)
    if source in ("state", "cast") or dtype == "q8_0":
        keys = g.handle(g.state(dtype, ne, share=0.5))
    else:
        state = g.state(dtype, (s.d * s.heads_kv, s.n_kv), share=0.5)
        rows = g.write_rows(state) if source == "written" else g.handle(state)
        s.rows = state
        keys = _heads_last(g, g.op("reshape", rows, ne=(s.d, s.heads_kv, s.n_kv)))
    if source == "cast":
        return g.op("cast", keys, dtype=d.pick(("f32", "f16")))
    return g.op("cont", keys) if d.chance(0.15) else keys


def _expanded(g: Grower, s: Sizes, d: int) -> str:
    """Keys or values of all heads, expanded from a latent cache."""
    rank = g.draw.pick((8, 16))
    latent = g.handle(g.state(g.draw.pick(("f32", "f16")), (rank, s.n_kv), share=0.7))
    if g.node(latent).dtype.name != "f32":
        latent = g.op("cast", latent, dtype="f32")
    heads = g.op("mul_mat", g.weight((rank, d * s.heads_kv)), latent)
    return _heads_last(g, g.op("reshape", heads, ne=(d, s.heads_kv, s.n_kv)))


def _values(g: Grower, s: Sizes) -> str:
    """[n_kv, d, heads_kv]: values with keys along rows, as a product needs them."""
    d = g.draw
    source = d.pick(("input", "copied", "copied", "cast", "rows", "expanded", "old"))
    if source == "input":
        return g.leaf("f32", (s.n_kv, s.d, s.heads_kv))
    if source == "expanded":
        return g.op("cont", g.op("transpose", _expanded(g, s, s.d)))
    dtype = d.pick(("f32", "f16"))
    if source == "rows":
        state = g.state(dtype, (s.d, s.heads_kv, s.n_kv), share=0.5)
        return g.op("permute", g.handle(state), axes=(1, 2, 0, 3))
    if s.rows and g.node(s.rows).dtype.block == 1 and d.chance(0.4):
        # From the cache of the keys, before or after their write.
        state = g.op("reshape", d.pick((s.rows, g.handles[s.rows])), ne=(s.d, s.heads_kv, s.n_kv))
        view = g.op("permute", state, axes=(1, 2, 0, 3))
        return g.op("cast", view, dtype="f32") if source == "cast" else g.op("cont", view)
    state = g.state(dtype, (s.d, s.n_kv, s.heads_kv), share=0.5)
    # "old" reads the state as it was before all writes.
    view = g.op("transpose", state if source == "old" else g.handle(state))
    return g.op("cast", view, dtype="f32") if source == "cast" else g.op("cont", view)


def _mask(g: Grower, s: Sizes) -> str | None:
    d = g.draw
    if d.chance(0.5):
        return None
    if d.chance(0.3) and s.n_q <= s.n_kv:
        return g.op(
            "causal_mask", g.ids((s.n_q,), s.n_kv), n_kv=s.n_kv, stride=d.pick((1, 1, 1, 4))
        )
    fill = d.pick(("~causal", "~mask", f"~upto{max(1, s.n_kv // 2)}"))
    return g.leaf("f16", (s.n_kv, s.n_q), fill)


def scores(g: Grower) -> str:
    """Attention with its scores in memory, perhaps followed by another softmax and product."""
    d, s = g.draw, Sizes(g)
    kq = g.op("mul_mat", _keys(g, s), _query(g, s))
    if d.chance(0.2):
        kq = g.op("scale", kq, s=0.3)
    if d.chance(0.05):
        kq = g.op("chain", kq, times=d.pick((3, 400)), of="add")
        kq = g.op("scale", kq, s=0.001)
    p = g.op("soft_max_ext", kq, _mask(g, s), scale=d.pick((0.3, 1.0)))
    if d.chance(0.1):
        p = g.op("cont", p)
    y = g.op("mul_mat", _values(g, s), p)
    for _ in range(d.pick((0, 0, 1, 1, 2))):
        second = g.op("soft_max_ext", y, scale=1.0)
        y = g.op("mul_mat", g.weight((g.node(second).ne[0], s.d)), second)
    return y


def flash(g: Grower) -> str:
    """Flash attention; its keys and values may be expanded from a latent cache."""
    d, s = g.draw, Sizes(g)
    k = _keys(g, s)
    dtype = g.node(k).dtype.name
    if d.chance(0.5):
        v = _expanded(g, s, s.d)
        if dtype == "f16":
            v = g.op("cast", v, dtype=dtype)
    else:
        v = k if d.chance(0.3) else g.handle(g.state(dtype, (s.d, s.n_kv, s.heads_kv), share=0.5))
    attrs: dict[str, Any] = {"scale": 0.3}
    attrs |= d.pick(({}, {"logit_softcap": 10.0}, {"prec": "f32"}))
    return g.op("flash_attn_ext", _query(g, s), k, v, _mask(g, s), **attrs)


def sparse(g: Grower) -> str:
    """Attention to the keys that an indexer chooses, perhaps merged with a window's."""
    d, s = g.draw, Sizes(g)
    s.heads_kv = 1
    keys = g.handle(g.state(d.pick(("f32", "f16")), (16, s.n_kv), share=0.5))
    heads = d.pick((1, 3, 8))
    q, w = g.leaf("f32", (16, heads, s.n_q)), g.leaf("f32", (heads, s.n_q))
    mask = _mask(g, s)
    ids = g.op("top_k", g.op("lightning_indexer", q, keys, w, mask), k=d.rng.randint(1, s.n_kv))
    k = g.handle(g.state(d.pick(("f32", "f16")), (s.d, s.n_kv), share=0.5))
    both = d.chance(0.3)
    attrs: dict[str, Any] = {"scale": 0.3, "lse": both}
    query = _query(g, s)
    y = g.op("flash_attn_ext", query, k, k, mask, None, None, ids, **attrs)
    if both:
        rows = g.handle(g.state("f16", (s.d, 9), share=0.0))
        y = g.op("merge_lse", y, g.op("flash_attn_ext", query, rows, rows, **attrs))
    return y


def normed(g: Grower) -> str:
    """A sum, its norm times a row, and products with that."""
    d = g.draw
    k, tokens = d.pick((32, 64, 256)), d.pick((1, 3, 5, 9))
    h = g.op("add", g.leaf("f32", (k, tokens)), g.leaf("f32", (k, tokens)))
    x = g.op("mul", g.op("rms_norm", h, eps=1e-5), g.weight((k,)))
    dtype = d.pick(("f32", "f16", "q8_0", "iq4_nl"))
    up, gate = (g.weight((k, 40), dtype) for _ in range(2))
    if d.chance(0.5):
        y = g.op("fused_up_gate", up, gate, x)
    else:
        y = g.op("mul", g.op("silu", g.op("mul_mat", gate, x)), g.op("mul_mat", up, x))
    g.results.append(h)
    return y


def experts(g: Grower) -> str:
    """Routing, products with the chosen experts, and their weighted sum."""
    d = g.draw
    k, tokens, count, used = d.pick((32, 64)), d.pick((1, 5, 9)), 8, d.pick((1, 2, 3))
    x = g.leaf("f32", (k, tokens))
    logits = g.op("mul_mat", g.weight((k, count)), x, prec="f32")
    probs = g.op("soft_max_ext", logits) if d.chance(0.6) else g.op("sigmoid", logits)
    ids = g.op("top_k", probs, k=used)
    weights = g.op("get_rows", g.op("reshape", probs, ne=(1, count, tokens)), ids)
    b = g.op("reshape", x, ne=(k, 1, tokens))
    dtype = d.pick(("f32", "f16", "q8_0"))
    if d.chance(0.5):
        up, gate = (g.weight((k, 32, count), dtype) for _ in range(2))
        b = g.op("moe_up_gate", up, gate, b, ids)
    down = g.op("mul_mat_id", g.weight((g.node(b).ne[0], k, count), dtype), b, ids)
    y = g.op("mul_multi_add", down, weights)
    return g.op("add", x, y) if d.chance(0.5) else y


def cached(g: Grower) -> str:
    """Keys, rotated by their positions and written into rows of a cache."""
    d = g.draw
    n, heads, tokens = d.pick((32, 64)), d.pick((1, 3)), d.pick((1, 5))
    pos = g.leaf("i32", (tokens,), "!32")
    keys = g.op("rope_ext", g.leaf("f32", (n, heads, tokens)), pos, n_dims=n - d.pick((0, 8)))
    state = g.state(d.pick(("f32", "f16", "q8_0")), (n * heads, 32), share=0.0)
    row = g.op("reshape", keys, ne=(n * heads, tokens))
    handle = g.op("set_rows", g.handle(state), row, pos)
    g.wrote(state, handle)
    return g.op("get_rows", handle, g.ids((4,), 32))


#: Parts and their weights.
PARTS: tuple[tuple[Callable[[Grower], str], int], ...] = (
    (scores, 5),
    (flash, 3),
    (sparse, 2),
    (normed, 2),
    (experts, 2),
    (cached, 2),
)

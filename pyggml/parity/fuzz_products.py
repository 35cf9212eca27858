"""Random cases of products, experts and attention."""

from __future__ import annotations

from dataclasses import replace

from pyggml.parity.case import Case
from pyggml.parity.fuzz_draw import BLOCKS, PLAIN, Draw, viewed

ACTS = ("silu", "gelu", "relu")
HEADS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 33, 40, 64, 72, 80, 96, 100, 128, 192, 256)


# -- products --------------------------------------------------------------------------------


def mul_mat(d: Draw) -> Case:
    dtype = d.pick((*PLAIN, d.pick(BLOCKS)))
    k, m, n = d.row(dtype), d.size(70), d.size(40)
    a2, a3 = d.pick((1, 1, 2, 3)), d.pick((1, 1, 2))
    fill = d.pick(("", "", "", "~nan3")) if dtype in PLAIN else ""
    a = d.source(dtype, (k, m, a2, a3), fill, weight=0.4)
    b = d.source(d.pick(PLAIN), (k, n, a2 * d.pick((1, 1, 2, 3)), a3 * d.pick((1, 1, 2))))
    attrs = d.pick(({}, {}, {"dtype": "f16"}, {"prec": "f32"}))
    return d.case("mul_mat", a, b, **attrs)


def _experts(d: Draw) -> tuple[str, int, int, int, int, int, int]:
    """(type, k, m, experts, experts used, rows of b per token, tokens)"""
    dtype = d.pick((*PLAIN, d.pick(BLOCKS)))
    used = d.pick((1, 2, 3, 6))
    return dtype, d.row(dtype, 300), d.size(40), d.size(12), used, d.divisor(used), d.size(20)


def mul_mat_id(d: Draw) -> Case:
    dtype, k, m, experts, used, rows, tokens = _experts(d)
    a = d.source(dtype, (k, m, experts), rows=True, weight=0.4)
    b = d.source(d.pick(("f32", "f16")), (k, rows, tokens))
    attrs = d.pick(({}, {"prec": "f32"}))
    return d.case("mul_mat_id", a, b, d.ids((used, tokens), experts), **attrs)


def limit(d: Draw) -> dict[str, object]:
    """The limit of a gated unit, in a quarter of the cases."""
    return {"limit": d.pick((0.3, 5.0, 10.0))} if d.chance(0.25) else {}


def moe_up_gate(d: Draw) -> Case:
    dtype, k, m, experts, used, rows, tokens = _experts(d)
    up, gate = (d.source(dtype, (k, m, experts), rows=True, weight=0.4) for _ in range(2))
    b = d.source(d.pick(("f32", "f16")), (k, rows, tokens))
    attrs = {"act": d.pick(ACTS), **limit(d), **d.pick(({}, {"prec": "f32"}))}
    return d.case("moe_up_gate", up, gate, b, d.ids((used, tokens), experts), **attrs)


def fused_up_gate(d: Draw) -> Case:
    dtype = d.pick((*PLAIN, d.pick(BLOCKS)))
    second = d.pick((dtype, dtype, "f32", "q8_0"))
    k, m = d.row(dtype), d.size(70)
    k = k if second != "q8_0" else max(32, k - k % 32)
    up, gate = (d.source(t, (k, m), rows=True, weight=0.4) for t in (dtype, second))
    b = d.source(d.pick(("f32", "f16")), (k, d.size(33), d.size(3), d.size(2)))
    attrs = {"act": d.pick(ACTS), **limit(d), **d.pick(({}, {"prec": "f32"}))}
    return d.case("fused_up_gate", up, gate, b, **attrs)


def routing(d: Draw) -> Case:
    groups, size, tokens = d.pick((1, 2, 4, 8)), d.size(20), d.size(40)
    used = d.rng.randint(1, groups)
    k = d.rng.randint(1, min(16, used * size))
    a = d.source("f32", (groups * size, tokens))
    n_top = d.rng.randint(1, min(2, size))
    return d.case("grouped_topk", a, n_group=groups, n_group_used=used, n_top=n_top, k=k)


def sums(d: Draw) -> Case:
    a = d.source("f32", (d.size(300), d.size(9), d.size(33)), d.special())
    if d.chance(0.5):
        return d.case("multi_add", a)
    return d.case("mul_multi_add", a, d.source("f32", (1, *a.ne[1:])))


# -- attention -------------------------------------------------------------------------------


def attention(d: Draw) -> Case:
    """Every route: more than 256 keys (kernels split them), odd head sizes, hidden rows of NaN."""
    dtype = d.pick((*PLAIN, *PLAIN, "q8_0", "q4_0", "iq4_nl"))
    block = dtype not in PLAIN
    d_k, d_v = _heads(d, block)
    n_kv = d.pick((d.size(256), d.rng.randint(257, 900), d.size(64)))
    heads_kv, ratio, n3 = d.pick((1, 1, 2, 3)), d.pick((1, 1, 2, 4, 5)), d.pick((1, 1, 1, 2))
    n_q = d.size(40)
    heads = heads_kv * ratio
    n_q = max(1, min(n_q, 3_000_000 // (heads * n3 * n_kv * (d_k + d_v)), 120 // (heads * n3)))
    fill, hide = _hidden(d, n_kv)
    q = d.source("f32", (d_k, n_q, heads, n3), rows=True)
    k = d.source(dtype, (d_k, n_kv, heads_kv, n3), fill, rows=True)
    v = d.source(dtype, (d_v, n_kv, heads_kv, n3), fill, rows=True)
    if d_v <= d_k and d.chance(0.15):
        start = (
            d.rng.randint(0, d_k - d_v) if not block else 32 * d.rng.randint(0, (d_k - d_v) // 32)
        )
        v = viewed(v, dtype, v.ne, 1, start)
    ne = (n_kv, n_q + d.pick((0, 0, 5)), d.divisor(heads), d.divisor(n3))
    word = hide if hide.startswith("~") else d.pick(("~mask", "~causal", "~blocks"))
    mask = d.source("f16", ne, word, rows=True) if hide[:1] == "~" or d.chance(0.5) else None
    attrs: dict[str, object] = {"scale": round(d_k**-0.5, 4)}
    length = None
    if hide.startswith("#") or (not hide and d.chance(0.3)):
        length = d.source("i32", (1,), hide or f"#{d.rng.randrange(n_kv + 2)}")
        attrs |= {"kv0": d.rng.randint(1, 4)} if not hide and d.chance(0.5) else {}
    if mask is not None:
        attrs |= slopes(d, heads)
    attrs |= d.pick(({}, {}, {"logit_softcap": 10.0})) | d.pick(({}, {}, {"prec": "f32"}))
    attrs |= d.pick(({}, {}, {"lse": True}))
    sinks = d.maybe(d.source("f32", (heads,)), 0.25)
    lists = None
    if d.chance(0.3):
        n_ids = d.rng.randint(1, n_kv)
        lists = d.source("i32", (n_ids, n_q, 1, n3), f"!{n_kv}" + "-" * d.chance(0.5))
    return d.case("flash_attn_ext", q, k, v, mask, sinks, length, lists, **attrs)


def indexer(d: Draw) -> Case:
    """Scores of an indexer; hidden rows may hold NaN and infinity."""
    dtype = d.pick((*PLAIN, *PLAIN, "q8_0", "q4_0", "iq4_nl"))
    n, n_kv, n3 = d.row(dtype, 200), d.size(900), d.pick((1, 1, 1, 2, 4))
    heads, tokens = d.size(70), d.size(40)
    tokens = max(1, min(tokens, 3_000_000 // (heads * n_kv * n * n3)))
    fill, hide = _hidden(d, n_kv)
    q = d.source("f32", (n, heads, tokens, n3), rows=True)
    k = d.source(dtype, (n, n_kv, 1, n3), fill, rows=True)
    weights = d.source("f32", (heads, tokens, 1, n3))
    ne = (n_kv, tokens + d.pick((0, 0, 5)), 1, d.divisor(n3))
    word = hide if hide.startswith("~") else d.pick(("~mask", "~causal", "~blocks"))
    mask = d.source("f16", ne, word, rows=True) if hide[:1] == "~" or d.chance(0.5) else None
    length = None
    if hide.startswith("#") or (not hide and d.chance(0.15)):
        length = d.source("i32", (1,), hide or f"#{d.rng.randrange(n_kv + 2)}")
    return d.case("lightning_indexer", q, k, weights, mask, length)


def slopes(d: Draw, heads: int) -> dict[str, object]:
    """Attributes of ALiBi: its bias, and which of all heads these are."""
    if d.chance(0.6):
        return {}
    head0 = d.pick((0, 0, 3))
    return {
        "max_bias": d.pick((4.0, 8.0)),
        "head0": head0,
        "n_head": head0 + heads + d.pick((0, 5)),
    }


def _heads(d: Draw, block: bool) -> tuple[int, int]:
    """(d_k, d_v)"""
    if block:
        return d.pick(
            ((32, 32), (64, 64), (96, 32), (128, 128), (192, 128), (576, 512), (256, 256))
        )
    if d.chance(0.35):
        return d.pick(((64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (576, 512)))
    return d.pick(HEADS), d.pick((1, 2, 3, 5, 7, 9, 33)) if d.chance(0.6) else d.pick(HEADS)


def _hidden(d: Draw, n_kv: int) -> tuple[str, str]:
    """(fill of k and v, fill of the mask or the length that hides their NaN), either may be ""."""
    n = d.rng.randint(1, max(1, n_kv - 1))
    every = d.pick((2, 3, 7, 33))
    none = ("", "")
    hidden = (
        (f"~dead{every}", f"~hide{every}"),
        (f"~past{n}", f"~upto{n}"),
        (f"~past{n}", f"#{n}"),
    )
    return d.pick((none, none, *hidden, (f"~nan{every}", "")))


def hyper_connections(d: Draw) -> Case:
    hc, tokens, n = d.pick((1, 2, 3, 4, 4, 4, 5, 8, 9, 33)), d.size(40), d.size(300)
    which = d.rng.randrange(3)
    if which == 0:
        row = (2 + hc) * hc
        mixes = d.source("f32", (row, tokens), d.pick(("", "", "~nan5", "~mask", "~large")))
        scale = d.source("f32", (d.pick((3, 3, 7)),), "~above")
        eps = d.pick((0.0, 1e-6, 0.1))
        if mixes.fill == "~large":  # in f32, all of a column may be 0: 0 / 0 without an eps
            eps = max(eps, 1e-6)
        base = d.source("f32", (row,))
        op = d.pick(("dsv4_hc_comb", "dsv4_hc_maps"))
        return d.case(op, mixes, scale, base, eps=eps, n_iter=d.pick((1, 2, 5, 20)))
    streams, numbers = d.source("f32", (n, hc, tokens), d.special()), d.source("f32", (hc, tokens))
    if which == 1:
        return d.case("dsv4_hc_pre", streams, numbers)
    comb = d.maybe(d.source("f32", (hc, hc, tokens), d.special(0.05)), 0.7)
    return d.case("dsv4_hc_post", d.source("f32", (n, tokens)), streams, numbers, comb)


def masks(d: Draw) -> Case:
    if d.chance(0.5):
        n_kv = d.size(300)
        if d.chance(0.25):
            stride = d.pick((2, 3, 4, 128))
            pos = d.ids((d.size(70),), stride * (n_kv + 1) - 1)
            return d.case("causal_mask", pos, n_kv=n_kv, stride=stride)
        pos = d.ids((d.size(70),), n_kv)
        if d.chance(0.2):  # differences overflow 32 bits
            pos = replace(pos, fill=d.pick(("#-2147483648", "#-2147483600")))
        ends = [d.ids((n_kv,), 70)] if d.chance(0.3) else []
        window = d.pick((None, None, 1, 9, 32))
        return d.case("causal_mask", pos, *ends, n_kv=n_kv, window=window)
    ne = (1 + d.size(130), d.size(5), d.size(9), d.size(3))
    return d.case("merge_lse", d.source("f32", ne), d.source("f32", ne))

"""Graphs that test what a decode step does with rows: norms, rotations, compressors, caches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np

from pyggml.node import Node
from pyggml.ops import (
    add,
    concat,
    cont,
    get_rows,
    mul,
    permute,
    reshape,
    rms_norm,
    rope_ext,
    scale,
    set_rows,
    soft_max,
    sum_rows,
)
from pyggml.ops.leaf import input as input_
from pyggml.ops.leaf import state
from pyggml.parity.pattern_maker import Maker, Pattern, T


def norm_and_rope(m: Maker) -> Pattern:
    """Heads that are normalized and rotated, with a row and without one; one head a token; norms
    that other nodes read; frequency factors."""
    pos, row = m.positions(), m.weight("row", 64)
    turn = partial(rope_ext, pos=pos, n_dims=32)
    heads = rms_norm(m.floats("q", 64, 3, T), eps=1e-6)
    weighted = mul(rms_norm(m.floats("k", 64, 3, T), eps=1e-5), row)
    single = reshape(mul(rms_norm(m.floats("c", 64, T), eps=1e-5), row), ne=(64, 1, T))
    kept = rms_norm(m.floats("kept", 64, 3, T), eps=1e-6)
    factors = rms_norm(m.floats("slow", 64, 3, T), eps=1e-6)
    return m.done(
        heads=turn(heads, offset=32), weighted=turn(weighted, mode="neox"), single=turn(single),
        kept=kept, turned=turn(kept), slow=turn(factors, freq_factors=m.floats("factors", 16)),
    )  # fmt: skip


def _norm_rope_row(m: Maker, type: str, mode: Literal["normal", "neox"]) -> Pattern:
    """Rows of one head and of three, into caches. One token is not stored."""
    pos, ids = m.positions(), m.ids("ids", 4, -1, 9, 31, 0)
    outputs = {}
    for heads in (1, 3):
        x = rms_norm(m.floats(f"x{heads}", 64, heads, T), eps=1e-6)
        x = rope_ext(mul(x, m.weight(f"row{heads}", 64)), pos, n_dims=32, offset=16, mode=mode)
        cache = state(f"cache{heads}", type, ne=(64 * heads, 32))
        cache = set_rows(cache, reshape(x, ne=(64 * heads, T)), ids)
        rows = get_rows(cache, m.ids(f"rows{heads}", 0, 4, 9, 31, 5))
        outputs[f"rows{heads}"] = scale(rows, s=1.0)
    return m.done(**outputs)


def _compressed(
    m: Maker,
    type: str = "f16",
    pairs: bool = False,
    n: int = 24,
    tokens: int = 1,
    row: int = 5,
    of: str = "",
    mode: Literal["normal", "neox"] = "normal",
) -> tuple[Node, dict[str, Node]]:
    """The cache with a row of a compressor, of `n` candidates, and rows of its rings. Rows of the
    rings that are not among the candidates are NaN.

    pairs   whether a row of the rings holds two of the candidates
    row     of the cache; -1: the window does not end here
    of      in the names of its leaves
    """
    d, n_ring = 64, 40
    w = d * (1 + pairs)
    places = range(2, 2 + tokens)
    tokens_at = m.ids(f"tokens{of}", *places)
    candidates = [*(i + 2 for i in range(n - 3)), -1, -1, n + 3]
    ids = m.ids(f"ids{of}", *(2 * i + i % 2 if pairs else i for i in candidates))
    bias = np.where(np.array(candidates) < 0, -1e30, 0).astype(np.float32)
    m.inputs[f"bias{of}"] = bias.reshape(-1, 1)
    handles = []
    for name in "vz":
        past = np.full((n_ring, w), np.nan, np.float32)
        past[candidates[:-3] + candidates[-1:]] = m.rng.standard_normal((n - 2, w))
        m.inputs[f"past_{name}{of}"] = past
        every = m.ids(f"every_{name}{of}", *range(n_ring))
        old = set_rows(state(f"ring_{name}{of}", "f32", ne=(w, n_ring)),
                       input_(f"past_{name}{of}", ne=(w, n_ring)), every)  # fmt: skip
        new = m.floats(f"{name}{of}", w, tokens)
        if name == "z":
            ape = m.floats(f"ape{of}", w, 8)
            new = add(new, get_rows(ape, m.ids(f"places{of}", *(p % 4 - (p == 3) for p in places))))
        handles.append(set_rows(old, new, tokens_at))
    v, z = (get_rows(reshape(h, ne=(d, n_ring * w // d)), ids) for h in handles)
    z = add(z, input_(f"bias{of}", ne=(1, n)))

    def columns(x: Node) -> Node:
        return cont(permute(reshape(x, ne=(d, n, 1)), axes=(1, 0, 2)))

    total = reshape(sum_rows(mul(columns(v), soft_max(columns(z)))), ne=(d, 1))
    x = reshape(mul(rms_norm(total, eps=1e-6), m.weight(f"norm{of}", d)), ne=(d, 1, 1))
    x = rope_ext(x, m.ids(f"start{of}", 12), n_dims=32, offset=32, mode=mode)
    cache = set_rows(
        state(f"cache{of}", type, ne=(d, 16)), reshape(x, ne=(d, 1)), m.ids(f"row{of}", row)
    )
    written = m.ids(f"written{of}", *places)
    rings = {f"ring{i}": get_rows(h, written) for i, h in enumerate(handles)}
    return cache, rings


def _compressor(m: Maker, **form: Any) -> Pattern:
    """A row of a compressor."""
    cache, rings = _compressed(m, **form)
    return m.done(cache=scale(get_rows(cache, m.ids("rows", *range(16))), s=1.0), **rings)


def turned_rows(m: Maker, n_tokens: int = 1, mode: Literal["normal", "neox"] = "neox") -> Pattern:
    """Queries that are rotated, and keys that are stored; one token is not."""
    pos = m.ids("pos", *range(12, 12 + n_tokens))
    queries = rope_ext(m.floats("q", 64, 37, n_tokens), pos, n_dims=32, mode=mode)
    x = rope_ext(m.floats("k", 64, 3, n_tokens), pos, n_dims=64, mode=mode)
    ids = m.ids("ids", *range(3, 2 + n_tokens), -1 if n_tokens > 1 else 3)
    cache = set_rows(state("cache", "bf16", ne=(192, 16)), reshape(x, ne=(192, n_tokens)), ids)
    rows = get_rows(cache, m.ids("rows", *range(16)))
    return m.done(queries=queries, rows=scale(rows, s=1.0))


def rows_of_token(m: Maker, type: str = "f16", n: int = 8, neox: bool = False) -> Pattern:
    """What attention reads in a layer with compressors: queries that are normalized and rotated,
    others that are rotated, a row of a cache, and rows of two compressors."""
    mode: Literal["normal", "neox"] = "neox" if neox else "normal"
    turn = partial(rope_ext, pos=m.ids("pos", 12), n_dims=32, mode=mode)
    queries = turn(rms_norm(m.floats("q", 64, 5, 1), eps=1e-6), offset=32)
    turned = turn(m.floats("index_q", 64, 70, 1))
    x = mul(rms_norm(m.floats("x", 64, 1), eps=1e-6), m.weight("row", 64))
    x = turn(reshape(x, ne=(64, 1, 1)), offset=32)
    row = set_rows(state("window", type, ne=(64, 16)), reshape(x, ne=(64, 1)), m.ids("at", 3))
    one, rings = _compressed(m, type, pairs=True, n=n, of="1", mode=mode)
    two, others = _compressed(m, type, n=8, of="2", mode=mode)
    caches = concat(row, concat(one, two, dim=1), dim=1)  # read behind all writes
    rows = get_rows(caches, m.ids("all", 3, *range(16, 48)))
    outputs = {f"{k}_{i}": y for i, r in enumerate((rings, others)) for k, y in r.items()}
    return m.done(queries=queries, turned=turned, rows=scale(rows, s=1.0), **outputs)


PATTERNS: dict[str, Callable[[Maker], Pattern]] = {
    "norm_and_rope": norm_and_rope,
    "norm_rope_row_f16": partial(_norm_rope_row, type="f16", mode="normal"),
    "norm_rope_row_bf16": partial(_norm_rope_row, type="bf16", mode="neox"),
    "norm_rope_row_q8_0": partial(_norm_rope_row, type="q8_0", mode="normal"),
    "compressor": _compressor,
    "compressor_of_pairs_q8_0": partial(_compressor, type="q8_0", pairs=True, n=8),
    "compressor_of_tokens_bf16": partial(_compressor, type="bf16", n=13, tokens=3),
    "compressor_of_many": partial(_compressor, n=36, tokens=2),
    "compressor_of_many_pairs_q8_0": partial(_compressor, type="q8_0", pairs=True, n=35),
    "compressor_of_many_waiting": partial(_compressor, n=36, row=-1),
    "compressor_waiting": partial(_compressor, row=-1),
    "turned_rows": turned_rows,
    "turned_rows_of_tokens": partial(turned_rows, n_tokens=3, mode="normal"),
    "rows_of_token": rows_of_token,
    "rows_of_token_q8_0": partial(rows_of_token, type="q8_0", n=36),
    "rows_of_token_neox": partial(rows_of_token, type="bf16", neox=True),
}

"""Layers of a small model with caches, dense or with experts, for tests of several devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import numpy as np

import pyggml as gg
from pyggml import backends
from pyggml.node import Node
from pyggml.passes.work import Split
from pyggml.runtime.plan import Plan

WIDTH, TOKENS, ROWS = 16, 5, 32

#: Eight layers on two devices.
HALVES = {r"blk\.[0-3]\.": "null:0", r"blk\.[4-7]\.|output": "null:1"}

FEED = {
    "x": np.random.default_rng(1).standard_normal((TOKENS, WIDTH)),
    "pos": np.arange(TOKENS),
    "at": np.arange(TOKENS),
}


def weight(label: str | None, *ne: int, seed: int = 0) -> Node:
    rng = np.random.default_rng([seed, *(label or "").encode()])
    return gg.constant(rng.standard_normal(ne[::-1]).astype(np.float32), name=label)


def attention(layer: int, a: Node, pos: Node, at: Node, factors: Node | None) -> Node:
    """Two heads of eight over a cache of K and one of V."""

    def heads(label: str) -> Node:
        rows = gg.mul_mat(weight(f"blk.{layer}.{label}", WIDTH, WIDTH), a)
        return gg.rope_ext(gg.reshape(rows, ne=(8, 2, a.ne[1])), pos, factors, n_dims=8)

    def cached(label: str, rows: Node) -> Node:
        state = gg.state(f"cache_{label}.{layer}", "f32", ne=(WIDTH, ROWS))
        handle = gg.set_rows(state, gg.reshape(rows, ne=(WIDTH, a.ne[1])), at)
        return gg.permute(gg.reshape(handle, ne=(8, 2, ROWS)), axes=(0, 2, 1, 3))

    q = gg.permute(heads("q"), axes=(0, 2, 1, 3))
    k = cached("k", heads("k"))
    v = cached("v", gg.mul_mat(weight(f"blk.{layer}.v", WIDTH, WIDTH), a))
    mask = gg.causal_mask(pos, n_kv=ROWS)
    scores = gg.label(gg.mul_mat(k, q), f"kq-{layer}")
    soft = gg.soft_max_ext(scores, mask, scale=0.3)
    out = gg.permute(gg.mul_mat(gg.cont(gg.transpose(v)), soft), axes=(0, 2, 1, 3))
    joined = gg.reshape(gg.cont(out), ne=(WIDTH, a.ne[1]))
    return gg.mul_mat(weight(f"blk.{layer}.o", WIDTH, WIDTH), joined)


def dense(layer: int, a: Node) -> Node:
    up, gate = (weight(f"blk.{layer}.{which}", WIDTH, 24) for which in ("up", "gate"))
    hidden = gg.fused_up_gate(up, gate, a)
    return gg.mul_mat(weight(f"blk.{layer}.down", 24, WIDTH), hidden)


def experts(layer: int, a: Node, count: int) -> Node:
    """Two of `count` experts for each token, in simple ops."""
    sizes = {"up": (WIDTH, 8, count), "gate": (WIDTH, 8, count), "down": (8, WIDTH, count)}
    up, gate, down = (weight(f"blk.{layer}.{k}_exps", *ne) for k, ne in sizes.items())
    ids = gg.top_k(gg.mul_mat(weight(f"blk.{layer}.router", WIDTH, count), a), k=2)
    b = gg.reshape(a, ne=(WIDTH, 1, a.ne[1]))
    opened = gg.label(gg.silu(gg.mul_mat_id(gate, b, ids)), f"opened-{layer}")
    hidden = gg.label(gg.mul(opened, gg.mul_mat_id(up, b, ids)), f"hidden-{layer}")
    return gg.multi_add(gg.mul_mat_id(down, hidden, ids))


def stack(layers: int, n_experts: int = 0, factors: Node | None = None) -> Node:
    """Logits of `layers` layers with residual adds and norms."""
    pos, at = (gg.input(label, "i32", ne=(TOKENS,)) for label in ("pos", "at"))
    h = gg.input("x", "f32", ne=(WIDTH, TOKENS))
    for i in range(layers):
        a = gg.mul(gg.rms_norm(h, eps=1e-5), weight(f"blk.{i}.norm_a", WIDTH))
        h = gg.add(h, attention(i, a, pos, at, factors))
        a = gg.mul(gg.rms_norm(h, eps=1e-5), weight(f"blk.{i}.norm_b", WIDTH))
        h = gg.add(h, experts(i, a, n_experts) if n_experts else dense(i, a))
    last = gg.mul(gg.rms_norm(h, eps=1e-5), weight("output_norm", WIDTH))
    return gg.mul_mat(weight("output", WIDTH, 40), last)


# -- contents of plans--------------------------------------------------------------------------


def places(plan: Plan) -> list[str]:
    """The place of each split with steps."""
    return [split.backend.place for split in plan.splits if split.steps]


def ops(split: Split) -> list[str]:
    return [step.node.op.name for step in split.steps]


def copied(plan: Plan) -> list[tuple[str, int]]:
    """The destination and the bytes of each copy."""
    return [(s.backend.place, step.nbytes) for s in plan.splits for step in s.copies]


def where(plan: Plan, label: str) -> str:
    """The place of the node with this label."""
    homes = {plan.place_of(n) for n in plan.graph.nodes if label in gg.labels(n)}
    assert len(homes) == 1, (label, homes)
    return homes.pop()


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Equal bit for bit."""
    assert a.keys() == b.keys()
    for key, array in a.items():
        np.testing.assert_array_equal(array.view(np.uint8), b[key].view(np.uint8), key)


def row(plan: Plan, place: str) -> Any:
    """The row of a device in the memory table."""
    return next(r for r in plan.memory.devices if r.device == place)


@contextmanager
def paces(seed: int | None) -> Iterator[None]:
    """The queues of two devices run as late as possible (None), or at random moments (a seed)."""
    queues = [backends.get("null", i).queue for i in range(2)]
    for queue in queues:
        queue.pace = None if seed is None else Random(seed)
    yield
    for queue in queues:
        queue.pace = None

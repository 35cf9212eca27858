"""The cases of gpu_attention.py: nodes of flash_attn_ext and of the ops beside it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import pyggml as gg
from pyggml import ops
from pyggml.backends.cuda.attention import routes


@dataclass
class Case:
    """One node: sizes, kinds of operands, attributes; `route` is forced where it fits."""

    route: str
    d_k: int
    d_v: int
    n_q: int
    n_kv: int
    heads: int = 1
    heads_kv: int = 1
    n3: int = 1
    kind: str = "f16"
    kind_v: str = ""
    mask: str = ""  # "", pos, window, random, dead, alibi
    m2: int = 1
    m3: int = 1
    inside: int = -1  # V within K from this element on
    sinks: bool = False
    kv_len: int = -1
    attrs: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def pos(self) -> bool:
        return self.mask in ("pos", "window")

    @property
    def window(self) -> int | None:
        return max(1, self.n_kv // 3) if self.mask == "window" else None


def node_of(case: Case) -> gg.Node:
    q = gg.input("q", "f32", ne=(case.d_k, case.n_q, case.heads, case.n3))
    k = gg.state("k", case.kind, ne=(case.d_k, case.n_kv, case.heads_kv, case.n3))
    size = (case.d_v, case.n_kv, case.heads_kv, case.n3)
    if case.inside >= 0:
        v = gg.view(k, ne=size, start=(case.inside, 0, 0, 0))
    else:
        v = gg.state("v", case.kind_v or case.kind, ne=size)
    mask = None
    if case.pos:
        mask = gg.causal_mask(gg.input("pos", "i32", ne=(case.n_q,)), n_kv=case.n_kv)
    elif case.mask:
        mask = gg.input("mask", "f16", ne=(case.n_kv, case.n_q, case.m2, case.m3))
    sinks = gg.input("sinks", "f32", ne=(case.heads,)) if case.sinks else None
    kv_len = gg.input("n", "i32", ne=(1,)) if case.kv_len >= 0 else None
    attrs = {"scale": case.d_k**-0.5, **case.attrs}
    if case.mask == "alibi":
        attrs["max_bias"] = 8.0
    return gg.flash_attn_ext(q, k, v, mask, sinks, kv_len, **attrs)


def random_case(route: str, dice: random.Random, seed: int) -> Case:
    """Any case that `route` takes, small enough for a float64 reference."""
    pick = dice.choice
    kind = pick(["f16", "f16", "bf16"])
    ratio = pick([1, 1, 2, 3, 4, 8])
    heads_kv = pick([1, 2, 3])
    n_q, n_kv = pick([1, 2, 3, 5]), pick([1, 17, 100, 256, 700, 1999])
    inside = -1
    if route.startswith("latent"):
        d_k, d_v, inside = 576, 512, pick([0, 0, 64])
        heads_kv, ratio = pick([1, 1, 1, 2]), pick([1, 5, 16, 32, 128])
        n_q = pick([1, 1, 2, 4, 33])
        kind = pick(["f16", "f16", "bf16", "q8_0"])
    elif route == "any":
        d_k, d_v = pick([(40, 24), (64, 64), (32, 48), (192, 128), (576, 512), (256, 256), (33, 7)])
        kind = pick(["f32", "f16", "bf16"] + ["q8_0"] * (d_k % 32 == 0 == d_v % 32))
        if d_k == 576:
            inside = pick([-1, 0, 64])
    else:
        d_k, d_v = pick(list(routes.HOPPER if route == "hopper" else routes.PAIRS))
        if (d_k, d_v) in routes.HOPPER:
            kind = pick(["f16", "f16", "bf16", "q8_0"])
    if route in ("tiles", "hopper"):
        n_q = pick([1, 16, 33, 64, 65, 130, 257])
    case = Case(route, d_k, d_v, n_q, n_kv, heads_kv * ratio, heads_kv, pick([1, 1, 2]), kind)
    case.inside, case.seed = inside, seed
    case.mask = pick(["", "pos", "pos", "window", "random", "dead", "alibi"])
    case.m2, case.m3 = pick([1, case.heads]), pick([1, case.n3])
    case.sinks = dice.random() < 0.25
    case.kv_len = -1 if dice.random() < 0.6 else pick([0, n_kv // 2, n_kv, n_kv + 9])
    case.attrs = {"lse": dice.random() < 0.4}
    if dice.random() < 0.2:
        case.attrs["logit_softcap"] = 10.0
    if dice.random() < 0.2:
        case.attrs["scale"] = -0.05
    if case.kv_len >= 0 and dice.random() < 0.3:
        case.attrs["kv0"] = 5
    if route == "any":
        case.attrs["prec"] = "f32"
    return case


def groups() -> dict[str, list[Case]]:
    made: dict[str, list[Case]] = {}
    for route, count in (
        ("any", 30),
        ("split", 50),
        ("latent", 40),
        ("latent_hopper", 30),
        ("tiles", 50),
        ("hopper", 60),
    ):
        dice = random.Random(route)
        made[route] = [random_case(route, dice, i) for i in range(count)]
    # One plain case of each kernel first: where it fails, the rest explains nothing.
    made["split"][:0] = [Case("split", *p, 1, 300, 4, 4) for p in routes.PAIRS]
    made["tiles"][:0] = [Case("tiles", *p, 200, 300, 2, 2) for p in routes.PAIRS]
    made["hopper"][:0] = [Case("hopper", *p, 256, 512, 2, 2) for p in routes.HOPPER]
    made["latent"][:0] = [
        Case("latent", 576, 512, 1, 4096, 16, 1, inside=0),
        Case("latent", 576, 512, 1, 4096, 128, 1, inside=0),
    ]
    made["latent_hopper"][:0] = [
        Case("latent_hopper", 576, 512, 1, 4096, 128, 1, inside=0),
        Case("latent_hopper", 576, 512, 1, 4096, 16, 1, inside=64),
    ]
    made["any"][:0] = [
        Case("any", 64, 64, 3, 31, 2, 2, kind=kind, attrs={"prec": "f32"})
        for kind in ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")
    ]
    made["long"] = [
        Case("", 192, 128, 2048, 2048, 16, 16, mask="pos"),
        Case("", 192, 128, 512, 16384, 16, 16, mask="pos"),
        Case("", 192, 128, 1, 16384, 16, 16),
        Case("", 576, 512, 1, 16384, 128, 1, inside=0),
        Case("", 576, 512, 300, 4096, 16, 1, mask="pos", inside=0),
        Case("", 128, 128, 100, 8000, 32, 8, mask="random"),
        Case("", 192, 128, 200, 3000, 4, 4, kind="q8_0", mask="pos"),
    ]
    return made


def others() -> list[tuple[gg.Node, dict[str, np.ndarray[Any, Any]]]]:
    """The ops beside flash_attn_ext, and what their inputs hold."""
    rng = np.random.default_rng(0)
    made = []

    def put(op: Any, shapes: list[tuple[int, ...] | None], hide: int = -1, **attrs: Any) -> None:
        nodes: list[gg.Node | None] = []
        arrays = {}
        for i, shape in enumerate(shapes):
            if shape is None:
                nodes.append(None)
                continue
            x = rng.standard_normal(shape).astype(np.float16 if i == hide else np.float32)
            if i == hide:
                x[rng.random(shape) < 0.4] = -np.inf
                x[..., 0, :] = -np.inf
            if op is ops.lse_finish:
                x = np.abs(x)  # the weights of a sum
            kind = "f16" if i == hide else "f32"
            nodes.append(gg.input(f"x{i}", kind, ne=shape[::-1]))
            arrays[f"x{i}"] = x
        made.append((op(*nodes, **attrs), arrays))

    for n in (1, 37, 300, 1024, 5000):
        put(gg.soft_max_ext, [(2, 6, 9, n), (1, 2, 11, n)], hide=1, scale=0.7, max_bias=8.0)
        put(gg.soft_max_ext, [(1, 4, 9, n), None, (4,)], scale=0.5)
        put(gg.soft_max_ext, [(1, 4, 9, n), (1, 1, 9, n)], scale=0.5)
    put(gg.merge_lse, [(2, 5, 3, 33), (2, 5, 3, 33)])
    put(ops.lse_sum, [(2, 5, 3, 33)])
    put(ops.lse_sum, [(2, 5, 3, 33), (2, 5, 3, 34)])
    put(ops.lse_finish, [(2, 5, 3, 34)], lse=True)
    return made

"""Cases of flash_attn_ext for each kernel, also where another would be chosen: nodes, the values of
their inputs, and the result in float64."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pyggml as gg
from pyggml.backends.cuda.attention import routes
from pyggml.dtypes import dtype
from pyggml.quants import decode_rows, encode_rows

Array = NDArray[Any]


@dataclass
class Attention:
    """A node of flash_attn_ext. `route` is the kernel it must use; empty: any.

    mask    pos, window   a causal_mask, which kernels compute from positions
            random        0 and -inf
            dead          numbers and -inf
            alibi         numbers, with max_bias
            The last three are f16 masks with m2 heads and m3 batches. random and dead hide whole
            tiles, and one row completely
    inside  V is a view of K from this element on; negative: V is its own tensor
    kv_len  negative: none
    n_ids   length of each query's list of keys; 0: no lists. Keys of a list are distinct; a fifth
            are negative, and all from the n_kv-th on
    """

    route: str
    d_k: int
    d_v: int
    n_q: int
    n_kv: int
    heads: int = 1
    heads_kv: int = 1
    n3: int = 1
    dtype: str = "f16"
    mask: str = ""
    m2: int = 1
    m3: int = 1
    inside: int = -1
    sinks: bool = False
    kv_len: int = -1
    n_ids: int = 0
    attrs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shape = f"{self.d_k}/{self.d_v} q{self.n_q} kv{self.n_kv} h{self.heads}/{self.heads_kv}"
        types = f"x{self.n3} {self.dtype} {self.mask}{self.m2}{self.m3} in{self.inside}"
        more = f"len{self.kv_len} ids{self.n_ids} sinks{self.sinks:d}"
        return f"{self.route} {shape} {types} {more} {self.attrs}"

    @property
    def pos(self) -> Array | None:
        """Positions of the queries. The last query is at the last key; negative ones see no key."""
        causal = self.mask in ("pos", "window")
        return np.arange(self.n_kv - self.n_q, self.n_kv, dtype=np.int32) if causal else None

    @property
    def window(self) -> int | None:
        return max(1, self.n_kv // 3) if self.mask == "window" else None

    @property
    def all_attrs(self) -> dict[str, Any]:
        bias = {"max_bias": 8.0} if self.mask == "alibi" else {}
        return {"scale": self.d_k**-0.5, **self.attrs, **bias}

    def node(self) -> gg.Node:
        q = gg.input("q", "f32", ne=(self.d_k, self.n_q, self.heads, self.n3))
        k = gg.input("k", self.dtype, ne=(self.d_k, self.n_kv, self.heads_kv, self.n3))
        size = (self.d_v, self.n_kv, self.heads_kv, self.n3)
        if self.inside >= 0:
            v = gg.view(k, ne=size, start=(self.inside, 0, 0, 0))
        else:
            v = gg.input("v", self.dtype, ne=size)
        mask = None
        if self.pos is not None:
            pos = gg.input("pos", "i32", ne=(self.n_q,))
            mask = gg.causal_mask(pos, n_kv=self.n_kv, window=self.window)
        elif self.mask:
            mask = gg.input("mask", "f16", ne=(self.n_kv, self.n_q, self.m2, self.m3))
        sinks = gg.input("sinks", "f32", ne=(self.heads,)) if self.sinks else None
        kv_len = gg.input("kv_len", "i32", ne=(1,)) if self.kv_len >= 0 else None
        lists = (self.n_ids, self.n_q, 1, self.n3)
        ids = gg.input("ids", "i32", ne=lists) if self.n_ids else None
        return gg.flash_attn_ext(q, k, v, mask, sinks, kv_len, ids, **self.all_attrs)

    def leaves(self) -> dict[str, Array]:
        """The stored values of the inputs; the same in every call."""
        rng = np.random.default_rng(list(str(self).encode()))

        def normal(*shape: int) -> Array:
            return rng.standard_normal(shape, np.float32)

        rows = (self.n3, self.heads_kv, self.n_kv)
        leaves = {
            "q": normal(self.n3, self.heads, self.n_q, self.d_k),
            "k": stored(self.dtype, normal(*rows, self.d_k)),
        }
        if self.inside < 0:
            leaves["v"] = stored(self.dtype, normal(*rows, self.d_v) + np.float32(0.25))
        if self.pos is not None:
            leaves["pos"] = self.pos.reshape(1, 1, 1, -1)
        elif self.mask:
            mask = normal(self.m3, self.m2, self.n_q, self.n_kv).astype(np.float16)
            if self.mask != "alibi":
                mask *= self.mask == "dead"
                mask[rng.random(mask.shape) < 0.3] = -np.inf
                mask[..., : self.n_kv // 2] = -np.inf
                mask[..., self.n_q // 2, :] = -np.inf
            leaves["mask"] = mask
        if self.sinks:
            leaves["sinks"] = normal(1, 1, 1, self.heads)
        if self.kv_len >= 0:
            leaves["kv_len"] = np.full((1, 1, 1, 1), self.kv_len, np.int32)
        if self.n_ids:
            leaves["ids"] = np.empty((self.n3, 1, self.n_q, self.n_ids), np.int32)
            count = max(self.n_ids, self.n_kv)
            for row in leaves["ids"].reshape(-1, self.n_ids):
                ids = rng.permutation(count)
                ids[(rng.random(count) < 0.2) | (ids >= self.n_kv)] = -1
                row[:] = ids[: self.n_ids]
        return leaves


def stored(name: str, values: Array) -> Array:
    t = dtype(name)
    return encode_rows(t, values) if t.numpy is None else values.astype(t.numpy)


def values(name: str, rows: Array) -> Array:
    """Stored rows as float64."""
    t = dtype(name)
    return np.asarray(decode_rows(t, rows) if t.numpy is None else rows, np.float64)


def reference(case: Attention, leaves: dict[str, Array]) -> Array:
    """The result, [n3, n_q, heads, d_v]; with `lse`, d_v + 1: the log-sum-exp comes last."""
    attrs, ratio = case.all_attrs, case.heads // case.heads_kv
    k = values(case.dtype, leaves["k"])
    inside = k[..., case.inside :][..., : case.d_v]
    v = values(case.dtype, leaves["v"]) if case.inside < 0 else inside
    live = case.n_kv if case.kv_len < 0 else case.kv_len - attrs.get("kv0", 0)
    out = np.empty((case.n3, case.n_q, case.heads, case.d_v + 1))
    for i3, h in np.ndindex(case.n3, case.heads):
        s = attrs["scale"] * (leaves["q"][i3, h].astype(np.float64) @ k[i3, h // ratio].T)
        cap = attrs.get("logit_softcap", 0.0)
        s = cap * np.tanh(s / cap) if cap else s
        if case.pos is not None:
            back = case.pos[:, None] - np.arange(case.n_kv)
            s[(back < 0) | (back >= (case.window or case.n_kv + case.n_q))] = -np.inf
        elif case.mask:
            s += slope(h, case) * leaves["mask"][i3 % case.m3, h % case.m2].astype(np.float64)
        s[:, max(0, live) :] = -np.inf
        listed = v[i3, h // ratio]
        if case.n_ids:
            ids = leaves["ids"][i3, 0]
            real = (ids >= 0) & (ids < case.n_kv)
            s = np.where(real, np.take_along_axis(s, ids * real, axis=1), -np.inf)
            listed = listed[ids * real]
        sink = leaves["sinks"][0, 0, 0, h] if case.sinks else -np.inf
        top = np.maximum(s.max(axis=1, keepdims=True), sink)
        with np.errstate(invalid="ignore", divide="ignore"):
            p = np.nan_to_num(np.exp(s - top))  # rows without a live key
            total = p.sum(axis=1, keepdims=True) + np.nan_to_num(np.exp(sink - top))
            p = np.nan_to_num(p / total)[:, None]
            out[i3, :, h, :-1] = (p @ listed)[:, 0]
            out[i3, :, h, -1:] = top + np.log(total)
    out[np.isnan(out)] = -np.inf  # of -inf and the log of 0
    return out if attrs.get("lse") else out[..., :-1]


def slope(head: int, case: Attention) -> float:
    """The factor of a head's mask in ALiBi."""
    if case.mask != "alibi":
        return 1.0
    power = 1 << (case.heads.bit_length() - 1)
    exponent = head + 1 if head < power else head - power + 0.5
    return float(2.0 ** (-8.0 * exponent / power))


@contextmanager
def forced(route: str) -> Iterator[None]:
    """Inside, use this route if it supports the types and sizes. An empty route changes nothing."""
    original = routes.Shape.routes
    if route:
        names = (route, "any") if route != "any" else ("any",)
        routes.Shape.routes = property(lambda shape: names)  # type: ignore[assignment]
    try:
        yield
    finally:
        routes.Shape.routes = original


# -- cases ------------------------------------------------------------------------------------


def random_case(route: str, dice: random.Random) -> Attention:
    """A random case that `route` supports, small enough for a float64 reference."""
    pick = dice.choice
    cache = pick(["f16", "f16", "bf16"])
    ratio = pick([1, 1, 2, 3, 4, 8])
    heads_kv = pick([1, 2, 3])
    n_q, n_kv = pick([1, 2, 3, 5]), pick([1, 17, 100, 256, 700, 1999])
    inside = -1
    n_ids = 0
    if "latent" in route or "list" in route:
        d_k, d_v = pick(routes.LATENT)
        inside = pick([0, 0, d_k - d_v])
        lists = [1, 63, 64, 65, 200, 300, 1000]
        n_ids = pick({"latent": [0] * 4 + lists, "latent_hopper": [0]}.get(route, lists))
        heads_kv, ratio = pick([1, 1, 1, 2]), pick([1, 5, 16, 32, 128])
        n_q = pick([1, 1, 2, 4, 33])
        cache = "f16" if route == "list_token" else pick(["f16", "f16", "bf16", "q8_0"])
    elif route == "any":
        d_k, d_v = pick([(40, 24), (64, 64), (32, 48), (192, 128), (576, 512), (256, 256), (33, 7)])
        cache = pick(["f32", "f16", "bf16"] + ["q8_0"] * (d_k % 32 == 0 == d_v % 32))
        if d_k == 576:
            inside = pick([-1, 0, 64])
            n_ids = pick([0, 9, 100])
    else:
        d_k, d_v = pick(list(routes.HOPPER if route == "hopper" else routes.PAIRS))
        if (d_k, d_v) in routes.HOPPER:
            cache = pick(["f16", "f16", "bf16", "q8_0"])
    if route in ("tiles", "hopper"):
        n_q = pick([1, 16, 33, 64, 65, 130, 257])
    case = Attention(route, d_k, d_v, n_q, n_kv, heads_kv * ratio, heads_kv, pick([1, 1, 2]), cache)
    case.inside = inside
    masks = ["", "pos", "pos", "window", "random", "dead", "alibi"]
    case.mask = pick(masks[:-1] if route == "list_token" else masks)
    case.m2, case.m3 = 1 if n_ids else pick([1, case.heads]), pick([1, case.n3])
    case.n_ids = n_ids
    case.sinks = dice.random() < 0.25
    case.kv_len = -1 if dice.random() < 0.6 else pick([0, n_kv // 2, n_kv, n_kv + 9])
    case.attrs = {"lse": dice.random() < 0.4}
    if dice.random() < 0.2 and route != "list_token":
        case.attrs["logit_softcap"] = 10.0
    if dice.random() < 0.2:
        case.attrs["scale"] = -0.05
    if case.kv_len >= 0 and dice.random() < 0.3:
        case.attrs["kv0"] = 5
    if route == "any":
        case.attrs["prec"] = "f32"
    return case


#: Random cases of each route.
COUNTS = {
    "any": 30,
    "split": 50,
    "latent": 80,
    "latent_hopper": 40,
    "list_hopper": 50,
    "list_token": 40,
    "tiles": 50,
    "hopper": 60,
}
#: Simple cases of each kernel. They run first, because they are the easiest to debug.
PLAIN = [
    *(
        Attention("any", 64, 64, 3, 31, 2, 2, dtype=cache, attrs={"prec": "f32"})
        for cache in ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")
    ),
    *(Attention("split", *pair, 1, 300, 4, 4) for pair in routes.PAIRS),
    *(Attention("tiles", *pair, 200, 300, 2, 2) for pair in routes.PAIRS),
    *(Attention("hopper", *pair, 256, 512, 2, 2) for pair in routes.HOPPER),
    Attention("latent", 576, 512, 1, 4096, 16, 1, inside=0),
    Attention("latent", 576, 512, 1, 4096, 128, 1, inside=0),
    Attention("latent_hopper", 576, 512, 1, 4096, 128, 1, inside=0),
    Attention("latent_hopper", 576, 512, 1, 4096, 16, 1, inside=64),
    Attention("latent_hopper", 576, 512, 300, 1100, 16, 1, mask="pos", inside=64),  # in pairs
    Attention("latent_hopper", 512, 512, 300, 1030, 16, 1, dtype="bf16", inside=0),
    Attention("latent", 512, 512, 1, 4096, 16, 1, inside=0),
    Attention("latent_hopper", 512, 512, 1, 4096, 64, 1, inside=0),
    *(
        Attention(route, *pair, 2, 700, heads, 1, dtype=cache, inside=0, n_ids=n_ids)
        for pair in routes.LATENT
        for route in ("latent", "list_hopper")
        for cache in ("f16", "q8_0")
        for heads in (1, 16, 64, 128)
        for n_ids in (1, 64, 555)
    ),
]
PLAIN += [
    Attention("list_token", *pair, n_q, 700, heads, 1, inside=0, n_ids=n_ids)
    for pair in routes.LATENT
    for n_q, heads in ((1, 128), (2, 150), (1, 16))
    for n_ids in (1, 64, 555)
]
LONG = [
    Attention("", 192, 128, 2048, 2048, 16, 16, mask="pos"),
    Attention("", 192, 128, 512, 16384, 16, 16, mask="pos"),
    Attention("", 192, 128, 1, 16384, 16, 16),
    Attention("", 576, 512, 1, 16384, 128, 1, inside=0),
    Attention("", 576, 512, 300, 4096, 16, 1, mask="pos", inside=0),
    Attention("", 128, 128, 100, 8000, 32, 8, mask="random"),
    Attention("", 192, 128, 200, 3000, 4, 4, dtype="q8_0", mask="pos"),
    Attention("", 576, 512, 1, 16384, 128, 1, inside=0, n_ids=2048),
    Attention("", 576, 512, 70, 8192, 128, 1, mask="pos", inside=0, n_ids=512),
    Attention("", 512, 512, 130, 4096, 64, 1, mask="random", inside=0, n_ids=512, sinks=True),
    Attention("", 576, 512, 40, 4096, 128, 1, dtype="q8_0", mask="pos", inside=0, n_ids=512),
]


def attentions() -> list[Attention]:
    """All cases, the plain ones first."""
    random_cases: list[Attention] = []
    for route, count in COUNTS.items():
        dice = random.Random(route)
        random_cases += [random_case(route, dice) for _ in range(count)]
    return [*PLAIN, *random_cases, *LONG]

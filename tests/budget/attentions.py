"""Small attentions of every kind, with values for their leaves.

Tensors that the budget must count have the label "counted": the tracer knows nothing else of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import pyggml as gg
from pyggml.node import Node

Values = dict[str, np.ndarray[Any, Any]]


def counted(node: Node) -> Node:
    return gg.label(node, "counted")


@dataclass
class Leaves:
    """Leaves and their values. `prefix` makes their names unique to a layer."""

    seed: int = 0
    prefix: str = ""
    inputs: Values = field(default_factory=dict)
    states: Values = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def normal(self, ne: tuple[int, ...]) -> np.ndarray[Any, Any]:
        return self.rng.standard_normal(ne[::-1]).astype(np.float32)

    def input(
        self, label: str, *ne: int, dtype: str = "f32", values: np.ndarray[Any, Any] | None = None
    ) -> Node:
        label = self.prefix + label
        self.inputs[label] = self.normal(ne) if values is None else values
        return gg.input(label, dtype, ne=ne)

    def state(
        self, label: str, *ne: int, dtype: str = "f32", values: np.ndarray[Any, Any] | None = None
    ) -> Node:
        label = self.prefix + label
        self.states[label] = self.normal(ne) if values is None else values
        return gg.state(label, dtype, ne=ne)

    def mask(self, *ne: int, type: str = "f16") -> Node:
        """Distances, and hidden keys at random; the first row sees no key."""
        values = -self.rng.integers(0, 9, ne[::-1]).astype(np.float32)
        values[self.rng.random(values.shape) < 0.4] = -np.inf
        values[..., 0, :] = -np.inf
        return self.input("mask", *ne, dtype=type, values=values)


@dataclass(frozen=True)
class Scores:
    """An attention that stores its scores.

    ratio   heads of q per head of k;  streams  ne3;  stream_ratio  streams per stream of k and v
    mask    (m2, m3), or None;  mask_type  f16 or f32;  spare  rows of the mask past n_q
    form    the ops between the product and the softmax, and after it
    key, value  the sources of K and V
    """

    heads: int = 4
    ratio: int = 1
    n_q: int = 5
    n_kv: int = 31
    streams: int = 1
    mask: tuple[int, int] | None = None
    mask_type: str = "f16"
    spare: int = 0
    sinks: bool = False
    max_bias: float = 0.0
    form: str = "plain"
    key: str = "f32"
    value: str = "input"
    stream_ratio: int = 1

    def build(self, at: Leaves) -> Node:
        d = 32 if self.key == "q8_0" else 8
        q = at.input("q", d, self.n_q, self.heads, self.streams)
        k = self._key(at, d)
        mask = sinks = None
        if self.mask is not None:
            rows = self.n_q + self.spare
            mask = at.mask(self.n_kv, rows, *self.mask, type=self.mask_type)
        if self.sinks:
            sinks = at.input("sinks", self.heads)
        scores, after = self._product(at, k, q)
        scale = 0.3 if self.form != "scale" else 1.0
        soft = counted(gg.soft_max_ext(scores, mask, sinks, scale=scale, max_bias=self.max_bias))
        return gg.label(gg.mul_mat(self._value(at), after(soft)), "out")

    def _product(self, at: Leaves, k: Node, q: Node) -> tuple[Node, Any]:
        same = lambda soft: soft  # noqa: E731
        sizes = (self.n_kv, self.n_q, self.heads, self.streams)
        if self.form == "decode":  # all heads are rows of one product
            turn = lambda x: gg.permute(x, axes=(0, 2, 1, 3))  # noqa: E731
            kq = counted(gg.mul_mat(k, turn(q)))
            return counted(gg.cont(turn(kq))), turn
        if self.form == "window":  # the product has more heads; the scores are a view of it
            more = at.input("more", *q.ne[:2], k.ne[2], self.streams)
            wide = gg.concat(gg.concat(more, q, dim=2), more, dim=2)
            kq = counted(gg.mul_mat(k, wide))
            return gg.view(kq, ne=sizes, start=(0, 0, more.ne[2])), same
        kq = counted(gg.mul_mat(k, q))
        if self.form == "scale":
            return counted(gg.scale(kq, s=0.3)), same
        if self.form == "add":
            bias = at.input("bias", self.n_kv, self.n_q, 1, 1)
            slow = at.input("slow", 1, 1, self.heads, 1)
            return counted(gg.add(counted(gg.add(kq, bias)), slow)), same
        if self.form == "cap":  # a cast to f16 would round, and show another order of sums
            capped = counted(gg.tanh(counted(gg.scale(kq, s=0.1))))
            return counted(gg.scale(capped, s=10.0)), lambda soft: counted(
                gg.cast(soft, dtype="f32")
            )
        return kq, lambda soft: counted(gg.cont(soft)) if self.form == "cont" else soft

    def _key(self, at: Leaves, d: int) -> Node:
        ne = (d, self.n_kv, self.heads // self.ratio, self.streams // self.stream_ratio)
        if self.key == "cast":
            return counted(gg.cast(at.state("k", *ne, dtype="f16"), dtype="f32"))
        return at.input("k", *ne) if self.key == "f32" else at.state("k", *ne, dtype=self.key)

    def _value(self, at: Leaves) -> Node:
        h, d = self.heads // self.ratio, 32 if self.value == "q8_0" else 6
        streams = self.streams // self.stream_ratio
        if self.value == "input":
            return at.input("v", self.n_kv, d, h, streams)
        if self.value == "rows":  # [d, heads, keys], as a cache stores it
            v = at.state("v", d, h, self.n_kv, streams, dtype="f16")
            return gg.permute(v, axes=(1, 2, 0, 3))
        v = at.state("v", d, self.n_kv, h, streams, dtype=self.value)
        if self.value == "q8_0":
            return gg.transpose(counted(gg.cast(v, dtype="f32")))
        return counted(gg.cont(gg.transpose(v)))


@dataclass(frozen=True)
class Latent:
    """Flash attention over keys and values expanded from a latent cache.

    ratio     heads of q per head of k
    exact     small whole numbers: no sum is rounded, so f16 results must be equal
    type      of the expanded K and V
    """

    heads: int = 4
    n_q: int = 5
    n_kv: int = 97
    cache: str = "f32"
    type: str = "f32"
    split: bool = False
    exact: bool = False
    sinks: bool = False
    mask: str = ""
    heads_mask: int = 1
    max_bias: float = 0.0
    kv_len: int = 0
    lse: bool = False
    nope: int = 16
    rope: int = 32
    d_v: int = 24
    rank: int = 32
    ratio: int = 1

    @property
    def heads_kv(self) -> int:
        return self.heads // self.ratio

    def build(self, at: Leaves) -> Node:
        cache = at.state(
            "cache", self.rank + self.rope, self.n_kv, dtype=self.cache, values=self._cached(at)
        )
        kn, v = self._expanded(at, gg.view(cache, ne=(self.rank, self.n_kv)))
        kr = gg.view(cache, ne=(self.rope, self.n_kv), start=(self.rank,))
        kr = counted(gg.repeat(self._cast(kr), ne=(self.rope, self.n_kv, self.heads_kv)))
        k = counted(gg.concat(kn, kr, dim=0))
        q = at.input("q", self.nope + self.rope, self.n_q, self.heads)
        mask = sinks = length = None
        if self.mask == "causal":
            pos = np.arange(self.n_kv - self.n_q, self.n_kv, dtype=np.int32)
            mask = gg.causal_mask(
                at.input("pos", self.n_q, dtype="i32", values=pos), n_kv=self.n_kv, window=50
            )
        elif self.mask:
            mask = at.mask(self.n_kv, self.n_q, self.heads_mask)
        if self.sinks:
            sinks = at.input("sinks", self.heads)
        if self.kv_len:
            length = at.input("len", 1, dtype="i32", values=np.array([self.kv_len], np.int32))
        out = gg.flash_attn_ext(
            q, k, v, mask, sinks, length, scale=0.05, max_bias=self.max_bias, lse=self.lse
        )
        return gg.label(out, "out")

    def _cast(self, x: Node) -> Node:
        return x if x.dtype.name == self.type else counted(gg.cast(x, dtype=self.type))

    def _cached(self, at: Leaves) -> np.ndarray[Any, Any]:
        ne = (self.rank + self.rope, self.n_kv)
        if not self.exact:
            return at.normal(ne)
        values = at.rng.integers(-8, 9, ne[::-1]).astype(np.float32)
        values[:, ::32] = 127  # q8_0 then keeps whole numbers
        return values

    def _weight(self, at: Leaves, label: str, rows: int) -> Node:
        if self.exact:
            values = at.rng.integers(-1, 2, (rows, self.rank)).astype(np.float32)
        else:
            values = at.normal((self.rank, rows)) * np.float32(0.2)
        return gg.constant(values, name=at.prefix + label)

    def _expanded(self, at: Leaves, latent: Node) -> tuple[Node, Node]:
        h, nope, d_v = self.heads_kv, self.nope, self.d_v
        heads_last = lambda x: gg.permute(x, axes=(0, 2, 1, 3))  # noqa: E731
        if self.split:
            parts = []
            for label, d in (("w_k", nope), ("w_v", d_v)):
                w = self._weight(at, label, d * h)
                wide = gg.mul_mat(gg.reshape(w, ne=(self.rank, d, h)), self._wide(latent))
                parts.append(self._cast(counted(wide)))
            return parts[0], parts[1]
        w = self._weight(at, "w", (nope + d_v) * h)
        kv = gg.reshape(counted(gg.mul_mat(w, self._wide(latent))), ne=(nope + d_v, h, self.n_kv))
        kn = gg.view(kv, ne=(nope, h, self.n_kv))
        v = gg.view(kv, ne=(d_v, h, self.n_kv), start=(nope,))
        return self._cast(heads_last(kn)), self._cast(heads_last(v))

    def _wide(self, latent: Node) -> Node:
        """The latent as f32, for every head where weights are split by head."""
        if self.cache != "f32":
            latent = counted(gg.cast(latent, dtype="f32"))
        if not self.split:
            return latent
        return counted(gg.repeat(latent, ne=(self.rank, self.n_kv, self.heads_kv)))


def run(plan: gg.Plan, at: Leaves) -> Mapping[str, np.ndarray[Any, Any]]:
    """The plan's outputs with the leaves' values."""
    plan.bind()
    for label, values in at.states.items():
        plan.store.write(label, values)
    return plan.run(**at.inputs)

"""Random layers of a model: attentions over caches, experts and feed-forward nets, as one graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

import pyggml as gg
from pyggml.node import Node

N_CTX = 32
BLOCK = 32


@dataclass(repr=False)
class Layers:
    """A graph under construction, and the values of its inputs.

    x  the hidden state, f32 [n_embd, T]
    """

    draw: Any
    rng: np.random.Generator
    n_tokens: int
    n_embd: int
    x: Node = field(init=False)
    outputs: dict[str, Node] = field(default_factory=dict)
    updates: list[Node] = field(default_factory=list)
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        t, past = self.n_tokens, self.draw(st.integers(0, N_CTX - self.n_tokens))
        self.x = self.input("x", (self.n_embd, t), self.rng.standard_normal((t, self.n_embd)))
        rows = np.arange(past, past + t)
        self.rows = self.input("rows", (t,), rows.astype("i4"), self.draw(st.sampled_from(INTS)))
        mask = np.where(np.arange(N_CTX)[None] <= rows[:, None], 0.0, -np.inf)
        self.mask = self.input("mask", (N_CTX, t), mask, "f16")
        self.pos = self.input("pos", (t,), rows, "i32")

    def __repr__(self) -> str:
        return str(gg.Graph(self.outputs, self.updates))

    @property
    def used(self) -> dict[str, np.ndarray]:
        """The values of the inputs that the graph has."""
        names = {n.attrs["name"] for n in gg.Graph(self.outputs, self.updates).nodes if n.op.leaf}
        return {name: values for name, values in self.inputs.items() if name in names}

    def input(self, name: str, ne: tuple[int, ...], values: Any, dtype: str = "f32") -> Node:
        node = gg.input(name, dtype, ne=ne)
        self.inputs[name] = np.asarray(values).astype(dtype.replace("f", "float", 1).replace(
            "i", "int", 1))  # fmt: skip
        return node

    def weight(self, what: str, *ne: int) -> Node:
        """A weight of a random type, if its rows are whole blocks."""
        self.count += 1
        dtype = self.draw(st.sampled_from(("f32", "f32", "f16", "q8_0")))
        if ne[0] % BLOCK or len(ne) == 1:
            dtype = "f32"
        values = self.rng.standard_normal(ne[::-1]).astype(np.float32) / ne[0] ** 0.5
        return gg.constant(values, dtype=dtype, name=f"{what}.{self.count}")

    def normed(self) -> Node:
        return gg.mul(gg.rms_norm(self.x, eps=1e-5), self.weight("norm", self.n_embd))

    def add(self, y: Node) -> None:
        self.x = gg.label(gg.add(self.x, y), f"l_out-{self.count}")

    # -- parts of layers -----------------------------------------------------------------------

    def state(self, what: str, *ne: int) -> Node:
        self.count += 1
        dtype = "q8_0" if ne[0] % BLOCK == 0 and self.draw(st.booleans()) else "f16"
        return gg.state(f"{what}.{self.count}", dtype, ne=ne)

    def written(self, state: Node, rows: Node) -> Node:
        handle = gg.set_rows(state, rows, self.rows)
        self.updates.append(handle)
        return handle

    def lists(self) -> Node | None:
        """The keys of each token, or None: all."""
        if self.draw(st.booleans()):
            return None
        n, t = self.draw(st.integers(1, N_CTX)), self.n_tokens
        chosen = np.array([self.rng.permutation(N_CTX)[:n] for _ in range(t)])
        chosen[:, 1::5] = -1
        return self.input(f"lists{len(self.inputs)}", (n, t), chosen, "i32")

    def attention(self) -> None:
        groups, d = self.draw(st.integers(1, 4)), self.draw(st.sampled_from((8, 32)))
        heads = groups * self.draw(st.integers(1, 4))
        h, t = self.normed(), self.n_tokens

        def split(what: str, n: int) -> Node:
            y = gg.reshape(gg.mul_mat(self.weight(what, self.n_embd, n * d), h), ne=(d, n, t))
            if what != "wv" and self.draw(st.booleans()):
                y = gg.rope(y, self.pos, n_dims=4)
            return gg.permute(y, axes=(0, 2, 1, 3))

        k = self.written(self.state("k", d, N_CTX, groups), split("wk", groups))
        v = self.written(self.state("v", d, N_CTX, groups), split("wv", groups))
        q = split("wq", heads)
        if self.draw(st.booleans()):
            sinks = self.weight("sinks", heads) if self.draw(st.booleans()) else None
            ids = self.lists()
            y = gg.flash_attn_ext(q, k, v, self.mask, sinks, ids=ids, scale=d**-0.5)
        else:
            kq = gg.soft_max_ext(gg.mul_mat(k, q), self.mask, scale=d**-0.5)
            y = gg.mul_mat(gg.transpose(gg.cast(v, dtype="f16")), kq)
            y = gg.cont(gg.permute(y, axes=(0, 2, 1, 3)))
        y = gg.reshape(y, ne=(heads * d, t))
        self.add(gg.mul_mat(self.weight("wo", heads * d, self.n_embd), y))

    def latent(self) -> None:
        """Attention over one latent row for all heads, which the queries absorb."""
        r, heads, d, t = 32, self.draw(st.integers(1, 6)), 16, self.n_tokens
        h = self.normed()
        row = gg.mul_mat(self.weight("wkv", self.n_embd, r), h)
        rows = self.written(self.state("kv", r, N_CTX), row)
        q = gg.reshape(gg.mul_mat(self.weight("wq", self.n_embd, heads * d), h), ne=(d, heads, t))
        q = gg.mul_mat(self.weight("wk_b", d, r, heads), gg.permute(q, axes=(0, 2, 1, 3)))
        y = gg.flash_attn_ext(q, rows, rows, self.mask, ids=self.lists(), scale=0.2)
        y = gg.mul_mat(self.weight("wv_b", r, d, heads), gg.permute(y, axes=(0, 2, 1, 3)))
        y = gg.reshape(gg.cont(gg.permute(y, axes=(0, 2, 1, 3))), ne=(heads * d, t))
        self.add(gg.mul_mat(self.weight("wo", heads * d, self.n_embd), y))

    def sparse(self) -> None:
        """Attention over the rows that an indexer chooses; many of its scores are equal."""
        r, heads, d, n_index, t = 32, 2, 32, 2, self.n_tokens

        def small(what: str, *ne: int) -> Node:
            values = self.rng.integers(-1, 2, ne[::-1])
            return self.input(f"{what}{len(self.inputs)}", ne, values)

        index = gg.state(f"index.{len(self.inputs)}", "f16", ne=(d, N_CTX))
        keys = self.written(index, small("index_k", d, t))
        q = small("index_q", d, n_index, t)
        scores = gg.lightning_indexer(q, keys, small("index_w", n_index, t), self.mask)
        ids = gg.top_k(scores, k=self.draw(st.integers(1, N_CTX)))
        self.outputs[f"ids{self.count}"] = ids
        rows = self.written(
            self.state("kv", r, N_CTX),
            gg.mul_mat(self.weight("wkv", self.n_embd, r), self.normed()),
        )
        q = gg.mul_mat(self.weight("wq", self.n_embd, heads * r), self.normed())
        q = gg.permute(gg.reshape(q, ne=(r, heads, t)), axes=(0, 2, 1, 3))
        y = gg.flash_attn_ext(q, rows, rows, self.mask, ids=ids, scale=0.2)
        y = gg.reshape(y, ne=(heads * r, t))
        self.add(gg.mul_mat(self.weight("wo", heads * r, self.n_embd), y))

    def merged(self) -> None:
        """Two attentions that are merged, as a window and what came before it."""
        d, heads, t = 16, 2, self.n_tokens
        q = gg.mul_mat(self.weight("wq", self.n_embd, heads * d), self.normed())
        q = gg.permute(gg.reshape(q, ne=(d, heads, t)), axes=(0, 2, 1, 3))
        parts = []
        for name in ("window", "past"):
            row = gg.mul_mat(self.weight(name, self.n_embd, d), self.normed())
            rows = self.written(self.state(name, d, N_CTX), row)
            sinks = self.weight("sinks", heads) if self.draw(st.booleans()) else None
            parts.append(gg.flash_attn_ext(q, rows, rows, self.mask, sinks, scale=0.2, lse=True))
        if self.draw(st.booleans()):
            self.outputs["partial"] = parts[0]
        y = gg.merge_lse(*parts)
        y = gg.reshape(gg.cont(gg.view(y, ne=(d, heads, t))), ne=(heads * d, t))
        self.add(gg.mul_mat(self.weight("wo", heads * d, self.n_embd), y))

    def feed_forward(self) -> None:
        n_ff, h = 32 * self.draw(st.integers(1, 8)), self.normed()
        up, gate = (self.weight(what, self.n_embd, n_ff) for what in ("up", "gate"))
        if self.draw(st.booleans()):
            y = gg.fused_up_gate(up, gate, h)
        else:
            y = gg.mul(gg.silu(gg.mul_mat(gate, h)), gg.mul_mat(up, h))
        self.add(gg.mul_mat(self.weight("down", n_ff, self.n_embd), y))

    def experts(self) -> None:
        n, n_ff, t, h = self.draw(st.integers(2, 9)), 32, self.n_tokens, self.normed()
        used = self.draw(st.integers(1, n))
        probs = gg.soft_max(gg.mul_mat(self.weight("router", self.n_embd, n), h))
        ids = gg.top_k(probs, k=used)
        weights = gg.get_rows(gg.reshape(probs, ne=(1, n, t)), ids)
        b = gg.reshape(h, ne=(self.n_embd, 1, t))
        up, gate = (self.weight(what, self.n_embd, n_ff, n) for what in ("up_exps", "gate_exps"))
        if self.draw(st.booleans()):
            y = gg.moe_up_gate(up, gate, b, ids)
        else:
            y = gg.mul(gg.silu(gg.mul_mat_id(gate, b, ids)), gg.mul_mat_id(up, b, ids))
        y = gg.mul_mat_id(self.weight("down_exps", n_ff, self.n_embd, n), y, ids)
        if self.draw(st.booleans()):
            y = gg.add_id(
                y, gg.constant(np.ones((n, self.n_embd), "f4"), name=f"b{self.count}"), ids
            )
        y = gg.mul_multi_add(y, weights)
        if self.draw(st.booleans()):  # a shared expert
            up = self.weight("up_shexp", self.n_embd, 64)
            shared = gg.relu(gg.mul_mat(up, h))
            y = gg.add(y, gg.mul_mat(self.weight("down_shexp", 64, self.n_embd), shared))
        self.add(y)

    def embedding(self) -> None:
        table = self.weight("embd", self.n_embd, 4 * self.n_embd + self.draw(st.integers(0, 9)))
        tokens = self.rng.integers(0, table.ne[1], self.n_tokens)
        ids = self.input(f"tokens{self.count}", (self.n_tokens,), tokens, "i32")
        self.add(gg.get_rows(table, ids))

    def head(self) -> None:
        n = 4 * self.n_embd + 32 * self.draw(st.integers(0, 3))
        self.outputs["logits"] = gg.mul_mat(self.weight("output", self.n_embd, n), self.normed())


INTS = ("i32", "i64")
PARTS = ("attention", "latent", "sparse", "merged", "feed_forward", "experts", "embedding")


@st.composite
def layers(draw: Any) -> Layers:
    """One to four parts of layers; outputs `y`, sometimes `logits` and one inside."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    result = Layers(draw, rng, draw(st.integers(1, 6)), draw(st.sampled_from((32, 64))))
    inside = []
    for part in draw(st.lists(st.sampled_from(PARTS), min_size=1, max_size=4)):
        getattr(result, part)()
        inside.append(result.x)
    if draw(st.booleans()):
        result.head()
    result.outputs["y"] = result.x
    if draw(st.booleans()):
        result.outputs["inside"] = draw(st.sampled_from(inside))
    return result


@st.composite
def cuts(draw: Any) -> tuple[dict[str, Any], int]:
    """Cuts, and the number of devices that they need."""
    n, stages = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    if n * stages == 1:
        n = 2
    names = draw(st.sets(st.sampled_from(("heads", "rows", "experts", "sequence")), min_size=1))
    shares: Any = n
    if draw(st.booleans()):
        shares = tuple(draw(st.integers(1, 4)) for _ in range(n))
    chosen = dict.fromkeys(sorted(names), shares) if n > 1 else {}
    if stages > 1:
        chosen["layers"] = stages
    return chosen, n * stages

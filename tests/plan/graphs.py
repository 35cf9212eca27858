"""Random graphs of small tensors, and a reference that computes one node at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

import pyggml as gg
from pyggml.errors import ShapeError
from pyggml.node import Node
from pyggml.ops.leaf import data_of, state_op
from pyggml.ops.rules import repeats_into

UNARY = (gg.relu, gg.tanh, gg.silu, gg.sigmoid, gg.gelu, gg.cont, gg.sum_rows, gg.soft_max)
BINARY = (gg.add, gg.sub, gg.mul)


class Grower:
    """Grows a graph. Later nodes may read `nodes`; `handles` are the newest of each state."""

    def __init__(self, draw: Any, states: bool) -> None:
        self.draw = draw
        self.handles: dict[str, Node] = {}
        self.updates: list[Node] = []
        self.old: list[Node] = []  # views of handles that were replaced: outputs only
        size = st.integers(1, 4)
        self.nodes: list[Node] = []
        for i in range(draw(st.integers(1, 3))):
            ne = (2 * draw(size), *draw(st.lists(size, max_size=3)))
            self.nodes.append(gg.input(f"x{i}", "f32", ne=ne))
        values = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
        self.nodes.append(gg.constant(values, name="c"))
        if states:
            self.handles["s"] = gg.state("s", "f32", ne=(4, 6))
            self.nodes.append(self.handles["s"])

    def pick(self) -> Node:
        return self.draw(st.sampled_from(self.nodes[-8:]))

    def step(self) -> None:
        kinds = ["unary", "binary", "view", "permute", "reshape", "concat", "repeat", "mul_mat"]
        kinds += ["scale", "rms_norm", "cast"] + (["set_rows", "cpy"] if self.handles else [])
        node = getattr(self, self.draw(st.sampled_from(kinds)))(self.pick())
        if node is not None and node.spec.elements <= 512:
            self.nodes.append(node)

    def unary(self, a: Node) -> Node:
        return self.draw(st.sampled_from(UNARY))(a)

    def scale(self, a: Node) -> Node:
        return gg.scale(a, s=0.5, b=0.25)

    def rms_norm(self, a: Node) -> Node:
        return gg.rms_norm(a, eps=0.1)

    def cast(self, a: Node) -> Node:
        return gg.cast(gg.cast(a, dtype="f16"), dtype="f32")

    def binary(self, a: Node) -> Node:
        fits = [b for b in self.nodes if repeats_into(b.ne, a.ne)]
        return self.draw(st.sampled_from(BINARY))(a, self.draw(st.sampled_from(fits)))

    def view(self, a: Node) -> Node:
        ne, start, step = [], [], []
        for size in a.ne:
            start.append(self.draw(st.integers(0, size - 1)))
            step.append(self.draw(st.integers(1, 2)))
            ne.append(self.draw(st.integers(1, 1 + (size - 1 - start[-1]) // step[-1])))
        return gg.view(a, ne=ne, start=start, step=step)

    def permute(self, a: Node) -> Node:
        return gg.permute(a, axes=self.draw(st.permutations(range(4))))

    def reshape(self, a: Node) -> Node:
        flat = [a.spec.elements // 2, 2] if a.spec.elements % 2 == 0 else [a.spec.elements]
        try:
            return gg.reshape(a, ne=flat)
        except ShapeError:
            return gg.reshape(gg.cont(a), ne=flat)

    def concat(self, a: Node) -> Node | None:
        dim = self.draw(st.integers(0, 3))
        others = [b for b in self.nodes if all(a.ne[i] == b.ne[i] for i in range(4) if i != dim)]
        others = [b for b in others if b.dtype == a.dtype]
        return gg.concat(a, self.draw(st.sampled_from(others)), dim=dim)

    def repeat(self, a: Node) -> Node:
        by = [self.draw(st.integers(1, 2)) for _ in range(4)]
        return gg.repeat(a, ne=tuple(n * k for n, k in zip(a.ne, by)))

    def mul_mat(self, a: Node) -> Node | None:
        fits = [
            b
            for b in self.nodes
            if a.ne[0] == b.ne[0] and b.ne[2] % a.ne[2] == 0 and b.ne[3] % a.ne[3] == 0
        ]
        return gg.mul_mat(a, self.draw(st.sampled_from(fits)))

    def set_rows(self, a: Node) -> Node:
        """Two rows of four values into the newest handle."""
        b = gg.repeat(gg.view(a, ne=(1,)), ne=(4, 2))
        ids = gg.constant(np.array([5, self.draw(st.integers(0, 4))], np.int32))
        return self._written(gg.set_rows(self.handles["s"], b, ids))

    def cpy(self, a: Node) -> Node:
        """One value into a part of the newest handle. Later reads see the whole state."""
        rows = self.draw(st.integers(1, 3))
        part = gg.view(self.handles["s"], ne=(3, rows), start=(1, self.draw(st.integers(0, 3))))
        b = gg.repeat(gg.view(a, ne=(1,)), ne=(3, rows))
        return self._written(gg.state_of(gg.cpy(b, part)))

    def _written(self, handle: Node) -> Node:
        self.handles["s"] = handle
        self.old += [n for n in self.nodes if n.root.op is state_op]
        self.nodes = [n for n in self.nodes if n.root.op is not state_op]
        write = handle if handle.op.writes is not None else handle.src[0]
        assert write is not None
        self.updates.append(write)
        return handle


@st.composite
def graphs(draw: Any, states: bool = False, most: int = 25) -> tuple[dict[str, Node], list[Node]]:
    """Outputs and updates of a random graph."""
    grower = Grower(draw, states)
    for _ in range(draw(st.integers(1, most))):
        grower.step()
    candidates = grower.nodes + grower.old
    chosen = draw(st.lists(st.sampled_from(candidates), min_size=1, max_size=4))
    chosen.append(grower.nodes[-1])
    return {f"y{i}": node for i, node in enumerate(chosen)}, grower.updates


def inputs_of(nodes: Any, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        n.attrs["name"]: rng.uniform(-1, 1, n.shape).astype(np.float32)
        for n in nodes
        if n.op.name == "input"
    }


class Reference:
    """The values of nodes, each from a plan of that node alone, and the contents of states."""

    def __init__(self, inputs: dict[str, np.ndarray]) -> None:
        self.inputs = inputs
        self.known: dict[Node, np.ndarray] = {}
        self.contents: dict[Node, np.ndarray] = {}  # state or write -> the whole state after it

    def value(self, node: Node) -> np.ndarray:
        """Four-dimensional, NumPy shape."""
        if node not in self.known:
            self.known[node] = self._compute(node).reshape(node.ne[::-1])
        return self.known[node]

    def _compute(self, node: Node) -> np.ndarray:
        if node.op.name == "input":
            return self.inputs[node.attrs["name"]]
        if node.op.name == "constant":
            return data_of(node)
        if node.root.op is state_op:
            return self.content(node).reshape(-1)[self._places(node)]
        alone = node.op.make(
            tuple(None if s is None else self._alone(s) for s in node.src),
            dict(node.attrs),
            node.spec,
        )
        return gg.compile({"y": alone}).run({})["y"]

    def _alone(self, node: Node) -> Node:
        value = self.value(node)
        return gg.constant(value.reshape(node.shape))

    def content(self, node: Node) -> np.ndarray:
        """The whole state as `node` sees it."""
        if node.op is state_op:
            return np.zeros(node.ne[::-1], np.float32)
        if node.op.writes is None:
            source = node.src[0]
            assert source is not None
            return self.content(source)
        if node not in self.contents:
            target = node.src[node.op.writes]
            assert target is not None
            after = self.content(target).copy()
            flat, places = after.reshape(-1), self._places(target)
            if node.op.name == "cpy":
                assert node.src[0] is not None
                flat[places] = self.value(node.src[0]).reshape(places.shape)
            else:
                assert node.src[1] is not None and node.src[2] is not None
                rows = self.value(node.src[2]).reshape(-1)
                flat[places[0, 0, rows]] = self.value(node.src[1])[0, 0]
            self.contents[node] = after
        return self.contents[node]

    def _places(self, node: Node) -> np.ndarray:
        """The elements of its state that `node` shows."""
        if node.op is state_op:
            return np.arange(node.spec.elements).reshape(node.ne[::-1])
        if node.op.name == "state_of":
            return self._places(node.root)
        source = node.src[node.op.writes or 0]
        assert source is not None
        seen = self._places(source)
        if node.op.writes is not None:
            return seen
        if node.op.name == "view":
            for axis, (n, first, by) in enumerate(
                zip(node.ne, node.attrs["start"], node.attrs["step"])
            ):
                seen = np.take(seen, first + by * np.arange(n), axis=3 - axis)
            return seen
        if node.op.name == "permute":
            axes = list(node.attrs["axes"])
            return seen.transpose([3 - axes.index(dim) for dim in (3, 2, 1, 0)])
        return seen.reshape(node.ne[::-1])


# -- greedy decoding with token and position as states ------------------------------------------

VOCABULARY, WIDTH, STEPS = 50, 16, 40


def _model() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(11)
    embd = rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
    return embd, rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)


def greedy() -> dict[str, gg.Node]:
    """One step of decoding, with the token, its position and the ids in states."""
    embd, head = _model()
    token, pos = (gg.state(name, "i32", ne=(1,)) for name in ("token", "pos"))
    ids = gg.label(gg.state("ids", "i32", ne=(1, STEPS)), "state ids")
    row = gg.get_rows(gg.constant(embd, name="embd"), token)
    turned = gg.rope_ext(gg.reshape(row, ne=(WIDTH, 1, 1)), pos, n_dims=WIDTH)
    logits = gg.mul_mat(gg.constant(head, name="head"), gg.reshape(turned, ne=(WIDTH, 1)))
    best = gg.argmax(logits)
    one = gg.constant(np.ones(1, np.int32), name="one")
    kept = gg.set_rows(ids, gg.reshape(best, ne=(1, 1)), pos)
    return {"token": gg.cpy(best, token), "pos": gg.cpy(gg.add(pos, one), pos), "ids": kept}


def greedy_ids(token: int, steps: int) -> list[int]:
    """The tokens that follow, in float64."""
    embd, head = _model()
    tokens = []
    for pos in range(steps):
        pairs = embd[token].astype(np.float64).reshape(-1, 2)
        angle = pos * 10000.0 ** (-np.arange(WIDTH // 2) * 2 / WIDTH)
        cos, sin = np.cos(angle), np.sin(angle)
        turned = np.stack(
            [pairs[:, 0] * cos - pairs[:, 1] * sin, pairs[:, 0] * sin + pairs[:, 1] * cos], axis=1
        )
        token = int(np.argmax(head.astype(np.float64) @ turned.reshape(-1)))
        tokens.append(token)
    return tokens

"""Random graphs as text: ops and views over inputs, weights and states, and the plans of them."""

from __future__ import annotations

from contextlib import suppress
from random import Random
from typing import Any

from pyggml.errors import PyggmlError
from pyggml.graph import toposort
from pyggml.node import Node
from pyggml.ops.rules import repeats_into
from pyggml.parity.case import Source
from pyggml.parity.fuzz_blocks import BLOCKS
from pyggml.parity.fuzz_draw import Draw
from pyggml.parity.graph_case import Builder, GraphCase, PlanText, Statement, graph_of
from pyggml.passes.order import state_edges

#: Elements of the largest tensor that single ops make.
MOST = 4096


class Refused(Exception):
    """An op whose rule does not take these sources."""


class Grower:
    """A graph under construction.

    results  tensors that later ops may read;  handles  of each state the newest handle
    """

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.builder = Builder()
        self.results: list[str] = []
        self.handles: dict[str, str] = {}
        self.writes: list[str] = []

    def node(self, name: str) -> Node:
        return self.builder.nodes[name]

    def _add(self, prefix: str, op: str, *args: str | None, **attrs: Any) -> str:
        name = f"{prefix}{len(self.builder.statements)}"
        while args and args[-1] is None:
            args = args[:-1]
        try:
            self.builder.add(Statement(name, op, args, attrs))
        except PyggmlError:
            raise Refused from None
        return name

    def op(self, op: str, *args: str | None, **attrs: Any) -> str:
        return self._add("n", op, *args, **attrs)

    def _leaf(self, prefix: str, op: str, source: Source) -> str:
        name = f"{prefix}{len(self.builder.statements)}"
        self.builder.add(Statement(name, op, source=source))
        return name

    # -- leaves -----------------------------------------------------------------------------

    def leaf(self, type: str, ne: tuple[int, ...], fill: str = "") -> str:
        """An input, now and then one that lies strided."""
        layout = self.draw.pick(("", "", "", "wide", "inner")) if type == "f32" else ""
        return self._leaf("x", "", Source(type, ne, fill, False, layout))

    def ids(self, ne: tuple[int, ...], below: int) -> str:
        return self._leaf("i", "", Source("i32", ne, f"<{below}"))

    def weight(self, ne: tuple[int, ...], type: str = "f32") -> str:
        return self._leaf("w", "", Source(type, ne, "", True))

    def state(self, type: str, ne: tuple[int, ...], share: float = 0.3) -> str:
        """A new state, or (by that share) one that is there and fits."""
        spec = (type, (*ne, 1, 1, 1)[:4])
        alike = [s for s in self.handles if (self.node(s).dtype.name, self.node(s).ne) == spec]
        if alike and self.draw.chance(share):
            return self.draw.pick(alike)
        name = self._leaf("s", "state", Source(type, ne))
        self.handles[name] = name
        return name

    def handle(self, state: str) -> str:
        """The newest handle of a state, seldom the one before all writes."""
        return state if self.draw.chance(0.1) else self.handles[state]

    def wrote(self, state: str, write: str, handle: str | None = None) -> str:
        self.handles[state] = handle or write
        self.writes.append(write)
        return self.handles[state]

    def write_rows(self, state: str) -> str:
        """Some rows of a two-dimensional state, from an input."""
        n, rows, *_ = self.node(state).ne
        count = self.draw.rng.randint(1, min(rows, 9))
        ids = self._leaf("i", "", Source("i32", (count,), f"!{rows}"))
        value = self.leaf("f32", (n, count))
        return self.wrote(state, self.op("set_rows", self.handles[state], value, ids))

    # -- single ops -------------------------------------------------------------------------

    def step(self) -> None:
        """One more op on something that is there."""
        a = self.draw.pick(self.results[-8:])
        kinds = ("unary", "unary", "binary", "view", "permute", "reshape", "concat", "repeat",
                 "product", "scale", "norm", "cast", "rows", "write", "write", "part")  # fmt: skip
        name = getattr(self, f"_{self.draw.pick(kinds)}")(a)
        if name is not None and self.node(name).spec.elements <= MOST:
            self.results.append(name)

    def as_f32(self, a: str) -> str:
        return a if self.node(a).dtype.name == "f32" else self.op("cast", a, dtype="f32")

    def _unary(self, a: str) -> str:
        kinds = ("relu", "tanh", "silu", "sigmoid", "gelu", "cont", "sum_rows", "soft_max_ext")
        return self.op(self.draw.pick(kinds), self.as_f32(a))

    def _scale(self, a: str) -> str:
        return self.op("scale", self.as_f32(a), s=0.5, b=0.25)

    def _norm(self, a: str) -> str:
        return self.op("rms_norm", self.as_f32(a), eps=0.1)

    def _cast(self, a: str) -> str:
        narrow = self.op("cast", a, dtype=self.draw.pick(("f16", "bf16")))
        return self.op("cast", narrow, dtype="f32")

    def _binary(self, a: str) -> str:
        a = self.as_f32(a)
        fits = [b for b in self.results if repeats_into(self.node(b).ne, self.node(a).ne)]
        fits = [b for b in fits if self.node(b).dtype.name == "f32"]
        return self.op(self.draw.pick(("add", "sub", "mul")), a, self.draw.pick(fits or [a]))

    def _view(self, a: str) -> str:
        rng = self.draw.rng
        ne, start, step = [], [], []
        for size in self.node(a).ne:
            start.append(rng.randrange(size))
            step.append(self.draw.pick((1, 1, 2)))
            ne.append(rng.randint(1, 1 + (size - 1 - start[-1]) // step[-1]))
        return self.op("view", a, ne=tuple(ne), start=tuple(start), step=tuple(step))

    def _permute(self, a: str) -> str:
        axes = [0, 1, 2, 3]
        self.draw.rng.shuffle(axes)
        return self.op("permute", a, axes=tuple(axes))

    def _reshape(self, a: str) -> str:
        n = self.node(a).spec.elements
        first = self.draw.divisor(n)
        a = a if self.node(a).contiguous else self.op("cont", a)
        return self.op("reshape", a, ne=(first, n // first))

    def _concat(self, a: str) -> str:
        dim, mine = self.draw.rng.randrange(4), self.node(a)
        fits = [
            b
            for b in self.results
            if self.node(b).dtype == mine.dtype
            and all(self.node(b).ne[i] == mine.ne[i] for i in range(4) if i != dim)
        ]
        return self.op("concat", a, self.draw.pick(fits), dim=dim)

    def _repeat(self, a: str) -> str:
        return self.op(
            "repeat", a, ne=tuple(n * self.draw.pick((1, 1, 2)) for n in self.node(a).ne)
        )

    def _product(self, a: str) -> str:
        a, k = self.as_f32(a), self.node(a).ne[0]
        kind = "q8_0" if k % 32 == 0 and self.draw.chance(0.3) else self.draw.pick(("f32", "f16"))
        return self.op("mul_mat", self.weight((k, self.draw.size(20)), kind), a)

    def _rows(self, a: str) -> str:
        ne = self.node(a).ne
        return self.op("get_rows", a, self.ids((self.draw.size(7), *ne[2:]), ne[1]))

    def _write(self, a: str) -> str | None:
        """All of a row, from what was computed, into the newest handle."""
        a = self.as_f32(a)
        n = self.node(a).ne[0]
        kind = self.draw.pick(("f32", "f16"))
        state = self.state(kind, (n, 6), share=0.7)
        row = self.op("view", a, ne=(n, 1, 1, 1), start=(0, 0, 0, 0), step=(1, 1, 1, 1))
        ids = self._leaf("i", "", Source("i32", (1,), "!6"))
        return self.wrote(state, self.op("set_rows", self.handles[state], row, ids))

    def _part(self, a: str) -> str | None:
        """One value into a part of a state; what is read later is the whole."""
        states = [s for s in self.handles if self.node(s).dtype.name in ("f32", "f16")]
        if not states:
            return None
        state = self.draw.pick(states)
        part = self._view(self.handles[state])
        zero = (0, 0, 0, 0)
        first = self.op("view", self.as_f32(a), ne=(1, 1, 1, 1), start=zero, step=(1, 1, 1, 1))
        write = self.op("cpy", self.op("repeat", first, ne=self.node(part).ne), part)
        return self.wrote(state, write, self.op("state_of", write))


def random_graph(seed: int, number: int, backend: str) -> GraphCase:
    """The graph of that number in the sequence of a seed, for a backend."""
    draw = Draw(Random(f"{seed}:graph:{number}"))
    while True:
        case = _planned(_grown(draw), draw, backend)
        if case is not None:
            return case


def _grown(draw: Draw) -> Grower:
    g = Grower(draw)
    g.results.append(g.leaf("f32", (2 * draw.size(9), draw.size(5))))
    blocks, weights = [block for block, _ in BLOCKS], [weight for _, weight in BLOCKS]
    for _ in range(draw.pick((0, 1, 1, 2, 2, 3))):
        _try(lambda: g.results.append(draw.rng.choices(blocks, weights)[0](g)))
    for _ in range(draw.pick((0, 2, 4, 8, 16))):
        _try(g.step)
    if draw.chance(0.02):
        of = draw.pick(("add", "scale", "view", "relu"))
        last = g.results[-1]
        _try(
            lambda: g.results.append(
                g.op("chain", g.as_f32(last), times=draw.pick((50, 1200)), of=of)
            )
        )
    return g


def _try(grow: Any) -> None:
    with suppress(Refused):
        grow()


def _planned(g: Grower, draw: Draw, backend: str) -> GraphCase | None:
    """The graph with one to three plans; None where no plan of it can be."""
    places = draw.pick(_places(backend))
    shared: dict[str, Any] = {"on": ",".join(places)} if places != (backend,) else {}
    if len(places) > 1:
        free = [
            s for s in g.builder.statements if not s.source and g.node(s.name).op.writes is None
        ]
        labels = [s.name for s in free]
        pinned = draw.rng.sample(labels, min(len(labels), draw.pick((0, 1, 3))))
        if pinned:
            shared["pins"] = ",".join(f"{name}={draw.pick(places)}" for name in pinned)
    plans = []
    attention = any(s.op in ("soft_max_ext", "flash_attn_ext") for s in g.builder.statements)
    for _ in range(draw.pick((1, 1, 1, 2, 3))):
        plan = _plan(g, draw, shared, attention, len(places) == 1 and places[0] == "numpy")
        graph = graph_of(g.builder, plan)
        try:
            toposort(graph.roots, state_edges(graph.nodes))
        except PyggmlError:
            continue
        plans.append(plan)
    if not plans:
        return None
    return GraphCase(tuple(g.builder.statements), tuple(plans)).needed()


def _plan(g: Grower, draw: Draw, shared: dict[str, Any], attention: bool, host: bool) -> PlanText:
    outputs = {
        g.results[-1],
        *draw.rng.sample(g.results, draw.rng.randrange(min(3, len(g.results)))),
    }
    attrs = dict(shared)
    updates = [w for w in set(g.handles.values()) if g.node(w).op.writes is not None]
    updates = sorted(w for w in updates if draw.chance(0.6))
    if updates:
        attrs["updates"] = ",".join(updates)
    if attention and draw.chance(0.6):
        attrs["amb"] = draw.pick((0.0, 0.02, 0.3, 0.9))
    if draw.chance(0.3):
        attrs["repeat"] = draw.pick((2, 3))
    inputs = [n for n in g.builder.inputs if g.node(n).op.leaf]
    if host and inputs and draw.chance(0.3):
        attrs["bind"] = draw.pick(inputs)
    return PlanText(tuple(sorted(outputs)), attrs)


def _places(backend: str) -> tuple[tuple[str, ...], ...]:
    """Where a graph may run."""
    if backend == "numpy":
        return (("numpy",), ("numpy",), ("numpy",), ("null:0", "numpy"))
    here, there = f"{backend}:0", "null:1" if backend == "null" else "null:0"
    return ((backend,), (backend,), (here, "numpy"), (here, there), (here, there, "numpy"))

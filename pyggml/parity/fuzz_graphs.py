"""Random graphs as text: ops and views over inputs, weights and states, and plans of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

from pyggml.errors import PyggmlError
from pyggml.graph import toposort
from pyggml.parity.fuzz_draw import Draw
from pyggml.parity.fuzz_grower import Grower, Refused
from pyggml.parity.fuzz_parts import PARTS
from pyggml.parity.graph_case import GraphCase, PlanText, graph_of
from pyggml.passes.order import state_edges


def random_graph(seed: int, number: int, backend: str) -> GraphCase:
    """Graph `number` of a seed's sequence, for a backend."""
    draw = Draw(Random(f"{seed}:graph:{number}"))
    while True:
        case = _with_plans(_grow(draw), draw, backend)
        if case is not None:
            return case


def _grow(draw: Draw) -> Grower:
    g = Grower(draw)
    g.results.append(g.leaf("f32", (2 * draw.size(9), draw.size(5))))
    parts, weights = zip(*PARTS)
    for _ in range(draw.pick((0, 1, 1, 2, 2, 3))):
        _try(lambda: g.results.append(draw.rng.choices(parts, weights)[0](g)))
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


def _try(grow: Callable[[], None]) -> None:
    with suppress(Refused):
        grow()


def _with_plans(g: Grower, draw: Draw, backend: str) -> GraphCase | None:
    """The graph with one to three plans; None if none of them can be compiled."""
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
    return GraphCase(tuple(g.builder.statements), tuple(plans)).pruned()


def _plan(g: Grower, draw: Draw, shared: dict[str, Any], attention: bool, host: bool) -> PlanText:
    outputs = {
        g.results[-1],
        *draw.rng.sample(g.results, draw.rng.randrange(min(3, len(g.results)))),
    }
    attrs = dict(shared)
    updates = [w for w in sorted(set(g.handles.values())) if g.node(w).op.writes is not None]
    updates = [w for w in updates if draw.chance(0.6)]
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
    """The sets of places that a graph for this backend may run on."""
    if backend == "numpy":
        return (("numpy",), ("numpy",), ("numpy",), ("null:0", "numpy"))
    here, there = f"{backend}:0", "null:1" if backend == "null" else "null:0"
    return ((backend,), (backend,), (here, "numpy"), (here, there), (here, there, "numpy"))

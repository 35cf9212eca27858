"""Run the plans of a graph, compare with float64 values, and check what budgets promise."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pyggml.graph import toposort
from pyggml.node import Node
from pyggml.parity import tolerance
from pyggml.parity.check import numeric_class
from pyggml.parity.graph_budget import Compiler
from pyggml.parity.graph_case import Builder, GraphCase, PlanText, built, graph_of
from pyggml.parity.graph_values import reached, runs
from pyggml.parity.values import Array, decoded
from pyggml.passes.order import state_edges
from pyggml.runtime import places
from pyggml.runtime.plan import Plan
from pyggml.runtime.store import Store

#: How many times the plans of a graph run, one after another.
ROUNDS = 2
#: How many times further from the float64 result a plan's may be than noise of the kernels' size
#: moves it. The factor is for the relative error, so it is squared in an NMSE.
GAIN = 4.0
#: A result that the noise moves further than this (NMSE) is not compared: GAIN^2 of it would let
#: an error of a tenth pass.
CHAOS = 1e-3


def valid(case: GraphCase) -> Builder:
    """The graph's nodes; a PyggmlError if its statements and plans form no valid graph."""
    builder = built(case)
    for plan in case.plans:
        graph = graph_of(builder, plan)
        toposort(graph.roots, state_edges(graph.nodes))
    return builder


def check_graph(case: GraphCase, backend: str) -> str:
    """The first fault of a graph's plans; empty if there is none.

    Errors: those of `valid`; UnsupportedOpError if a place has no kernel for a node.
    """
    builder = valid(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return next(_faults(case, builder, backend), "")


def _faults(case: GraphCase, builder: Builder, backend: str) -> Iterator[str]:
    store = Store()
    plans = []
    for number, text in enumerate(case.plans):
        compiler = Compiler(builder, text, backend, store)
        yield from (f"plan {number}: {fault}" for fault in compiler.promises())
        plans.append(compiler.plan())
    noises = [_noise(builder, *pair, backend) for pair in zip(case.plans, plans)]
    for plan in plans:
        plan.bind()
    states: dict[str, Array] = {}
    for name, array in builder.states.items():
        states[name] = builder.values[name]
        if name in store.homes:
            store.write(name, array)
    arrays = dict(builder.inputs)
    for turn in range(ROUNDS):
        for number, (text, plan) in enumerate(zip(case.plans, plans)):
            inputs = {k: a for k, a in arrays.items() if k in plan.inputs}
            if turn == 0:
                plan.bind({k: inputs[k] for k in text.words("bind") if k in inputs})
            inputs = {k: a for k, a in inputs.items() if k not in text.words("bind")}
            outputs = plan.repeat(int(text.attrs.get("repeat", 1)), inputs)
            judge = Judge(builder, text, states, noises[number])
            where = f"plan {number}, round {turn}"
            yield from (f"{where}, {fault}" for fault in judge.outputs(outputs))
            yield from (f"{where}, {fault}" for fault in judge.states(store))
            states = judge.after


def _noise(builder: Builder, text: PlanText, plan: Plan, backend: str) -> dict[str, float]:
    """Op name -> relative error of the widest class that a place of the plan declares for the op.

    Nodes of the compiled plan count too: a slice of a product may have a wider class than the
    whole. An op that passes replaced gets the widest class of all.
    """
    devices = [places.parse(p).backend for p in text.words("on") or (backend,)]
    errors: dict[str, float] = {}
    compiled = [n for n in plan.graph.nodes if not n.op.leaf and n.op.view is None]
    for node in (*(builder.nodes[name] for name in reached(builder, text)), *compiled):
        if not node.op.leaf and node.op.view is None:
            # A transfer, or an op private to another backend, has no kernel on some device.
            able = [device for device in devices if device.supports(node) is None]
            bounds = [tolerance.CLASSES[numeric_class(device, node)] for device in able]
            bound = max([tolerance.CLASSES["f32"], *bounds])
            errors[node.op.name] = max(errors.get(node.op.name, 0.0), float(bound**0.5))
    widest, present = max(errors.values(), default=0.0), {n.op.name for n in compiled}
    return {name: error if name in present else widest for name, error in errors.items()}


# -- judging ----------------------------------------------------------------------------------


class Judge:
    """The float64 values of one run of a plan, and how far noise moves them.

    after  states after the run
    """

    def __init__(
        self,
        builder: Builder,
        text: PlanText,
        states: Mapping[str, Array],
        noise: Mapping[str, float],
    ) -> None:
        self.roots = {n.attrs["name"]: n for n in _leaves(builder)}
        self.want, self.after = runs(builder, text, states, {}, 0)
        self.moved = [runs(builder, text, states, noise, seed) for seed in (1, 100, 200)]

    def outputs(self, got: Mapping[str, Any]) -> Iterator[str]:
        for key, want in self.want.items():
            moved = [outputs[key] for outputs, _ in self.moved]
            array = np.asarray(got[key])
            yield from _compare(f"output {key}", array.reshape(want.shape), want, moved)

    def states(self, store: Store) -> Iterator[str]:
        """Compare states, then go on from those in the store, so that rounding does not add up."""
        for name, want in self.after.items():
            if name not in store.homes:
                continue
            raw = store.read(name, raw=True)
            got = decoded(self.roots[name].dtype, raw).reshape(want.shape)
            yield from _compare(
                f"state {name}", got, want, [after[name] for _, after in self.moved]
            )
            self.after[name] = got


def _leaves(builder: Builder) -> list[Node]:
    return [n for n in builder.nodes.values() if n.op.leaf and n.attrs["name"] in builder.states]


def _compare(what: str, got: Array, want: Array, moved: list[Array]) -> Iterator[str]:
    if want.dtype.kind == "i":
        if all(np.array_equal(other, want) for other in moved) and not np.array_equal(got, want):
            yield f"{what}: {int((got != want).sum())} of {want.size} integers differ"
        return
    finite = np.isfinite(want)
    if not all(np.array_equal(np.isfinite(other), finite) for other in moved):
        return
    spread = max(tolerance.nmse(other[finite], want[finite]) for other in moved)
    if spread > CHAOS:
        return
    result = tolerance.within(got, want, max(1e-12, GAIN**2 * spread))
    if not result:
        yield f"{what}: {result}"

"""Runs the plans of a graph's text, and compares with its float64 values; holds the budget to what
it promises.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import numpy as np

from pyggml.errors import BudgetError, GraphError, UnsupportedOpError
from pyggml.graph import toposort
from pyggml.loop import loop_of
from pyggml.node import Node
from pyggml.parity import tolerance
from pyggml.parity.check import numeric_class
from pyggml.parity.graph_case import Builder, GraphCase, PlanText, built, graph_of
from pyggml.parity.graph_values import reached, runs
from pyggml.parity.values import Array, decoded
from pyggml.passes.order import state_edges
from pyggml.runtime import places
from pyggml.runtime.compile import compile
from pyggml.runtime.plan import Plan
from pyggml.runtime.store import Store

MIB = 2**20
#: How often the plans of a graph run, in turn.
ROUNDS = 2
#: How many times further from the float64 result a plan's may be than noise of the kernels' size
#: moves it. The factor is for the relative error, so it is squared in an NMSE.
GAIN = 4.0
#: A result that the noise moves further than this (NMSE) is not compared: GAIN^2 of it would let
#: an error of a tenth pass.
CHAOS = 1e-3
#: Budgets tried between the least and what the graph needs without one.
LADDER = 6


def check_graph(case: GraphCase, backend: str) -> str:
    """What is wrong with the plans of a graph; empty where nothing is. UnsupportedOpError where
    a text is no graph that can be compiled at all.
    """
    try:
        builder = built(case)
        for plan in case.plans:
            graph = graph_of(builder, plan)
            toposort(graph.roots, state_edges(graph.nodes))
    except GraphError as error:
        raise UnsupportedOpError(f"no graph: {error}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return next(_faults(case, builder, backend), "")


def _faults(case: GraphCase, builder: Builder, backend: str) -> Iterator[str]:
    store = Store()
    plans = []
    for number, text in enumerate(case.plans):
        made = Compiler(builder, text, backend, store)
        yield from (f"plan {number}: {fault}" for fault in made.promises())
        plans.append(made.plan())
    noises = [_noise(builder, *pair, backend) for pair in zip(case.plans, plans)]
    for plan in plans:
        plan.bind()
    held: dict[str, Array] = {}
    for name, array in builder.states.items():
        held[name] = builder.values[name]
        if name in store.homes:
            store.write(name, array)
    arrays = dict(builder.inputs)
    for turn in range(ROUNDS):
        for number, (text, plan) in enumerate(zip(case.plans, plans)):
            given = {k: a for k, a in arrays.items() if k in plan.inputs}
            if turn == 0:
                plan.bind({k: given[k] for k in text.words("bind") if k in given})
            given = {k: a for k, a in given.items() if k not in text.words("bind")}
            outputs = plan.repeat(int(text.attrs.get("repeat", 1)), given)
            judge = Judge(builder, text, held, noises[number])
            where = f"plan {number}, round {turn}"
            yield from (f"{where}, {fault}" for fault in judge.outputs(outputs))
            yield from (f"{where}, {fault}" for fault in judge.states(store))
            held = judge.held


def _noise(builder: Builder, text: PlanText, plan: Plan, backend: str) -> dict[str, float]:
    """Op name -> the relative error of the widest class that a place of the plan declares for it.

    Nodes of the graph count, and those that passes put in their place: a slice of a product may be
    of a wider class than the whole. An op that is not in the plan any more gets the widest of all.
    """
    devices = [places.parse(p).backend for p in text.words("on") or (backend,)]
    errors: dict[str, float] = {}
    compiled = [n for n in plan.graph.nodes if not n.op.leaf and n.op.view is None]
    for node in (*(builder.nodes[name] for name in reached(builder, text)), *compiled):
        if not node.op.leaf and node.op.view is None:
            bounds = [tolerance.CLASSES[numeric_class(device, node)] for device in devices]
            bound = max(tolerance.CLASSES["f32"], *bounds)
            errors[node.op.name] = max(errors.get(node.op.name, 0.0), float(bound**0.5))
    widest, present = max(errors.values(), default=0.0), {n.op.name for n in compiled}
    return {name: error if name in present else widest for name, error in errors.items()}


# -- compiling --------------------------------------------------------------------------------


class Compiler:
    """Compiles a plan's text under any budget, and checks what budgets promise."""

    def __init__(self, builder: Builder, text: PlanText, backend: str, store: Store) -> None:
        self.graph = graph_of(builder, text)
        pins = dict(pin.split("=") for pin in text.words("pins"))
        self.pins = {f"^{name}$": place for name, place in pins.items()}
        self.places = list(text.words("on")) or [backend]
        self.share, self.store = text.attrs.get("amb"), store
        self.need = self._compile(None, Store()).memory.score_peak
        self.least = 0
        self.exempt = False  # whether some attention stays whole, with a warning

    def _compile(self, amb: float | None, store: Store) -> Plan:
        graph = self.graph
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            plan = compile(
                graph.outputs, updates=graph.updates, backends=self.places, pins=self.pins,
                amb=amb, store=store,
            )  # fmt: skip
        self.exempt = any("outside the budget" in str(one.message) for one in told)
        return plan

    def under(self, nbytes: int) -> Plan | None:
        """Under a budget, None where it is refused; in a store of its own."""
        try:
            return self._compile(nbytes / MIB, Store())
        except BudgetError:
            return None

    def plan(self) -> Plan:
        """The plan that runs."""
        if self.share is None:
            return self._compile(None, self.store)
        least = self.least or 1
        amb = least + int(self.share * max(0, self.need - least))
        return self._compile(amb / MIB, self.store)

    def promises(self) -> Iterator[str]:
        """The least is the least, what compiles keeps to its budget, and more is never worse."""
        if self.share is None:
            return
        try:
            peak = self._compile(1 / MIB, Store()).memory.score_peak
            if peak > 1 and not self.exempt:
                yield f"a budget of 1 byte gives a peak of {peak}"
            return  # no scores for the budget to bound
        except BudgetError as error:
            self.least = round(error.least * MIB)
        for below in (self.least - 1, int(0.98 * self.least), int(0.9 * self.least)):
            if 0 < below < self.least and self.under(below) is not None:
                yield f"the least budget is said to be {self.least} bytes, but {below} compile"
        steps = range(LADDER + 1)
        ladder = sorted({self.least + (self.need - self.least) * i // LADDER for i in steps})
        fewest, at = 0, 0
        for nbytes in ladder:
            plan = self.under(nbytes)
            if plan is None:
                yield f"{nbytes} bytes are refused, {self.least} are said to be enough"
                return
            if plan.memory.score_peak > nbytes and not self.exempt:
                yield f"a budget of {nbytes} bytes gives a peak of {plan.memory.score_peak}"
            count = pieces(plan)
            if fewest and count > fewest:
                yield f"{fewest} pieces at {at} bytes, {count} at {nbytes}"
            if not fewest or count < fewest:
                fewest, at = count, nbytes


def pieces(plan: Plan) -> int:
    """Of all loops of a plan; one for a plan without loops."""
    loops = [loop_of(node) for node in plan.graph.nodes]
    return sum(prod(dim.count for dim in loop.dims) for loop in loops if loop is not None) or 1


# -- judging ----------------------------------------------------------------------------------


class Judge:
    """The float64 values of a plan's run, and how uncertain each of them is."""

    def __init__(
        self,
        builder: Builder,
        text: PlanText,
        states: Mapping[str, Array],
        noise: Mapping[str, float],
    ) -> None:
        self.roots = {n.attrs["name"]: n for n in _leaves(builder)}
        self.want, self.held = runs(builder, text, states, {}, 0)
        self.moved = [runs(builder, text, states, noise, seed) for seed in (1, 100, 200)]

    def outputs(self, got: Mapping[str, Any]) -> Iterator[str]:
        for key, want in self.want.items():
            moved = [outputs[key] for outputs, _ in self.moved]
            array = np.asarray(got[key])
            yield from _compare(f"output {key}", array.reshape(want.shape), want, moved)

    def states(self, store: Store) -> Iterator[str]:
        """States must be right, and are then taken as they are: rounding does not add up."""
        for name, want in self.held.items():
            if name not in store.homes:
                continue
            raw = store.read(name, raw=True)
            got = decoded(self.roots[name].dtype, raw).reshape(want.shape)
            yield from _compare(f"state {name}", got, want, [held[name] for _, held in self.moved])
            self.held[name] = got


def _leaves(builder: Builder) -> list[Node]:
    return [n for n in builder.nodes.values() if n.op.leaf and n.attrs["name"] in builder.states]


def _compare(what: str, got: Array, want: Array, moved: list[Array]) -> Iterator[str]:
    if want.dtype.kind == "i":
        if all(np.array_equal(other, want) for other in moved) and not np.array_equal(got, want):
            yield f"{what}: {int((got != want).sum())} of {want.size} whole numbers differ"
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

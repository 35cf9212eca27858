"""compile() and Plan: a graph made ready for a device, its memory known, run many times."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from numbers import Real
from time import perf_counter
from typing import Any

from numpy.typing import ArrayLike, NDArray

from pyggml import passes, places
from pyggml.backends.base import Address, Backend, Runner, Step
from pyggml.dag import Graph
from pyggml.errors import (
    DeviceError,
    DTypeError,
    GraphError,
    OutOfMemoryError,
    ShapeError,
    UnknownName,
    UnsupportedOp,
)
from pyggml.graph import Node, labels, line_of
from pyggml.passes.work import Work
from pyggml.quants import decode_rows
from pyggml.reports import Memory, Profile, plan_text
from pyggml.store import Store, stored


class Plan:
    """A graph compiled against a store. `compile` makes it; it holds no memory before `bind`."""

    def __init__(self, work: Work, place: places.Place, store: Store, memory: Memory) -> None:
        self._work = work
        self._place = place
        self._runner: Runner | None = None
        self._generation = -1
        self._at: dict[Node, Address] = {}
        self.store = store
        self.memory = memory
        self.inputs = {n.attrs["name"]: n for n in work.leaves if n.op.name == "input"}

    @property
    def graph(self) -> Graph:
        """The graph as it runs: expanded, and cut by the budget."""
        return self._work.graph

    @property
    def steps(self) -> tuple[Step, ...]:
        return self._work.steps

    @property
    def addresses(self) -> Mapping[Node, Address]:
        """Where each tensor stands, once bound."""
        return self._at

    @property
    def backend(self) -> Backend:
        return self.store.backend

    def __str__(self) -> str:
        return plan_text(self._work, str(self._place))

    def bind(self) -> Plan:
        """Allocate, upload weights and make runners. The first run does it if nobody else did.

        Errors: DeviceError for a place that is only described, OutOfMemoryError with the table.
        """
        with self.store.lock:
            if self._place.size is not None:
                raise DeviceError(
                    f"{self._place}:{self._place.size} is a description of a device: compile works "
                    "on it, bind and run do not; give the place without a size"
                )
            if self._runner is None or self._generation != self.store.generation:
                self._bind()
        return self

    def _bind(self) -> None:
        placement = self._work.placed
        try:
            leaves = self.store.reserve(self._work.leaves, placement.arena)
        except OutOfMemoryError as error:
            raise OutOfMemoryError(f"{error}; the plan needs:\n{self.memory}") from None
        arena = self.store.arena if self.store.arena is not None else self.backend.alloc(0)
        self._at = {
            node: Address(arena if at.base is None else leaves[at.base], at.offset, at.nb)
            for node, at in placement.places.items()
        }
        self._runner = self.backend.bind(self._work.steps, self._at, arena, placement.scratch_at)
        self._generation = self.store.generation
        self.store.bound.add(self)

    def run(
        self,
        inputs: Mapping[str, ArrayLike] | None = None,
        /,
        *,
        copy: bool = True,
        **named: ArrayLike,
    ) -> dict[str, NDArray[Any]]:
        """Give every input an array (NumPy shape), execute, return the outputs by name.

        inputs, named  a dict, keywords, or both
        bf16 and block types come back as f32. copy=False returns read-only views of the stored
        values (raw rows for those types), valid until the store's next run. Where a run fails,
        states that its earlier steps wrote stay written.
        Errors: UnknownName, ShapeError or DTypeError for inputs, IdError for ids past the end.
        """
        if not isinstance(copy, bool):
            raise DTypeError(
                f"copy={type(copy).__name__} is no bool; "
                "give an input named copy in a dict: run({'copy': array})"
            )
        with self.store.lock:
            self.bind()
            self._give(_together(inputs, named))
            assert self._runner is not None
            self._runner.run()
            self.backend.synchronize()
            outputs = self._work.graph.outputs.items()
            return {key: self._output(node, copy) for key, node in outputs}

    def _output(self, node: Node, copy: bool) -> NDArray[Any]:
        found = self.backend.download(self._at[node], node.spec, copy)
        if not copy:
            found.flags.writeable = False
        elif node.dtype.numpy is None:
            found = decode_rows(node.dtype, found)
        return found

    def release(self) -> None:
        """Let go of the arena; the next run binds again."""
        self._runner, self._at = None, {}

    def _give(self, inputs: Mapping[str, ArrayLike]) -> None:
        for key in inputs:
            if key not in self.inputs:
                known = ", ".join(self.inputs) or "none"
                raise UnknownName(f"the plan has no input {key!r}; its inputs: {known}")
        missing = [key for key in self.inputs if key not in inputs]
        if missing:
            wanted = ", ".join(f"{key} ({self.inputs[key].spec})" for key in missing)
            raise GraphError(f"run lacks inputs: {wanted} (sizes in ne order)")
        ready = {k: stored(f"input {k!r}", self.inputs[k].spec, a) for k, a in inputs.items()}
        for key, array in ready.items():
            node = self.inputs[key]
            self.backend.upload(self._at[node], node.spec, array)

    def profile(
        self,
        inputs: Mapping[str, ArrayLike] | None = None,
        /,
        *,
        repeat: int = 3,
        **named: ArrayLike,
    ) -> Profile:
        """Time every step (best of `repeat` runs, which write states) beside flops and bytes."""
        if not isinstance(repeat, int) or repeat < 1:
            raise DTypeError(f"repeat={repeat!r} must be a whole number of at least 1")
        with self.store.lock:
            self.bind()
            self._give(_together(inputs, named))
            assert self._runner is not None
            best = [float("inf")] * len(self.steps)
            for _ in range(repeat):
                for i in range(len(self.steps)):
                    start = perf_counter()
                    self._runner.run_step(i)
                    self.backend.synchronize()
                    best[i] = min(best[i], perf_counter() - start)
        return Profile.of(self.steps, best)


def _together(
    inputs: Mapping[str, ArrayLike] | None, named: Mapping[str, ArrayLike]
) -> dict[str, ArrayLike]:
    if inputs is not None and not isinstance(inputs, Mapping):
        raise DTypeError(
            f"inputs are given by name, in a dict or as keywords, not as {type(inputs).__name__}"
        )
    twice = [key for key in named if key in (inputs or {})]
    if twice:
        raise GraphError(f"input {twice[0]!r} is given twice, in the dict and as a keyword")
    return {**(inputs or {}), **named}


def compile(
    outputs: Mapping[str, Node],
    *,
    backends: Sequence[str] = ("numpy",),
    amb: float | None = None,
    pins: Mapping[str, str] | None = None,
    store: Store | None = None,
    observe: Iterable[str] = (),
    updates: Iterable[Node] = (),
) -> Plan:
    """Make a plan of the graph that computes `outputs`. Allocates nothing.

    backends  places in order of preference: "numpy"
    amb       attention memory budget in MiB (fractions allowed); None is no budget
    pins      label pattern (re.search) -> place
    store     the store to share weights, states and arena with; a new one by default
    observe   label patterns (as in file names) of tensors to return as well
    updates   handles of state writes that no output reaches
    """
    place = _one_place(backends, pins or {})
    budget = _budget_bytes(amb)
    store = store if store is not None else Store(place.name)
    if not isinstance(store, Store) or store.backend is not place.backend:
        raise DeviceError(f"store= takes a Store of {place.name}, not {store!r}")
    start = Work(_observed(Graph(outputs, updates), observe), place.backend)
    plain = passes.run(start)
    work = plain
    if budget is not None:
        work = passes.run(replace(start, amb=budget))
        for text in work.warnings:
            warnings.warn(text, stacklevel=2)
    store.check(work.leaves)
    return Plan(work, place, store, Memory.of(work, plain, str(place)))


def _budget_bytes(amb: float | None) -> int | None:
    if amb is None:
        return None
    if isinstance(amb, bool) or not isinstance(amb, Real) or not 0 < amb < float("inf"):
        raise ShapeError(f"amb={amb!r}: the budget is a number of MiB above 0, or None for none")
    return int(amb * 2**20)


def _one_place(backends: Sequence[str], pins: Mapping[str, str]) -> places.Place:
    if isinstance(backends, str) or not backends:
        raise DTypeError(f"backends= is a list of places such as ['numpy'], not {backends!r}")
    found = [places.parse(text) for text in backends]
    if not isinstance(pins, Mapping):
        raise DTypeError(f"pins= is a dict of label patterns to places, not {pins!r}")
    for pattern, text in pins.items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise DTypeError(f"pins: {pattern!r} is no regular expression: {error}") from None
        found.append(places.parse(text))
    if len({(place.name, place.index) for place in found}) > 1:
        raise UnsupportedOp("a plan runs on one place in this version; give one in backends=")
    return found[0]


def _observed(graph: Graph, patterns: Iterable[str]) -> Graph:
    """The graph with tensors whose labels match as further outputs."""
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        raise DTypeError(f"observe= is a list of label patterns, not {patterns!r}")
    patterns = tuple(patterns)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise DTypeError(f"observe= is a list of label patterns, not {list(patterns)!r}")
    outputs = dict(graph.outputs)
    for pattern in patterns:
        found = [
            (label, node)
            for node in graph.nodes
            for label in labels(node)
            if fnmatchcase(label, pattern)
        ]
        if not found:
            known = sorted({label for node in graph.nodes for label in labels(node)})
            raise UnknownName(f"observe={pattern!r} matches no label; there are: {known}")
        for label, node in found:
            if outputs.setdefault(label, node) is not node:
                raise GraphError(
                    f"observe={pattern!r} would return {node!r} (at {line_of(node)}) under the "
                    f"name {label!r}, which is another output's; give one of them another name"
                )
    return Graph(outputs, graph.updates)

"""compile() and Plan: a graph made ready for a device, its memory known, run many times."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any

from pyggml import passes
from pyggml.backends.base import Address, Backend, Step
from pyggml.errors import (
    DeviceError,
    DTypeError,
    GraphError,
    OutOfMemoryError,
    ShapeError,
    UnknownNameError,
)
from pyggml.graph import Graph
from pyggml.node import Node, Spec, labels, line_of
from pyggml.ops.leaf import constant_op, data_of, state_op
from pyggml.passes.work import Pins, Split, Work
from pyggml.quants import decode_rows
from pyggml.runtime import places
from pyggml.runtime.execution import Execution, addresses
from pyggml.runtime.inputs import Inputs, together
from pyggml.runtime.listing import plan_text
from pyggml.runtime.reports import Memory, Profile
from pyggml.runtime.store import Need, Progress, Store


class Plan:
    """A graph compiled against a store. `compile` makes it; it holds no memory before `bind`."""

    def __init__(
        self, work: Work, store: Store, needs: tuple[Need, ...], memory: Memory, described: str
    ) -> None:
        self._work = work
        self._needs = needs
        self._described = described
        self._execution: Execution | None = None
        self._generation = -1
        self._at: dict[Node, Address] = {}
        self.store = store
        self.memory = memory
        self._inputs = Inputs(needs)

    @property
    def inputs(self) -> Mapping[str, Spec]:
        """The inputs' types and sizes, by name."""
        return self._inputs.specs

    @property
    def graph(self) -> Graph:
        """The graph as it runs: expanded, cut by the budget, with transfers between devices."""
        return self._work.graph

    @property
    def splits(self) -> tuple[Split, ...]:
        """Runs of steps of one device, in the order in which they are issued."""
        return self._work.splits

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps of all splits, copies between devices included."""
        return self._work.steps

    @property
    def addresses(self) -> Mapping[Node, Address]:
        """Where each tensor stands, once bound."""
        return self._at

    def place_of(self, node: Node) -> str:
        """The place where a node of `graph` is made or kept."""
        return self._work.home(node).place

    def __str__(self) -> str:
        return plan_text(self._work)

    def bind(
        self,
        inputs: Mapping[str, object] | None = None,
        /,
        *,
        progress: Progress | None = None,
        **named: object,
    ) -> Plan:
        """Allocate, upload weights and make runners. The first run does it if nobody else did.

        inputs, named  arrays that stay these inputs' memory, nothing copied: of NumPy for the host,
                       of CuPy, PyTorch and others for a GPU, in C order and of the tensor's type.
                       The plan keeps them, runs read what is in them then and take no array for
                       those inputs. None goes back to copies. What is not named stays as it is
        progress       called with (bytes that are there, bytes in all) after every weight that
                       goes to a device
        Errors: DeviceError for a place that is only described, OutOfMemoryError with the table;
        UnknownNameError, ShapeError, DTypeError, GraphError for arrays; then none is bound.
        """
        if progress is not None and not callable(progress):
            raise DTypeError(
                f"progress={type(progress).__name__} is no function; "
                "give an input named progress in a dict: bind({'progress': array})"
            )
        with self.store.alone(self._work.backends):
            if self._described:
                raise DeviceError(
                    f"{self._described} is a description of a device: compile works on it, bind "
                    "and run do not; give the place without a size"
                )
            before = self._inputs.bound
            if self._inputs.bind(together(inputs, named), self.store):
                self._execution = None  # what is recorded reads the old addresses
            if self._execution is None or self._generation != self.store.generation:
                try:
                    self._bind(progress)
                except BaseException:
                    self._inputs.restore(before)
                    raise
        return self

    def _bind(self, progress: Progress | None) -> None:
        work = self._work
        wanted = {b: work.placed.arenas[b.device].nbytes for b in _one_a_device(work.backends)}
        used = {need.backend.device for need in self._needs} | {
            split.backend.device for split in work.splits
        }
        try:
            leaves = self.store.reserve(
                self._needs,
                {b: n for b, n in wanted.items() if b.device in used},
                self._inputs.addresses,
                progress,
            )
            arenas = {device: arena.buffer for device, arena in self.store.arenas.items()}
            at = addresses(work, leaves, arenas)
            execution = Execution(work, at, arenas)
            execution.settle()  # one device may read at once what another still clears or gets
        except OutOfMemoryError as error:
            raise OutOfMemoryError(f"{error}; the plan needs:\n{self.memory}") from None
        self._at, self._execution = at, execution
        self._generation = self.store.generation
        self.store.bound.add(self)

    def run(
        self,
        inputs: Mapping[str, object] | None = None,
        /,
        *,
        copy: bool = True,
        repeat: int = 1,
        **named: object,
    ) -> dict[str, Any]:
        """Give every input an array (NumPy shape), execute, return the outputs by name.

        inputs, named  a dict, keywords, or both. An array of CuPy, PyTorch or others in the memory
                       of a GPU that reads it is copied there, and must have the tensor's type
        repeat         how many times to execute, one after another with no host in between; only
                       states make the runs differ, and the outputs are the last one's
        bf16 and block types come back as f32. copy=False returns what must not be written to, valid
        until the store's next run: stored values (raw rows for those types), as NumPy arrays or, on
        a GPU, as objects that CuPy and PyTorch read where they are. Where a run fails, states that
        its earlier steps wrote stay written.
        Errors: UnknownNameError, ShapeError, DTypeError or GraphError for inputs; DeviceError for a
        device that is not there, only described, or that failed; OutOfMemoryError where the first
        run binds; IdError for ids past the end, on the host. A GPU takes those for negative ones,
        and says so under PYGGML_CUDA_DEBUG=1 only (not inside loops).
        """
        if not isinstance(copy, bool):
            raise DTypeError(
                f"copy={type(copy).__name__} is no bool; "
                "give an input named copy in a dict: run({'copy': array})"
            )
        _want_count(repeat)
        with self.store.alone(self._work.backends):
            self.bind()
            self._give(together(inputs, named))
            assert self._execution is not None
            self._execution.run(repeat)
            outputs = self._work.graph.outputs.items()
            return {key: self._output(node, copy) for key, node in outputs}

    def _give(self, arrays: Mapping[str, object]) -> None:
        assert self._execution is not None
        try:
            self._inputs.give(arrays, self._at)
        except BaseException:
            self._execution.abandon()  # copies of the arrays before that one are under way
            raise

    def _output(self, node: Node, copy: bool) -> Any:
        home, at = self._work.home(node), self._at[node]
        if node.op is constant_op:  # a device may keep it in a layout of its own
            data = data_of(node)
            found = data.copy() if copy else data.view()
        elif not copy:
            return home.view(at, node.spec)
        else:
            found = home.download(at, node.spec)
        return decode_rows(node.dtype, found) if copy and node.dtype.numpy is None else found

    def release(self) -> None:
        """Let go of the arenas; the next run binds again."""
        self._execution, self._at = None, {}

    def profile(
        self,
        inputs: Mapping[str, object] | None = None,
        /,
        *,
        repeat: int = 3,
        **named: object,
    ) -> Profile:
        """Time every step (best of `repeat` runs, which write states) beside flops and bytes.

        inputs, named  as for `run`, with the same errors
        """
        _want_count(repeat)
        with self.store.alone(self._work.backends):
            self.bind()
            self._give(together(inputs, named))
            assert self._execution is not None
            times = [self._execution.timed() for _ in range(repeat)]
        return Profile.of(self.steps, [min(step) for step in zip(*times)])


def _one_a_device(backends: Iterable[Backend]) -> tuple[Backend, ...]:
    return tuple({backend.device: backend for backend in backends}.values())


def _want_count(repeat: object) -> None:
    if isinstance(repeat, bool) or not isinstance(repeat, Integral) or repeat < 1:
        raise DTypeError(
            f"repeat={repeat!r} must be a whole number of at least 1; "
            "an input named repeat is given in a dict"
        )


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

    backends  places in order of preference: ["cuda:0", "numpy"]. With a size ("cuda:0:24GiB") one
              is a description: the plan is made, its memory says whether it fits, bind refuses it
    amb       attention memory budget in MiB (fractions allowed), on each device; None is no budget
    pins      label pattern (re.search) -> place, for weights, states and nodes; the first match
              counts. A place may stand here alone
    store     the store to share weights, states and arenas with; a new one by default
    observe   label patterns (as in file names) of tensors to return as well
    updates   handles of state writes that no output reaches
    Errors: UnsupportedOpError where no place runs a node; BudgetError where `amb` is too small,
    ShapeError where it is no number above 0; GraphError for states and names; DeviceError for what
    is no place, UnknownNameError for a backend or an `observe` that is not there; DTypeError for
    arguments of the wrong kind.
    """
    devices, patterns = _places(backends, pins or {})
    budget = _budget_bytes(amb)
    store = store if store is not None else Store()
    if not isinstance(store, Store):
        raise DTypeError(f"store= takes a Store, not {store!r}")
    graph = _observed(Graph(outputs, updates), observe)
    given = tuple(place.backend for place in devices)
    _check_pins(graph, patterns)
    begin = Work(graph, given, patterns)
    begin = replace(begin, settled=_settled(begin, store))
    plain = passes.run(begin)
    work = plain
    if budget is not None:
        work = passes.run(replace(begin, amb=budget))
        for text in work.warnings:
            warnings.warn(text, stacklevel=2)
    store.check(work.leaves)
    needs = tuple(Need(n, work.home(n), work.layouts.get(n)) for n in work.leaves)
    sizes = {p.backend.device: p for p in devices if p.size is not None}
    memory = Memory.of(work, plain, needs, sizes)
    for need in needs:
        if need.node.op is state_op and not sizes:
            store.planned[need.node.attrs["name"]] = need.backend
    return Plan(work, store, needs, memory, ", ".join(map(str, devices)) if sizes else "")


def _budget_bytes(amb: float | None) -> int | None:
    if amb is None:
        return None
    if isinstance(amb, bool) or not isinstance(amb, Real) or not 0 < amb < float("inf"):
        raise ShapeError(f"amb={amb!r}: the budget is a number of MiB above 0, or None for none")
    return int(amb * 2**20)


def _places(
    backends: Sequence[str], pins: Mapping[str, str]
) -> tuple[tuple[places.Place, ...], Pins]:
    """All places in order of preference, those of pins alone last; and the pins."""
    if isinstance(backends, str) or not backends:
        raise DTypeError(f"backends= is a list of places such as ['numpy'], not {backends!r}")
    if not isinstance(pins, Mapping):
        raise DTypeError(f"pins= is a dict of label patterns to places, not {pins!r}")
    found: dict[Backend, places.Place] = {}

    def add(text: str) -> Backend:
        place = places.parse(text)
        if place.backend not in found or place.size is not None:
            found[place.backend] = place
        return place.backend

    for text in backends:
        add(text)
    patterns = []
    for pattern, text in pins.items():
        place = add(text)
        try:
            patterns.append((re.compile(pattern), place))
        except (re.error, TypeError) as error:
            raise DTypeError(f"pins: {pattern!r} is no regular expression: {error}") from None
    return tuple(found.values()), tuple(patterns)


def _settled(work: Work, store: Store) -> dict[str, Backend]:
    """Where states are in the store, or, unless pinned, where an earlier plan wants them."""
    found = {}
    for state in work.graph.nodes:
        if state.op is not state_op:
            continue
        name = state.attrs["name"]
        home, meant = store.homes.get(name), store.planned.get(name)
        if home is not None and home not in work.backends:
            raise GraphError(
                f"the state {name!r} is on {home.place} in this store, which is none of the places "
                f"{', '.join(b.place for b in work.backends)}: add it to backends="
            )
        if home is None and meant in work.backends and work.pinned(state) is None:
            home = meant
        if home is not None:
            found[name] = home
    return found


def _check_pins(graph: Graph, pins: Pins) -> None:
    """A warning for pins that match no label: they may be meant for another model."""
    known = {label for node in graph.nodes for label in labels(node)} if pins else set()
    for pattern, backend in pins:
        if not any(map(pattern.search, known)):
            warnings.warn(
                f"the pin {pattern.pattern!r} to {backend.place} matches no label of this graph",
                stacklevel=3,
            )


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
            kinds = Counter(re.sub(r"\d+", "*", x) for node in graph.nodes for x in labels(node))
            known = ", ".join(f"{kind} ({n})" if n > 1 else kind for kind, n in kinds.items())
            raise UnknownNameError(
                f"observe={pattern!r} matches no label; there are: {known or 'none'}. What a fused "
                "op or a loop computes inside has none: build it of simpler ops to see it"
            )
        for label, node in found:
            if outputs.setdefault(label, node) is not node:
                raise GraphError(
                    f"observe={pattern!r} would return {node!r} (at {line_of(node)}) under the "
                    f"name {label!r}, which is another output's; give one of them another name"
                )
    return Graph(outputs, graph.updates)

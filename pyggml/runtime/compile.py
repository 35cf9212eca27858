"""compile(): its arguments checked and made into a request, which is planned."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real

from pyggml.backends.base import Backend
from pyggml.errors import DTypeError, GraphError, ShapeError, StateWarning, UnknownNameError
from pyggml.graph import Graph
from pyggml.node import Node, labels, line_of
from pyggml.passes.work import Pins, Work
from pyggml.runtime import places
from pyggml.runtime.misuse import stale_reads
from pyggml.runtime.plan import Plan
from pyggml.runtime.planned import Request
from pyggml.runtime.store import Store
from pyggml.written import note_graph


def compile(
    outputs: Mapping[str, Node],
    *,
    backends: Sequence[str] = ("numpy",),
    amb: float | None = None,
    pins: Mapping[str, str] | None = None,
    store: Store | None = None,
    observe: Iterable[str] = (),
    updates: Iterable[Node] = (),
    fuse: bool = True,
) -> Plan:
    """Make a plan of the graph that computes `outputs`. Allocates nothing and changes nothing.

    backends  places in order of preference: ["cuda:0", "numpy"]. With a size ("cuda:0:24GiB") one
              is a description: the plan is made, its memory says whether it fits, bind refuses it
    amb       attention memory budget in MiB (fractions allowed), on each device; None is no budget
    pins      label pattern (re.search) -> place, for weights, states and nodes; the first match
              counts. A place may stand here alone
    store     the store to share weights, states and arenas with; a new one by default
    observe   label patterns (as in file names) of tensors to return as well
    updates   handles of state writes that no output reaches
    fuse      False: every node is a step of its own, so that results with and without tell whether
              a fusion of the backend is wrong. NumPy and null fuse nothing
    Errors: UnsupportedOpError where no place runs a node; BudgetError where `amb` is too small,
    ShapeError where it is no number above 0; GraphError for states and names; DeviceError for what
    is no place, UnknownNameError for a backend or an `observe` that is not there; DTypeError for
    arguments of the wrong kind.
    """
    if not isinstance(fuse, bool):
        raise DTypeError(f"fuse= takes True or False, not {fuse!r}")
    devices, patterns = _places(backends, pins or {})
    budget = _budget_bytes(amb)
    store = store if store is not None else Store()
    if not isinstance(store, Store):
        raise DTypeError(f"store= takes a Store, not {store!r}")
    graph = _observed(Graph(outputs, updates), observe)
    _check_pins(graph, patterns)
    note_graph(graph.nodes)
    for text in stale_reads(graph):
        warnings.warn(text, StateWarning, stacklevel=2)
    work = Work(graph, tuple(place.backend for place in devices), patterns, fuse=fuse)
    sizes = {place.backend.device: place for place in devices if place.size is not None}
    request = Request(work, budget, sizes)
    return Plan(request, request.plan(store, stacklevel=2), store)


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

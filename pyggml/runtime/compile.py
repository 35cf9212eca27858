"""compile(): checks its arguments and plans the graph."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real

from pyggml.backends.base import Backend, KeepsDecoded, in_host_memory
from pyggml.errors import (
    DeviceError,
    DTypeError,
    GraphError,
    ShapeError,
    StateWarning,
    UnknownNameError,
)
from pyggml.graph import Graph
from pyggml.node import Node, labels, line_of
from pyggml.passes.work import Pins, Work
from pyggml.runtime import places
from pyggml.runtime.misuse import stale_reads
from pyggml.runtime.plan import Plan
from pyggml.runtime.planned import Request
from pyggml.runtime.shards import Cuts, shard_of
from pyggml.runtime.store import Store
from pyggml.writes import note_graph


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
    decode_weights: bool = False,
    read_ahead: bool | None = None,
    shard: Cuts | None = None,
) -> Plan:
    """Plan the graph that computes `outputs`. Allocates no device memory and changes no store.

    backends  places in order of preference: ["cuda:0", "numpy"]. A place with a size
              ("cuda:0:24GiB") is for planning only: the plan's memory shows whether it fits, and
              bind and run raise DeviceError
    amb       attention memory budget in MiB on each device (fractions allowed); None: no budget
    pins      label pattern (re.search) -> place, for weights, states and nodes; the first match
              counts. Places need not be in `backends`
    store     the store whose weights, states and arenas the plan shares; a new one by default
    observe   label patterns (shell style, `*` and `?`) of tensors to return with the outputs
    updates   handles of state writes that no output depends on
    fuse      False runs each node as its own step: results that differ from those with fusions
              show that one of them is wrong. NumPy and null have no fusions
    decode_weights
              True keeps weights on NumPy as f32: products are faster, and a weight takes 4 bytes an
              element, which the plan's memory counts. bind decodes them
    read_ahead
              True lets a GPU read the weights that it borrows from the host while it computes what
              comes before: the weights of two products are then in its arena. None: unless a place
              with a size has no room for that
    shard     how the graph is spread over the first of `backends`: {"heads": 2, "experts": 2},
              {"layers": 2}, or "auto"; (3, 1) instead of 2 for unequal parts. docs/scaling.md
    Errors: UnsupportedOpError if no place runs a node; BudgetError if `amb` is too small and
    ShapeError if it is not a number above 0; GraphError for states and names; DeviceError for a
    malformed place, and for decode_weights=True if no place keeps weights decoded;
    UnknownNameError for an unknown backend or an `observe` pattern without a match; DTypeError for
    arguments of the wrong type.
    """
    for name, value in (("fuse", fuse), ("decode_weights", decode_weights)):
        if not isinstance(value, bool):
            raise DTypeError(f"{name}= must be True or False, not {value!r}")
    if not isinstance(read_ahead, bool | None):
        raise DTypeError(f"read_ahead= must be True, False or None, not {read_ahead!r}")
    all_places, patterns = _places(backends, pins or {})
    budget = _budget_bytes(amb)
    store = store if store is not None else Store()
    if not isinstance(store, Store):
        raise DTypeError(f"store= must be a Store, not {store!r}")
    graph = _observed(Graph(outputs, updates), observe)
    _check_pins(graph, patterns)
    note_graph(graph.nodes)
    for text in stale_reads(graph):
        warnings.warn(text, StateWarning, stacklevel=2)
    devices = tuple(place.backend for place in all_places)
    if shard is None:
        _check_hosts(devices)
    if decode_weights and not any(isinstance(device, KeepsDecoded) for device in devices):
        raise DeviceError(
            f"decode_weights=True: {', '.join(device.place for device in devices)} cannot keep "
            "weights decoded; numpy can"
        )
    named = [place for place in all_places if place.backend in _named(backends)]
    work = Work(
        graph, devices, patterns, amb=budget, fuse=fuse, decode_weights=decode_weights,
        shard=shard_of(shard, named),
    )  # fmt: skip
    if store.ranks is not None:
        store.ranks.check(work.shard)
    sizes = {place.backend.device: place for place in all_places if place.size is not None}
    request = Request(work, sizes, read_ahead)
    return Plan(request, request.plan(store), store)


def _named(backends: Sequence[str]) -> list[Backend]:
    """The backends of the places that `backends=` lists; pins may name others."""
    return [places.parse(text).backend for text in backends]


def _check_hosts(devices: Iterable[Backend]) -> None:
    """Without `shard=`, parts of the host would only add copies: a mistake in a place."""
    for device in devices:
        if in_host_memory(device) and device.device != "host":
            raise DeviceError(
                f"{device.place}: there is only one host; use {device.name!r} ({device.place} is "
                "the host of a second process, or stands for it, with shard=)"
            )


def _budget_bytes(amb: float | None) -> float | None:
    if amb is None:
        return None
    if isinstance(amb, bool) or not isinstance(amb, Real) or not 0 < amb < float("inf"):
        raise ShapeError(f"amb={amb!r} must be a number of MiB above 0, or None for no budget")
    return float(amb) * 2**20  # not rounded, so that messages show the user's number


def _places(
    backends: Sequence[str], pins: Mapping[str, str]
) -> tuple[tuple[places.Place, ...], Pins]:
    """All places in order of preference, those named only in pins last; and the pins."""
    if isinstance(backends, str) or not backends:
        raise DTypeError(f"backends= must be a list of places such as ['numpy'], not {backends!r}")
    if not isinstance(pins, Mapping):
        raise DTypeError(f"pins= must be a dict of label patterns to places, not {pins!r}")
    by_backend: dict[Backend, places.Place] = {}

    def add(text: str) -> Backend:
        place = places.parse(text)
        if place.backend not in by_backend or place.size is not None:
            by_backend[place.backend] = place
        return place.backend

    for text in backends:
        add(text)
    patterns = []
    for pattern, text in pins.items():
        place = add(text)
        try:
            patterns.append((re.compile(pattern), place))
        except (re.error, TypeError) as error:
            raise DTypeError(f"pins: {pattern!r} is not a regular expression: {error}") from None
    return tuple(by_backend.values()), tuple(patterns)


def _check_pins(graph: Graph, pins: Pins) -> None:
    """Warn about pins that match no label; the user may reuse them for several models."""
    known = {label for node in graph.nodes for label in labels(node)} if pins else set()
    for pattern, backend in pins:
        if not any(map(pattern.search, known)):
            warnings.warn(
                f"the pin {pattern.pattern!r} to {backend.place} matches no label of this graph",
                stacklevel=3,
            )


def _observed(graph: Graph, patterns: Iterable[str]) -> Graph:
    """The graph with the tensors whose labels match as additional outputs."""
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        raise DTypeError(f"observe= must be a list of label patterns, not {patterns!r}")
    patterns = tuple(patterns)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise DTypeError(f"observe= must be a list of label patterns, not {list(patterns)!r}")
    if not patterns:
        return graph
    outputs = dict(graph.outputs)
    for pattern in patterns:
        matches = [
            (label, node)
            for node in graph.nodes
            for label in labels(node)
            if fnmatchcase(label, pattern)
        ]
        if not matches:
            forms = Counter(re.sub(r"\d+", "*", x) for node in graph.nodes for x in labels(node))
            known = ", ".join(f"{form} ({n})" if n > 1 else form for form, n in forms.items())
            raise UnknownNameError(
                f"observe={pattern!r} matches no label; the labels are: {known or 'none'}. Tensors "
                "inside a fused op or a loop have no label; build the op from simpler ones to "
                "observe them"
            )
        for label, node in matches:
            if outputs.setdefault(label, node) is not node:
                raise GraphError(
                    f"observe={pattern!r}: {node!r} (at {line_of(node)}) and another output are "
                    f"both named {label!r}; rename one of them"
                )
    return Graph(outputs, graph.updates)

"""Compare the tensors of a model's run with those of another engine, label by label.

The tensors of a whole run are compared, so errors add up from node to node. A node's bound is the
sum of the bounds of all nodes that it depends on (`nodes.together`), for the classes of both
engines. Ours is what the backend declares. The other engine is taken to round activations to 8 bits
for weights in blocks, as llama.cpp does on a CPU, and to f16 for f16 weights. So the first node
beyond its bound is where the engines part, and nodes after it only inherit that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np

from pyggml.errors import UnknownNameError
from pyggml.graph import Graph, toposort
from pyggml.node import Node, labels, line_of
from pyggml.parity.alone import Array
from pyggml.parity.check import numeric_class
from pyggml.parity.dump import fitted, names_for
from pyggml.parity.nodes import together
from pyggml.parity.report import labelled
from pyggml.parity.tolerance import Comparison, declared, nmse, within
from pyggml.passes.order import state_edges
from pyggml.runtime.places import parse
from pyggml.runtime.store import Store

if TYPE_CHECKING:
    from pyggml.models.model import Model

#: Our tensors differ from those of transformers (tiny models, f16 cache) and of llama.cpp (q8_0
#: weights) by up to 1/11 of the sum of the nodes' bounds. So, unlike `nodes.GAIN`, this needs no
#: margin on top.
MARGIN = 1.0
#: The worst elements that the details of a node list.
WORST = 8


@dataclass(frozen=True, slots=True)
class Pair:
    """One of our tensors next to the other engine's.

    name        the name of the other engine's
    note        which part was compared, if not all
    comparison  None if their shapes do not fit
    largest     the largest difference of two elements
    """

    label: str
    name: str
    node: Node = field(repr=False)
    ours: Array = field(repr=False)
    theirs: Array = field(repr=False)
    note: str
    comparison: Comparison | None
    largest: float

    @property
    def ok(self) -> bool:
        return self.comparison is not None and self.comparison.ok

    @property
    def ratio(self) -> float:
        """Error over bound."""
        return inf if self.comparison is None else self.comparison.ratio

    def __str__(self) -> str:
        line = line_of(self.node)
        built = f", built at {line}" if line else ""
        if self.comparison is None:
            shapes = f"shape {self.ours.shape} does not fit {self.theirs.shape}"
            return f"{self.label} = {self.node.op.name}{built}: {shapes}"
        return f"{self.label} = {self.node.op.name} {self.node.spec}{built}: {self.comparison}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON; infinite errors become text."""
        error = inf if self.comparison is None else self.comparison.error
        return {
            "label": self.label, "name": self.name, "op": self.node.op.name,
            "shape": list(self.ours.shape), "ok": self.ok, "note": self.note,
            "error": error if np.isfinite(error) else str(error),
            "bound": None if self.comparison is None else self.comparison.bound,
            "largest": self.largest if np.isfinite(self.largest) else str(self.largest),
            "line": line_of(self.node),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Difference:
    """All pairs in the order of the graph.

    only_theirs  names in the dump without one of our labels
    only_ours    our labels without a tensor in the dump
    """

    pairs: tuple[Pair, ...]
    only_theirs: tuple[str, ...]
    only_ours: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return all(pair.ok for pair in self.pairs)

    @property
    def first(self) -> Pair | None:
        """The first pair beyond its bound."""
        return next((pair for pair in self.pairs if not pair.ok), None)

    @property
    def worst(self) -> Pair | None:
        """The pair that is furthest beyond its bound."""
        beyond = [pair for pair in self.pairs if not pair.ok]
        return max(beyond, key=lambda pair: pair.ratio, default=None)

    def pair(self, label: str) -> Pair:
        """The pair with this label; UnknownNameError if there is none."""
        node = labelled(label, {pair.node: pair.label for pair in self.pairs})
        return next(pair for pair in self.pairs if pair.node is node)


class Trace:
    """A model's graph for tokens in one batch, and its labelled tensors.

    nodes  by label, in the order of the graph; of two with one label, the later one
    """

    def __init__(self, model: Model, tokens: Sequence[int]) -> None:
        from pyggml.models.batch import Batch

        n = len(tokens)
        batch = Batch(n, n, model.options, n, padded=False)
        self.model, self.tokens = model, tokens
        self.graph = model.graph(batch, model.caches(n, n))
        self.nodes = _labelled(self.graph)

    def run(self, labels: Iterable[str]) -> dict[str, Array]:
        """The values of these labels, in NumPy's order of dimensions."""
        outputs = {label: self.nodes[label] for label in labels}
        plan = self.model.compile(Graph(outputs, self.graph.updates), Store())
        ids = np.asarray(self.tokens, np.int32)
        arrays = {"tokens": ids, "pos": np.arange(len(ids), dtype=np.int32)}
        values = plan.run({name: array for name, array in arrays.items() if name in plan.inputs})
        return {label: np.asarray(value) for label, value in values.items()}


def against(
    model: Model, tokens: Sequence[int], dump: Mapping[str, Array], *, bound: float | None = None
) -> Difference:
    """Run a model on tokens in one batch and compare its tensors with a dump.

    bound  the NMSE allowed for every tensor, in place of the bounds of the nodes
    Errors: UnknownNameError if no name of the dump belongs to a label.
    """
    trace = Trace(model, tokens)
    nodes = trace.nodes
    names = {label: next((x for x in names_for(label) if x in dump), "") for label in nodes}
    common = {label: name for label, name in names.items() if name}
    if not common:
        raise UnknownNameError(
            f"the dump has none of the model's labels; it has {', '.join(list(dump)[:8])}, ..., "
            f"the model {', '.join(list(nodes)[:8])}, ..."
        )
    values, bounds = trace.run(common), _bounds(model, trace.graph)
    pairs = []
    for label, name in common.items():
        limit = together(nodes[label], bounds, MARGIN) if bound is None else bound
        pairs.append(paired(label, name, nodes[label], values[label], dump[name], limit))
    known = {other for label in nodes for other in names_for(label)}
    return Difference(
        tuple(pairs),
        tuple(name for name in dump if name not in known),
        tuple(label for label, name in names.items() if not name),
    )


def _labelled(graph: Graph) -> dict[str, Node]:
    """`Trace.nodes`."""
    nodes: dict[str, Node] = {}
    for node in toposort(graph.roots, state_edges(graph.nodes)):
        if not node.op.leaf:
            for label in labels(node):
                nodes.pop(label, None)
                nodes[label] = node
    return nodes


def _bounds(model: Model, graph: Graph) -> dict[Node, float]:
    """The bound of each computed node alone: the sum of those of both engines."""
    devices = [parse(place).backend for place in model.backends]
    bounds = {}
    for node in graph.nodes:
        if node.op.leaf or node.op.view is not None:
            continue
        able = [device for device in devices if device.supports(node) is None]
        classes = [numeric_class(device, node) for device in able[:1]] or ["f16"]
        bounds[node] = sum(declared(node.op.name, name) for name in (*classes, _theirs(node)))
    return bounds


def _theirs(node: Node) -> str:
    """The numeric class of a node in another engine."""
    weights = [node[name].dtype for name in node.op.weights]
    if any(dtype.block > 1 for dtype in weights):
        return "quantized"
    narrow = {dtype.name for dtype in weights} & {"f16", "bf16"}
    return "bf16" if "bf16" in narrow else "f16" if narrow else "f32"


def paired(label: str, name: str, node: Node, ours: Array, theirs: Array, bound: float) -> Pair:
    """Our result of a node next to the other engine's tensor."""
    ways = fitted(ours, theirs)
    if not ways:
        return Pair(label, name, node, ours, theirs, "", None, inf)
    # If there are as many heads as tokens, two ways fit, and only the values tell which is right.
    a, b, note = min(ways, key=lambda way: nmse(way.ours, way.theirs))
    if node.dtype.kind == "int":  # chosen experts: engines list them in different orders
        a, b, bound = np.sort(a, -1), np.sort(b, -1), 0.0
    comparison = within(a, b, bound)
    with np.errstate(invalid="ignore"):
        distance = np.abs(np.asarray(a, np.float64) - b)
    largest = float(np.nanmax(distance)) if a.size and not np.isnan(distance).all() else inf
    return Pair(label, name, node, a, b, note, comparison, largest)


def details(pair: Pair) -> Iterator[str]:
    """A pair, and its worst elements."""
    yield str(pair)
    if pair.comparison is None:
        return
    a, b = np.asarray(pair.ours, np.float64), np.asarray(pair.theirs, np.float64)
    distance = np.abs(a - b)
    distance[np.isnan(distance)] = inf
    order = np.argsort(-distance, axis=None, kind="stable")[:WORST]
    yield f"  {'element':>20} {'ours':>16} {'theirs':>16} {'difference':>12}"
    for flat in order:
        at = tuple(int(i) for i in np.unravel_index(flat, a.shape))
        yield f"  {at!s:>20} {a[at]:16.9g} {b[at]:16.9g} {distance[at]:12.3g}"
    first = tuple(int(i) for i in np.argwhere(distance == distance.max())[0])
    row = first[:-1]
    rms = [float(np.sqrt(np.mean(x[row] ** 2))) for x in (a, b)]
    yield f"  row {row}: root mean square {rms[0]:.6g} and {rms[1]:.6g}"

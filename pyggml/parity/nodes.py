"""Compare a graph on two places, node by node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pyggml.errors import DeviceError, DTypeError, GraphError, OutOfMemoryError, UnsupportedOpError
from pyggml.graph import Graph, toposort
from pyggml.node import Node, label_of, labels
from pyggml.parity.alone import Alone, Array, Values, alone, contents, decoded, run_with
from pyggml.parity.report import Report, Row, labelled
from pyggml.parity.reproduce import write_script
from pyggml.parity.tolerance import CLASSES, STORAGE, Comparison, within
from pyggml.passes.order import state_edges
from pyggml.runtime.compile import compile
from pyggml.runtime.places import parse
from pyggml.runtime.plan import Plan

#: Outputs of the whole graph may differ by this multiple of the sum of their nodes' bounds.
#: Independent errors add up in the NMSE. A softmax, or a norm over terms that cancel, may magnify
#: them on their way, which is not a kernel's fault.
GAIN = 10.0
#: ... but never by more than this NMSE, a tenth in relative error.
FARTHEST = 1e-2
#: What a node of a narrow type adds: two numbers on either side of a rounding boundary, however
#: close, come out a whole step apart.
ROUNDED = {**STORAGE, **{name: CLASSES[name] for name in ("f16", "bf16")}}


def compare(
    outputs: Mapping[str, Node],
    a: str,
    b: str,
    inputs: Mapping[str, ArrayLike],
    *,
    states: Mapping[str, ArrayLike] | None = None,
    updates: Iterable[Node] = (),
    by: str = "node",
) -> Report:
    """Run the graph of `outputs` on the places a and b, and report the nodes where they differ.

        report = gg.compare({"y": y}, "numpy", "null", {"x": array})

    Every node runs alone on both places, from the values that `a` computed for its sources: errors
    do not add up, and a wrong node does not affect others. Then the whole graph runs on both, with
    all fusions, and its outputs and written states are compared within a wider bound.

    outputs, updates  as for compile
    inputs            an array for every input
    states            initial contents of states; zeros by default
    by                "step" also compares the result of each step of b's plan, in order: a runs the
                      whole graph node by node, without fusions, and b with them. The first row that
                      fails then shows a wrong fusion, also if a and b are the same place

    A node's bound is the sum of its op's bounds for the numeric classes that a and b declare
    (`pyggml/parity/tolerance.py`). A node without a kernel on a place runs there as its meaning. If
    that fails too, the node is "unsupported", and the other place's value is used from there on. If
    neither place has a value, nodes that read it are "skipped". The report is ok with none of both.

    Errors: UnknownNameError, GraphError, ShapeError or DTypeError for arrays; DeviceError,
    OutOfMemoryError.
    """
    graph = Graph(outputs, updates)
    if by not in ("node", "step"):
        raise DTypeError(f"by= must be 'node' or 'step', not {by!r}")
    leaves = contents(graph, inputs, {} if states is None else states)
    return Walk(graph, (a, b), leaves, by_step=by == "step").report()


@dataclass(frozen=True, slots=True)
class Failed:
    """No value from a place: a status of `Row`, and the reason."""

    status: str
    why: str


def _attempt(place: str, run: Callable[..., Any], *args: Any) -> Any:
    """The result of `run`, or Failed. An exception of any kind in a kernel is a failure."""
    try:
        return run(*args)
    except (DeviceError, OutOfMemoryError):
        raise
    except UnsupportedOpError as error:
        return Failed("unsupported", str(error))
    except Exception as error:
        return Failed("fail", f"{place} raised {type(error).__name__}: {error}")


class Walk:
    """Runs a graph on two places, with contents for all its leaves.

    by_step  compare the steps of the whole graph, on the first place without fusions
    """

    def __init__(
        self, graph: Graph, places: tuple[str, str], leaves: Values, by_step: bool = False
    ) -> None:
        for place in places:
            parse(place)  # an unknown place is an error before anything runs
        self.graph, self.places, self.leaves, self.by_step = graph, places, leaves, by_step
        self.order = toposort(graph.roots, state_edges(graph.nodes))

    def report(self) -> Report:
        """Compare every node, then the whole graph."""
        rows: dict[Node, Row] = {}

        def visit(single: Alone, values: Values) -> Array | None:
            result, value = self._compared(single, values)
            rows[single.node] = _row(self.names[single.node], single.node, result)
            return value

        walk(self.order, self.leaves, visit)
        ends = tuple(self._whole({node: row.bound or 0.0 for node, row in rows.items()}))
        return Report(*self.places, tuple(rows.values()), ends, self.script)

    def script(self, node: Node, bound: float, path: Path) -> None:
        """Write the script of a node; the values that it reads are computed again."""
        single, sources = alone(node), set(toposort([node])) - {node}

        def visit(earlier: Alone, values: Values) -> Array | None:
            sides = (_attempt(place, earlier.run, place, values) for place in self.places)
            return next((side[0] for side in sides if not isinstance(side, Failed)), None)

        order = [earlier for earlier in self.order if earlier in sources]
        values = walk(order, self.leaves, visit, keep=single.leaves)
        unknown = self._unknown(single, values)
        if unknown:
            raise GraphError(f"no script for {self.names[node]}: {unknown.why}")
        write_script(path, single, values, self.names[node], self.places, bound)

    @cached_property
    def names(self) -> dict[Node, str]:
        """A unique name for each node: its label `kq-0`, or op and number `mul_mat%12`."""
        shared = Counter(label_of(node) for node in self.graph.nodes)
        return {
            node: label_of(node) + ("" if labels(node) and shared[label_of(node)] == 1 else f"%{i}")
            for i, node in enumerate(self.graph.nodes)
        }

    def node(self, label: str) -> Node:
        """The computed node with this label; UnknownNameError unless there is exactly one."""
        computed = (n for n in self.order if not n.op.leaf and n.op.view is None)
        return labelled(label, {node: self.names[node] for node in computed})

    def _unknown(self, single: Alone, values: Values) -> Failed | None:
        for of in single.leaves:
            if of not in values:
                return Failed("skipped", f"it reads {self.names[of]}, which neither could compute")
        return None

    def _compared(self, single: Alone, values: Values) -> tuple[Comparison | Failed, Array | None]:
        """(comparison of a node's values on a and b, the value for its readers)"""
        unknown = self._unknown(single, values)
        if unknown:
            return unknown, None
        sides = [_attempt(place, single.run, place, values) for place in self.places]
        failed = [side for side in sides if isinstance(side, Failed)]
        good = [side for side in sides if not isinstance(side, Failed)]
        if failed:
            return failed[0], good[0][0] if good else None
        (want, bound_a), (got, bound_b) = good
        before = None if single.state is None else values[single.state]
        return difference(single.result, got, want, bound_a + bound_b, before), want

    def _whole(self, bounds: Mapping[Node, float]) -> Iterator[Row]:
        """A row for each output of the whole graph, and for each state that it writes."""
        fuses = (not self.by_step, True)
        sides = [_attempt(p, self._run, p, fuse) for p, fuse in zip(self.places, fuses)]
        failed = [side for side in sides if isinstance(side, Failed)]
        for key, (leaf, node) in self._ends().items():
            if failed:
                yield _row(key, leaf, failed[0])
                continue
            want, got = (side[key] for side in sides)
            bound = 0.0 if leaf.dtype.kind == "int" else together(node, bounds)
            yield _row(key, leaf, difference(leaf, got, want, bound, self.leaves.get(leaf)))

    def _ends(self) -> dict[str, tuple[Node, Node]]:
        """Results of the graph: name -> (tensor, the last node that computes it)."""
        ends = {key: (node, node) for key, node in {**self._steps, **self._outputs}.items()}
        for node in self.order:
            if node.op.writes is not None:
                ends[f"state {node.root.attrs['name']}"] = node.root, node
        return ends

    @property
    def _outputs(self) -> dict[str, Node]:
        return {f"output {key}": node for key, node in self.graph.outputs.items()}

    @cached_property
    def _steps(self) -> dict[str, Node]:
        """The results of the second place's steps that are nodes of the graph; none by node."""
        if not self.by_step:
            return {}
        plan = _attempt(self.places[1], self._plan, self._outputs, self.places[1], True)
        nodes = {n for n in self.order if n.op.writes is None} - set(self.graph.outputs.values())
        steps = () if isinstance(plan, Failed) else plan.steps
        return {f"step {self.names[s.node]}": s.node for s in steps if s.node in nodes}

    def _plan(self, outputs: Mapping[str, Node], place: str, fuse: bool) -> Plan:
        return compile(outputs, backends=[place], updates=self.graph.updates, fuse=fuse)

    def _run(self, place: str, fuse: bool) -> dict[str, Array]:
        plan = self._plan({**self._steps, **self._outputs}, place, fuse)
        results = run_with(plan, self.leaves)
        for key, (leaf, _) in self._ends().items():
            if key not in results:
                results[key] = plan.store.read(leaf.attrs["name"], raw=True)
        return results


def _row(label: str, node: Node, result: Comparison | Failed) -> Row:
    if isinstance(result, Failed):
        return Row(label, node, result.status, result.why)
    return Row(label, node, "ok" if result else "fail", result.why, result)


def together(node: Node, bounds: Mapping[Node, float], gain: float = GAIN) -> float:
    """The bound of a node that runs after all its sources; 0 if all their bounds are 0."""
    nodes = [n for n in toposort([node]) if n in bounds]
    total = sum(bounds[n] for n in nodes)
    rounded = sum(ROUNDED.get(n.dtype.name, 0.0) for n in nodes)
    return min(gain * (total + rounded), FARTHEST) if total else 0.0


def walk(
    order: Sequence[Node],
    leaves: Values,
    visit: Callable[[Alone, Values], Array | None],
    keep: Collection[Node] = (),
) -> Values:
    """Visit the computed nodes in order; return the values that remain.

    visit  (node alone, values of its sources) -> value, None for none
    keep   tensors whose values remain; others are freed after their last reader
    """
    last = {
        source.root: node
        for node in order
        if not node.op.leaf and node.op.view is None
        for source in node.src
        if source is not None
    }
    values = dict(leaves)
    for node in order:
        if node.op.leaf or node.op.view is not None:
            continue
        single, own = alone(node), node.root
        value = visit(single, values)
        if value is None:
            values.pop(own, None)  # a state's contents are unknown from here on
        elif own in last or own in keep:
            values[own] = value
        for of in single.leaves:
            if last[of] is node and not of.op.leaf and of not in keep:
                values.pop(of, None)
    return values


def difference(
    node: Node, got: Array, want: Array, bound: float, before: Array | None = None
) -> Comparison:
    """Compare two arrays in the storage of `node`'s type, except elements that both left as before.

    Unchanged rows of a large state would make the error of the written ones look small.
    """
    a, b = decoded(node, want), decoded(node, got)
    if before is not None:
        old = decoded(node, before)
        changed = (a != old) | (b != old)
        a, b = np.where(changed, a, 0), np.where(changed, b, 0)
    return within(b, a, bound)

"""Any graph on two places, node by node: where do they part?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pyggml.errors import DeviceError, GraphError, OutOfMemoryError, UnsupportedOpError
from pyggml.graph import Graph, toposort
from pyggml.node import Node, label_of, labels
from pyggml.parity.alone import Alone, Array, Values, alone, contents, decoded, run_with
from pyggml.parity.report import Report, Row, labelled
from pyggml.parity.reproduce import write_script
from pyggml.parity.tolerance import CLASSES, STORAGE, Comparison, within
from pyggml.passes.order import state_edges
from pyggml.runtime.compile import compile
from pyggml.runtime.places import parse

#: Outputs of the whole graph may differ by this many times what its nodes may differ together.
#: Errors that know nothing of each other add up in the NMSE; a softmax, or a norm over terms that
#: cancel, may make them relatively larger on their way, and that is no kernel's fault.
GAIN = 10.0
#: ... but by no more than this: a tenth in relative error is another result.
FARTHEST = 1e-2
#: What a node of a narrow type adds: numbers that differ in their last bit, on either side of a
#: rounding boundary, come out a whole step apart.
ROUNDED = {**STORAGE, **{name: CLASSES[name] for name in ("f16", "bf16")}}


def compare(
    outputs: Mapping[str, Node],
    a: str,
    b: str,
    inputs: Mapping[str, ArrayLike],
    *,
    states: Mapping[str, ArrayLike] | None = None,
    updates: Iterable[Node] = (),
) -> Report:
    """Run the graph of `outputs` on the places a and b, and say at which nodes they differ.

        report = gg.compare({"y": y}, "numpy", "null", {"x": array})

    Every node runs alone on both, from the values that `a` computed before it: errors do not add
    up, and no node is blamed for another. Then the whole graph runs on both, with all that the
    backends fuse, and outputs and written states are compared too, within a wider bound.

    outputs, updates  as for compile
    inputs            an array for every input
    states            what states hold before; zeros unless given

    A node's bound is the sum of two: that of its op in the numeric class which a declares, and in
    the one which b does (`pyggml/parity/tolerance.py`). A node that a place lacks runs there as its
    meaning. One that it cannot run at all is "unsupported": the other's value is carried on. Where
    that one fails too, nodes that read the value are "skipped". The report is ok with neither.

    Errors: UnknownNameError, GraphError, ShapeError or DTypeError for arrays; DeviceError,
    OutOfMemoryError.
    """
    graph = Graph(outputs, updates)
    return Walk(graph, (a, b), contents(graph, inputs, {} if states is None else states)).report()


@dataclass(frozen=True, slots=True)
class Failed:
    """What a place gives where it gives no value: a status of `Row`, and the reason."""

    status: str
    why: str


def _attempt(place: str, run: Callable[..., Any], *args: Any) -> Any:
    """What `run` returns, or Failed. A kernel may raise anything: that is a failure like others."""
    try:
        return run(*args)
    except (DeviceError, OutOfMemoryError):
        raise
    except UnsupportedOpError as error:
        return Failed("unsupported", str(error))
    except Exception as error:
        return Failed("fail", f"{place} raised {type(error).__name__}: {error}")


class Walk:
    """A graph, two places, and contents for all its leaves."""

    def __init__(self, graph: Graph, places: tuple[str, str], leaves: Values) -> None:
        for place in places:
            parse(place)  # one that does not exist is named before anything runs
        self.graph, self.places, self.leaves = graph, places, leaves
        self.order = toposort(graph.roots, state_edges(graph.nodes))

    def report(self) -> Report:
        """Every node, then the whole graph."""
        rows: dict[Node, Row] = {}

        def visit(single: Alone, values: Values) -> Array | None:
            result, value = self._compared(single, values)
            rows[single.node] = _row(self.names[single.node], single.node, result)
            return value

        walk(self.order, self.leaves, visit)
        ends = tuple(self._whole({node: row.bound or 0.0 for node, row in rows.items()}))
        return Report(*self.places, tuple(rows.values()), ends, self.script)

    def script(self, node: Node, bound: float, path: Path) -> None:
        """Write the script of a node; what it reads is computed again."""
        single, needed = alone(node), set(toposort([node])) - {node}

        def visit(earlier: Alone, values: Values) -> Array | None:
            sides = (_attempt(place, earlier.run, place, values) for place in self.places)
            return next((side[0] for side in sides if not isinstance(side, Failed)), None)

        order = [earlier for earlier in self.order if earlier in needed]
        values = walk(order, self.leaves, visit, keep=single.leaves)
        unknown = self._unknown(single, values)
        if unknown:
            raise GraphError(f"no script for {self.names[node]}: {unknown.why}")
        write_script(path, single, values, self.names[node], self.places, bound)

    @cached_property
    def names(self) -> dict[Node, str]:
        """A label that no other has for each: `kq-0`, or with its number `mul_mat%12`."""
        shared = Counter(label_of(node) for node in self.graph.nodes)
        return {
            node: label_of(node) + ("" if labels(node) and shared[label_of(node)] == 1 else f"%{i}")
            for i, node in enumerate(self.graph.nodes)
        }

    def node(self, label: str) -> Node:
        """The computed node of that label; UnknownNameError for none and for several."""
        computed = (n for n in self.order if not n.op.leaf and n.op.view is None)
        return labelled(label, {node: self.names[node] for node in computed})

    def _unknown(self, single: Alone, values: Values) -> Failed | None:
        for of in single.leaves:
            if of not in values:
                return Failed("skipped", f"it reads {self.names[of]}, which neither could compute")
        return None

    def _compared(self, single: Alone, values: Values) -> tuple[Comparison | Failed, Array | None]:
        """How a node's values on a and b compare, and the one to go on with."""
        unknown = self._unknown(single, values)
        if unknown:
            return unknown, None
        sides = [_attempt(place, single.run, place, values) for place in self.places]
        failed = [side for side in sides if isinstance(side, Failed)]
        made = [side for side in sides if not isinstance(side, Failed)]
        if failed:
            return failed[0], made[0][0] if made else None
        (want, bound_a), (got, bound_b) = made
        before = None if single.state is None else values[single.state]
        return difference(single.result, got, want, bound_a + bound_b, before), want

    def _whole(self, bounds: Mapping[Node, float]) -> Iterator[Row]:
        """A row for each output of the graph as it runs whole, and for each state it writes."""
        sides = [_attempt(place, self._run, place) for place in self.places]
        failed = [side for side in sides if isinstance(side, Failed)]
        for key, (leaf, node) in self._ends().items():
            if failed:
                yield _row(key, leaf, failed[0])
                continue
            want, got = (side[key] for side in sides)
            bound = 0.0 if leaf.dtype.kind == "int" else _together(node, bounds)
            yield _row(key, leaf, difference(leaf, got, want, bound, self.leaves.get(leaf)))

    def _ends(self) -> dict[str, tuple[Node, Node]]:
        """What the graph leaves: name -> (tensor, the last node that computes it)."""
        ends = {f"output {key}": (node, node) for key, node in self.graph.outputs.items()}
        for node in self.order:
            if node.op.writes is not None:
                ends[f"state {node.root.attrs['name']}"] = node.root, node
        return ends

    def _run(self, place: str) -> dict[str, Array]:
        plan = compile(self.graph.outputs, backends=[place], updates=self.graph.updates)
        made = {f"output {key}": array for key, array in run_with(plan, self.leaves).items()}
        for key, (leaf, _) in self._ends().items():
            if key not in made:
                made[key] = plan.store.read(leaf.attrs["name"], raw=True)
        return made


def _row(label: str, node: Node, result: Comparison | Failed) -> Row:
    if isinstance(result, Failed):
        return Row(label, node, result.status, result.why)
    return Row(label, node, "ok" if result else "fail", result.why, result)


def _together(node: Node, bounds: Mapping[Node, float]) -> float:
    """How far a node may be off when all before it ran too; exact where all of them are."""
    mine = [n for n in toposort([node]) if n in bounds]
    total = sum(bounds[n] for n in mine)
    rounded = sum(ROUNDED.get(n.dtype.name, 0.0) for n in mine)
    return min(GAIN * (total + rounded), FARTHEST) if total else 0.0


def walk(
    order: Sequence[Node],
    leaves: Values,
    visit: Callable[[Alone, Values], Array | None],
    keep: Collection[Node] = (),
) -> Values:
    """Visit the computed nodes in order; the values that are left.

    visit  gets the node alone and the values of what it reads; returns its own, None for none
    keep   tensors whose values are left; those of others are let go after their last reader
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
            values.pop(own, None)  # of a state: what it holds is unknown from here on
        elif own in last or own in keep:
            values[own] = value
        for of in single.leaves:
            if last[of] is node and not of.op.leaf and of not in keep:
                values.pop(of, None)
    return values


def difference(
    node: Node, got: Array, want: Array, bound: float, before: Array | None = None
) -> Comparison:
    """Two arrays as `node`'s type stores them; where neither changed `before`, they do not count.

    Untouched rows of a large state would make the error of the written ones look small.
    """
    a, b = decoded(node, want), decoded(node, got)
    if before is not None:
        held = decoded(node, before)
        changed = (a != held) | (b != held)
        a, b = np.where(changed, a, 0), np.where(changed, b, 0)
    return within(b, a, bound)

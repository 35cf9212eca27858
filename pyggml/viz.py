"""Drawings of graphs and plans as DOT text for Graphviz."""

from __future__ import annotations

from collections.abc import Mapping

from pyggml.graph import Graph
from pyggml.loop import loop_of
from pyggml.node import Node, label_of
from pyggml.runtime.memory import mib
from pyggml.runtime.plan import Plan
from pyggml.runtime.report import folds, rows_of
from pyggml.transfer import is_resident, origin, transfer

_LEAF_COLOURS = {"constant": "#dbe9f6", "input": "#fdebd0", "state": "#d5f5e3"}
_COPY_COLOUR = "#f9e79f"


def dot(what: Graph | Plan, name: str = "pyggml") -> str:
    """A graph or a plan as DOT text; draw it with `dot -Tsvg plan.dot -o plan.svg`.

    name   the name of the drawing, any text

    Ellipses are views, folders are loops, and sizes are in ne order. In a plan, each split is a box
    with its steps and the weights, states and views they use, and copies between devices are
    yellow. Repeated layers are drawn once, with the number of repeats.
    """
    drawing = _Drawing(what.graph) if isinstance(what, Plan) else _Drawing(what)
    if isinstance(what, Plan):
        drawing.fold(what)
    return "\n".join([f'digraph "{_escape(name)}" {{', *drawing.lines(what), "}"])


class _Drawing:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.twin: dict[Node, Node] = {}  # step of a repeat -> the same step of the first one
        self.times: dict[Node, int] = {}  # step -> how often it is repeated

    def fold(self, plan: Plan) -> None:
        """Find the steps that repeat."""
        rows = rows_of(plan._work)
        for fold in folds([row.key for row in rows]):
            if fold.times == 1 or fold.period == 1:
                continue
            repeats = rows[fold.start :][: fold.period * fold.times]
            for i, row in enumerate(repeats):
                first = repeats[i % fold.period]
                if row.step is None or first.step is None:
                    continue
                self.times[first.step.node] = fold.times
                if row is not first:
                    self.twin[row.step.node] = first.step.node

    def _visible(self) -> list[Node]:
        """The nodes to draw: steps that have no twin, and the leaves and views they read."""
        read: set[Node] = set(self.graph.roots)
        for node in reversed(self.graph.nodes):
            passive = node.op.view is not None or is_resident(node)
            if node not in self.twin and (node in read or not passive):
                read |= {node, *(s for s in node.src if s is not None)}
        return [node for node in self.graph.nodes if node in read and node not in self.twin]

    def lines(self, what: Graph | Plan) -> list[str]:
        visible = self._visible()
        index = {node: f"n{i}" for i, node in enumerate(visible)}
        lines = [
            '  graph [fontname="monospace", fontsize=11];',
            '  node [fontname="monospace", fontsize=10, style=filled];',
        ]
        boxes = _boxes(what)
        inside: dict[tuple[int, str], list[Node]] = {}
        for node in visible:
            if node in boxes:
                inside.setdefault(boxes[node], []).append(node)
        for (number, title), nodes in sorted(inside.items(), key=lambda box: box[0]):
            lines.append(f'  subgraph cluster_{number} {{ label="{_escape(title)}";')
            lines += [f"    {index[n]} [{self._style(n)}];" for n in nodes]
            lines.append("  }")
        lines += [f"  {index[n]} [{self._style(n)}];" for n in visible if n not in boxes]
        return lines + self._edges(index)

    def _edges(self, index: Mapping[Node, str]) -> list[str]:
        lines = []
        for node, key in index.items():
            for port, source in enumerate(node.src):
                if source is not None:
                    start = index[self.twin.get(source, source)]
                    lines.append(f'  {start} -> {key} [label="{port}", fontsize=8];')
        for i, (label, node) in enumerate(self.graph.outputs.items()):
            lines.append(f'  out{i} [label="{_escape(label)}", shape=cds, fillcolor="#f5b7b1"];')
            lines.append(f"  {index[self.twin.get(node, node)]} -> out{i};")
        return lines

    def _style(self, node: Node) -> str:
        loop = loop_of(node)
        shape = "box" if node.op.view is None else "ellipse"
        colour = _LEAF_COLOURS.get(node.op.name, "white")
        is_plain = label_of(node) == node.op.name or node.op.leaf
        title = label_of(node) if is_plain else f"{node.op.name} {label_of(node)}"
        size = str(node.spec)
        if loop is not None:
            shape, title = "folder", f"loop {loop} {label_of(node)}"
        if node.op is transfer:
            colour, title = _COPY_COLOUR, f"copy of {label_of(origin(node))}"
            size += f" {mib(node.spec.nbytes)} MiB"
        if node in self.times:
            size += f" ({self.times[node]} times)"
        return f'label="{_escape(title)}\\n{size}", shape={shape}, fillcolor="{colour}"'


def _boxes(what: Graph | Plan) -> dict[Node, tuple[int, str]]:
    """Node -> number and title of the box it is drawn in."""
    if isinstance(what, Graph):
        return {}
    titles = [f"split {i} on {split.backend.place}" for i, split in enumerate(what.splits)]
    return {node: (i, titles[i]) for node, i in _splits(what).items()}


def _splits(plan: Plan) -> dict[Node, int]:
    """Node -> the split it is drawn in.

    A view is drawn in the split that writes its memory. Weights, states and inputs are drawn with
    their first reader on their own device.
    """
    splits = {
        node: i
        for i, split in enumerate(plan.splits)
        for step in (*split.copies, *split.steps)
        for node in step.nodes
    }
    devices = [split.backend.device for split in plan.splits]
    readers = _readers(plan.graph, splits)
    for node in plan.graph.nodes:  # sources come before their views
        if node in splits:
            continue
        source = node.src[0] if node.op.view is not None else None
        if source is not None and not is_resident(node.root):
            splits[node] = splits[source]
            continue
        home = plan._work.home(node).device
        local = [i for i, device in enumerate(devices) if device == home]
        reading = [i for i in local if i in readers[node]]
        if local:  # otherwise no split runs on its device, and it is drawn outside the boxes
            splits[node] = min(reading or local)
    return splits


def _readers(graph: Graph, splits: Mapping[Node, int]) -> dict[Node, set[int]]:
    """Node -> the splits whose steps read it, directly or through views."""
    readers: dict[Node, set[int]] = {node: set() for node in graph.nodes}
    for node in reversed(graph.nodes):  # readers come before what they read
        used_by = {splits[node]} if node in splits else readers[node]
        for source in node.src:
            if source is not None:
                readers[source] |= used_by
    return readers


def _escape(text: str) -> str:
    """`text` escaped for a quoted DOT string."""
    printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return printable.replace("\\", "\\\\").replace('"', '\\"')

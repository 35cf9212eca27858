"""A graph or a plan as a picture: DOT text (`dot -Tsvg` draws it)."""

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
    """A graph or a plan as DOT text: `dot -Tsvg plan.dot -o plan.svg` draws it.

    name   the name of the drawing, any text

    Ellipses are views, folders are loops, and sizes are in ne order. In a plan each split is a box
    that holds its steps and the weights, states and views they use; copies between devices are
    yellow. Layers that repeat are drawn once, with the number of repeats.
    """
    drawing = _Drawing(what.graph) if isinstance(what, Plan) else _Drawing(what)
    if isinstance(what, Plan):
        drawing.fold(what)
    return "\n".join([f'digraph "{_quoted(name)}" {{', *drawing.lines(what), "}"])


class _Drawing:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.stands: dict[Node, Node] = {}  # step of a repeated part -> its like in the first one
        self.times: dict[Node, int] = {}

    def fold(self, plan: Plan) -> None:
        """Find what repeats."""
        rows = rows_of(plan._work)
        for fold in folds([row.key for row in rows]):
            if fold.times == 1 or fold.period == 1:
                continue
            part = rows[fold.start :][: fold.period * fold.times]
            for i, row in enumerate(part):
                first = part[i % fold.period]
                if row.step is None or first.step is None:
                    continue
                self.times[first.step.node] = fold.times
                if row is not first:
                    self.stands[row.step.node] = first.step.node

    def _shown(self) -> list[Node]:
        """Steps that nothing stands for, and the leaves and views that they read."""
        read: set[Node] = set(self.graph.roots)
        for node in reversed(self.graph.nodes):
            passive = node.op.view is not None or is_resident(node)
            if node not in self.stands and (node in read or not passive):
                read |= {node, *(s for s in node.src if s is not None)}
        return [node for node in self.graph.nodes if node in read and node not in self.stands]

    def lines(self, what: Graph | Plan) -> list[str]:
        shown = self._shown()
        index = {node: f"n{i}" for i, node in enumerate(shown)}
        lines = [
            '  graph [fontname="monospace", fontsize=11];',
            '  node [fontname="monospace", fontsize=10, style=filled];',
        ]
        boxes = _boxes(what)
        inside: dict[tuple[int, str], list[Node]] = {}
        for node in shown:
            if node in boxes:
                inside.setdefault(boxes[node], []).append(node)
        for (number, title), nodes in sorted(inside.items(), key=lambda box: box[0]):
            lines.append(f'  subgraph cluster_{number} {{ label="{_quoted(title)}";')
            lines += [f"    {index[n]} [{self._style(n)}];" for n in nodes]
            lines.append("  }")
        lines += [f"  {index[n]} [{self._style(n)}];" for n in shown if n not in boxes]
        return lines + self._edges(index)

    def _edges(self, index: Mapping[Node, str]) -> list[str]:
        lines = []
        for node, key in index.items():
            for port, source in enumerate(node.src):
                if source is not None:
                    start = index[self.stands.get(source, source)]
                    lines.append(f'  {start} -> {key} [label="{port}", fontsize=8];')
        for i, (label, node) in enumerate(self.graph.outputs.items()):
            lines.append(f'  out{i} [label="{_quoted(label)}", shape=cds, fillcolor="#f5b7b1"];')
            lines.append(f"  {index[self.stands.get(node, node)]} -> out{i};")
        return lines

    def _style(self, node: Node) -> str:
        loop = loop_of(node)
        shape = "box" if node.op.view is None else "ellipse"
        colour = _LEAF_COLOURS.get(node.op.name, "white")
        known = label_of(node) == node.op.name or node.op.leaf
        title = label_of(node) if known else f"{node.op.name} {label_of(node)}"
        size = str(node.spec)
        if loop is not None:
            shape, title = "folder", f"loop {loop} {label_of(node)}"
        if node.op is transfer:
            colour, title = _COPY_COLOUR, f"copy of {label_of(origin(node))}"
            size += f" {mib(node.spec.nbytes)} MiB"
        if node in self.times:
            size += f" ({self.times[node]} times)"
        return f'label="{_quoted(title)}\\n{size}", shape={shape}, fillcolor="{colour}"'


def _boxes(what: Graph | Plan) -> dict[Node, tuple[int, str]]:
    """Node -> the number and title of the split it is drawn in."""
    if isinstance(what, Graph):
        return {}
    titles = [f"split {i} on {split.backend.place}" for i, split in enumerate(what.splits)]
    return {node: (i, titles[i]) for node, i in _splits(what).items()}


def _splits(plan: Plan) -> dict[Node, int]:
    """Node -> its split. A view is drawn where its memory is written; what the store holds
    (weights, states, inputs) beside its first reader on its own device.
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
        here = [i for i, device in enumerate(devices) if device == home]
        near = [i for i in here if i in readers[node]]
        if here:  # else no split runs on its device: it stands alone
            splits[node] = min(near or here)
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


def _quoted(text: str) -> str:
    """Text as it may stand between the quotes of a DOT string."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return shown.replace("\\", "\\\\").replace('"', '\\"')

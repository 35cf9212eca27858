"""A graph as a picture: DOT text."""

from __future__ import annotations

from pyggml.dag import Graph
from pyggml.graph import Node, label_of
from pyggml.loop import loop_of

_LEAF_COLOURS = {"constant": "#dbe9f6", "input": "#fdebd0", "state": "#d5f5e3"}


def dot(graph: Graph, name: str = "graph") -> str:
    """The graph as DOT text (`dot -Tsvg` draws it). Views are ellipses, loops are folders."""
    index = {node: f"n{i}" for i, node in enumerate(graph.nodes)}
    lines = [f"digraph {name} {{", '  node [fontname="monospace", fontsize=10, style=filled];']
    for node, key in index.items():
        lines.append(f"  {key} [{_style(node)}];")
        for port, source in enumerate(node.src):
            if source is not None:
                lines.append(f'  {index[source]} -> {key} [label="{port}", fontsize=8];')
    for i, (label, node) in enumerate(graph.outputs.items()):
        lines.append(f'  out{i} [label="{_quoted(label)}", shape=cds, fillcolor="#f5b7b1"];')
        lines.append(f"  {index[node]} -> out{i};")
    return "\n".join([*lines, "}"])


def _style(node: Node) -> str:
    loop = loop_of(node)
    shape = "box" if node.op.view is None else "ellipse"
    colour = _LEAF_COLOURS.get(node.op.name, "white")
    title = label_of(node) if node.op.leaf else f"{node.op.name} {label_of(node)}"
    if loop is not None:
        shape, title = "folder", f"loop {loop} {label_of(node)}"
    text = f"{_quoted(title)}\\n{node.spec}"
    return f'label="{text}", shape={shape}, fillcolor="{colour}"'


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')

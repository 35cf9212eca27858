"""Pictures of a graph and of a plan's memory: DOT text, and a PNG of the arena over the steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pyggml.dag import Graph
from pyggml.errors import PyggmlError
from pyggml.graph import Node, label_of
from pyggml.loop import loop_of
from pyggml.reports import Memory

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


def arena_png(plans: Mapping[str, Memory], path: str | Path) -> None:
    """Draw how many bytes of the arena are live in each step, a line a plan. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PyggmlError("pictures need matplotlib: pip install 'pyggml[plot]'") from None
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, memory in plans.items():
        sizes = [nbytes / 2**20 for nbytes in memory.live]
        # Steps are placed by their share of the run: plans differ in how many they have.
        share = [100 * i / max(1, len(sizes)) for i in range(len(sizes) + 1)]
        text = f"{label}: arena {memory.compute / 2**20:.1f} MiB"
        axes.stairs(sizes, share, label=text, linewidth=1.6)
    axes.set_xlabel("steps of the run, %")
    axes.set_ylabel("live memory of the arena, MiB")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)

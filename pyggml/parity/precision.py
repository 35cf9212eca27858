"""Raising the precision of a whole graph."""

from __future__ import annotations

from pyggml.graph import Graph, rebuilt
from pyggml.node import Node


def precise(y: Node) -> Node:
    """A copy of the graph of `y` in which every op with an attribute `prec` has prec="f32"."""

    def rebuild(node: Node, src: tuple[Node | None, ...]) -> Node:
        if "prec" not in node.attrs:
            return rebuilt(node, src)
        return node.op.make(src, {**node.attrs, "prec": "f32"}, node.spec)

    return Graph({"y": y}).rewrite(rebuild).outputs["y"]

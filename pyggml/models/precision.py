"""A graph as it is, computed more precisely."""

from __future__ import annotations

from pyggml.graph import Graph, rebuilt
from pyggml.node import Node


def precise(y: Node) -> Node:
    """The same with prec="f32" for every op that has a precision."""

    def rebuild(node: Node, src: tuple[Node | None, ...]) -> Node:
        if "prec" not in node.attrs:
            return rebuilt(node, src)
        return node.op.make(src, {**node.attrs, "prec": "f32"}, node.spec)

    return Graph({"y": y}).rewrite(rebuild).outputs["y"]

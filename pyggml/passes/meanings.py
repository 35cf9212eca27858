"""Ops in simpler ops: an op's meaning replaces it where no kernel runs the op."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pyggml.backends.base import Backend
from pyggml.errors import GraphError
from pyggml.graph import rebuilt, toposort
from pyggml.interning import inherit
from pyggml.node import Node, copy_line, label_of, line_of
from pyggml.passes.work import Expanded


class Refused(Exception):
    """A device runs neither a node nor its meaning; the message says why."""


class Supported(NamedTuple):
    """A node that a device runs, with the nodes that simpler ops replaced on the way to it."""

    node: Node
    expanded: tuple[Expanded, ...] = ()


def on_device(node: Node, backend: Backend) -> Supported:
    """`node` if the device runs it, else its meaning with every part on the device.

    Errors: Refused.
    """
    reason = backend.supports(node)
    if reason is None:
        return Supported(node)
    if node.op.meaning is None:
        raise Refused(reason)
    expanded: list[Expanded] = []

    def settle(part: Node, _: Node) -> Node:
        supported = on_device(part, backend)
        expanded.extend(supported.expanded)
        return supported.node

    try:
        simpler = in_parts(node, settle)
    except Refused as refused:
        raise Refused(f"{reason}, and its meaning in simpler ops: {refused}") from None
    expanded.append(Expanded(label_of(node), node.op.name, backend.place, reason))
    return Supported(simpler, tuple(expanded))


def in_parts(node: Node, settle: Callable[[Node, Node], Node]) -> Node:
    """The meaning of `node` with each op in it replaced by `settle(op, the op before its sources
    were replaced)`.

    Errors: GraphError if the meaning does not fit the op's shape rule.
    """
    assert node.op.meaning is not None
    meaning = node.op.meaning(*node.src, **node.attrs)
    if not isinstance(meaning, Node):
        raise GraphError(
            f"{node!r} (at {line_of(node)}): the meaning of {node.op.name} must return a node, "
            f"not {type(meaning).__name__}"
        )
    if meaning.spec != node.spec:
        raise GraphError(
            f"{node!r} (at {line_of(node)}): the meaning of {node.op.name} gives {meaning.spec}, "
            f"its shape rule {node.spec}"
        )
    new = {s: s for s in node.src if s is not None}
    for part in toposort([meaning], stop=frozenset(new).__contains__):
        if part not in new:
            copy = rebuilt(copy_line(part, node), tuple(s and new[s] for s in part.src))
            simple = copy.op.leaf or copy.op.view is not None
            new[part] = inherit(copy if simple else settle(copy, part), part)
    return new[meaning]

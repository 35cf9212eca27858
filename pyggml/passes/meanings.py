"""Ops in simpler ops: an op's meaning replaces it where no kernel runs the op."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeAlias

from pyggml.backends.base import Backend
from pyggml.errors import GraphError
from pyggml.graph import rebuilt, toposort
from pyggml.interning import inherit
from pyggml.node import Node, copy_line, label_of, line_of
from pyggml.passes.work import Expanded

Parts: TypeAlias = Generator[tuple[Node, Node], Any, Node]


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
    if backend.supports(node) is None:
        return Supported(node)
    # Meanings may be nested thousands deep, so the ops under way are on a stack of our own.
    stack: list[tuple[Node, str, Parts]] = []
    expanded: list[Expanded] = []
    result: Node | None = node
    while True:
        assert result is not None
        reason = backend.supports(result)
        if reason is not None:
            if result.op.meaning is None:
                reasons = dict.fromkeys([*(reason for _, reason, _ in stack), reason])
                raise Refused(", and its meaning in simpler ops: ".join(reasons))
            stack.append((result, reason, _parts(result)))
            result = None
        while stack:
            whole, reason, parts = stack[-1]
            try:
                result, _ = parts.send(result)
                break
            except StopIteration as end:
                result = end.value
                stack.pop()
                expanded.append(Expanded(label_of(whole), whole.op.name, backend.place, reason))
        else:
            assert result is not None
            return Supported(result, tuple(expanded))


def in_parts(node: Node, settle: Callable[[Node, Node], Node]) -> Node:
    """The meaning of `node` with each op in it replaced by `settle(op, the op before its sources
    were replaced)`.

    Errors: GraphError if the meaning does not fit the op's shape rule.
    """
    parts, result = _parts(node), None
    while True:
        try:
            result = settle(*parts.send(result))
        except StopIteration as end:
            meaning: Node = end.value
            return meaning


def _parts(node: Node) -> Parts:
    """The ops of a meaning in order, as the arguments of `settle`; each is sent back settled."""
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
            new[part] = inherit(copy if simple else (yield copy, part), part)
    return new[meaning]

"""Ops in simpler ops: an op's meaning replaces it where no kernel runs the op."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple, TypeAlias

from pyggml.backends.base import Backend
from pyggml.errors import GraphError
from pyggml.graph import rebuilt, toposort
from pyggml.interning import inherit
from pyggml.node import Node, copy_line, label_of, line_of
from pyggml.passes.work import Expanded

#: settle(op, original) returns the node that takes the place of `op`, or None if its meaning does.
#: `original` is the op before its sources were replaced.
Settle: TypeAlias = Callable[[Node, Node], Node | None]
Parts: TypeAlias = Generator[tuple[Node, Node], Node | None, Node]


class Refused(Exception):
    """A device runs neither a node nor its meaning; the message says why.

    wholes  the nodes whose meanings contain the refused one, outermost first
    """

    wholes: tuple[Node, ...] = ()


class Supported(NamedTuple):
    """A node that a device runs, with the nodes that simpler ops replaced on the way to it."""

    node: Node
    expanded: tuple[Expanded, ...] = ()


def on_device(node: Node, backend: Backend, refused: dict[Node, str]) -> Supported:
    """`node` if the device runs it, else its meaning with every part on the device.

    refused  nodes with meanings that the device cannot run, and the reason of the part at fault;
             grows. It spares meanings nested in others from being tried once for each of them

    Errors: Refused.
    """
    reason = backend.supports(node)
    if reason is None:
        return Supported(node)
    expanded: list[Expanded] = []

    def settle(part: Node, original: Node) -> Node | None:
        reason = backend.supports(part)
        if reason is None:
            return part
        if not part.op.composes(part) or part in refused:
            raise Refused(refused.get(part, reason))
        expanded.append(Expanded(label_of(part), part.op.name, backend.place, reason))
        return None

    try:
        simpler = settle(node, node) or meaning_of(node, settle)
    except Refused as error:
        cause = str(error)
        refused.update(dict.fromkeys(error.wholes, cause))
        meaning = "" if cause == reason else f", and its meaning in simpler ops: {cause}"
        raise Refused(f"{reason}{meaning}") from None
    return Supported(simpler, tuple(expanded))


def meaning_of(node: Node, settle: Settle) -> Node:
    """The meaning of `node` with each op in it settled, and so on in the meanings that replace
    these.

    Errors: those of `settle`; GraphError if a meaning does not fit its op's shape rule.
    """
    # Meanings may be nested thousands deep, so an explicit stack replaces recursion.
    stack = [(node, _parts(node))]
    result: Node | None = None
    while stack:
        try:
            part, original = stack[-1][1].send(result)
        except StopIteration as end:
            result = end.value
            stack.pop()
            continue
        try:
            result = settle(part, original)
        except Refused as error:
            error.wholes = tuple(whole for whole, _ in stack)
            raise
        if result is None:
            stack.append((part, _parts(part)))
    assert result is not None
    return result


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
            settled = copy if simple else (yield copy, part)
            assert settled is not None
            new[part] = inherit(settled, part)
    return new[meaning]

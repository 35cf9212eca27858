"""Interning: equal nodes are one object.

Building the same node twice returns the same object, so common subexpressions are computed once
and nodes can be compared by identity. Leaves are the exception: each call makes a new one, and two
leaves of one name in a graph are an error.

Users' graphs share one table. A compilation has its own: passes carry labels over to the nodes that
they build, and these labels must not reach an equal node of another graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakValueDictionary

from pyggml.node import Attrs, Node, Sources, copy_line, copy_names, label, labels, line_of
from pyggml.spec import Spec
from pyggml.writes import note_write

if TYPE_CHECKING:
    from pyggml.operation import Op

Key: TypeAlias = tuple[object, ...]


class _Compilation:
    """The nodes of the graph that is being compiled, and the nodes that its passes have built."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = list(nodes)
        self.new_nodes: set[Node] = set()

    @cached_property
    def table(self) -> dict[Key, Node]:
        """The nodes by their keys; a compilation that builds no node does not need it."""
        return {key_of(n.op, n.src, n.attrs, n.spec): n for n in self._nodes if not n.op.leaf}

    def add(self, node: Node) -> None:
        """Add a node to the table, which is not made for it."""
        self.new_nodes.add(node)
        if "table" in self.__dict__:
            self.table[key_of(node.op, node.src, node.attrs, node.spec)] = node
        else:
            self._nodes.append(node)


_shared_nodes: WeakValueDictionary[Key, Node] = WeakValueDictionary()
_compilation: ContextVar[_Compilation | None] = ContextVar("compilation", default=None)


@contextmanager
def rewriting(nodes: Sequence[Node]) -> Iterator[None]:
    """Inside the context, new nodes belong only to the graph with these nodes."""
    token = _compilation.set(_Compilation(nodes))
    try:
        yield
    finally:
        _compilation.reset(token)


def node_table() -> MutableMapping[Key, Node]:
    """The table of nodes in use: the compilation's own, or the one that users' graphs share."""
    compilation = _compilation.get()
    return _shared_nodes if compilation is None else compilation.table


def key_of(op: Op[Any], src: Sources, attrs: Attrs, spec: Spec) -> Key:
    """A key that is equal for equal nodes."""
    return (op, src, *map(identity, attrs.values()), spec)


def identity(value: Any) -> Any:
    """A key that is equal only for values of the same type, value and sign of zero."""
    if isinstance(value, float) and value == 0.0:
        return (float, value, math.copysign(1.0, value))
    return value if isinstance(value, str) else (type(value), value)


def record_new(node: Node) -> None:
    """Record a new node: as built by a pass, or, if it writes a state, as the user's write."""
    compilation = _compilation.get()
    if compilation is not None:
        compilation.new_nodes.add(node)
    elif node.op.writes is not None:
        note_write(node, line_of(node))


def replanted(node: Node, src: Sources) -> Node:
    """In a compilation, `node` over new nodes that have the specs and strides of its sources, with
    its labels and line."""
    compilation = _compilation.get()
    assert compilation is not None
    new = node.over(src)
    compilation.add(new)
    copy_names(new, node)
    return new


def inherit(new: Node, old: Node) -> Node:
    """Give `new`, which replaces `old`, the labels and the line of `old`; return `new`.

    In a compilation, a node that the user built is left as it is: other graphs may contain it.
    """
    compilation = _compilation.get()
    if new is not old and (compilation is None or new in compilation.new_nodes):
        for text in labels(old):
            label(new, text)
        copy_line(new, old)
    return new

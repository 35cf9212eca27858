"""A record of the state writes that users have built, including those whose node is gone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref


@dataclass(slots=True)
class Write:
    """A write into a state.

    node      a weak reference to the node; its type is Any to avoid an import cycle
    text      the node's op and line
    in_graph  whether a compiled graph contains the node
    """

    node: ref[Any]
    text: str
    in_graph: bool = False


# Handle (a state, or the result of a write) -> the writes into it.
_writes: WeakKeyDictionary[Any, list[Write]] = WeakKeyDictionary()


def note_write(node: Any, line: str) -> None:
    """Record that the user built `node`, which writes into a state, at `line`."""
    _writes.setdefault(_handle(node), []).append(Write(ref(node), f"{node.op.name} at {line}"))


def note_graph(nodes: Iterable[Any]) -> None:
    """Record that the writes among these nodes are in a compiled graph."""
    for node in nodes:
        if node.op.writes is not None:
            for write in writes_of(_handle(node)):
                write.in_graph |= write.node() is node


def writes_of(handle: Any) -> list[Write]:
    """The writes into `handle`."""
    return _writes.get(handle, [])


def _handle(node: Any) -> Any:
    target = node.src[node.op.writes]
    while target.op.view is not None:
        target = target.src[0]
    return target

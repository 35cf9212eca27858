"""A record of the state writes that users built, even if their nodes no longer exist."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref


@dataclass(slots=True)
class Write:
    """A node that writes into a state. Its type is Any because pyggml.node imports this module.

    node      a weak reference to the node
    text      its op and line
    in_graph  whether a compiled graph contains it
    """

    node: ref[Any]
    text: str
    in_graph: bool = False


# Handle, a state or the result of a write -> the writes into it.
_writes: WeakKeyDictionary[Any, list[Write]] = WeakKeyDictionary()


def note_write(node: Any, line: str) -> None:
    """Record that the user built `node`, a state write, at `line`."""
    _writes.setdefault(_handle(node), []).append(Write(ref(node), f"{node.op.name} at {line}"))


def note_graph(nodes: Iterable[Any]) -> None:
    """Record that the writes among these nodes are in a compiled graph."""
    for node in nodes:
        if node.op.writes is not None:
            for write in writes_of(_handle(node)):
                write.in_graph |= write.node() is node


def writes_of(handle: Any) -> list[Write]:
    """The writes that were built into `handle`."""
    return _writes.get(handle, [])


def _handle(node: Any) -> Any:
    target = node.src[node.op.writes]
    while target.op.view is not None:
        target = target.src[0]
    return target

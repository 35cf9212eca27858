"""Writes into states that users built, whether or not somebody still holds them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref


@dataclass(slots=True)
class Write:
    """A node that writes into a state. Nodes are Any here: they are built on this module.

    node       the node, None once nobody holds it
    text       its op and line
    in_graph   whether a graph that was compiled has it
    """

    node: ref[Any]
    text: str
    in_graph: bool = False


# What a write replaces, a state or the result of an earlier write -> writes.
_writes: WeakKeyDictionary[Any, list[Write]] = WeakKeyDictionary()


def note_write(node: Any, line: str) -> None:
    """A user built `node`, which writes into a state, at that line."""
    _writes.setdefault(_handle(node), []).append(Write(ref(node), f"{node.op.name} at {line}"))


def note_graph(nodes: Iterable[Any]) -> None:
    """These nodes are compiled."""
    for node in nodes:
        if node.op.writes is not None:
            for write in writes_of(_handle(node)):
                write.in_graph |= write.node() is node


def writes_of(handle: Any) -> list[Write]:
    """What was built to write into `handle`."""
    return _writes.get(handle, [])


def _handle(node: Any) -> Any:
    target = node.src[node.op.writes]
    while target.op.view is not None:
        target = target.src[0]
    return target

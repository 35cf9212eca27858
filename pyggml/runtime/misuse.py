"""Warnings about legal graphs that are probably mistakes.

State writes that never happen or that a reader misses, and ids and positions past what is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pyggml.errors import IdError, StateWarning
from pyggml.graph import Graph, toposort
from pyggml.node import Node, label_of, line_of
from pyggml.ops.attention import causal_mask, first_past
from pyggml.ops.copy import set_rows
from pyggml.ops.leaf import input_op
from pyggml.ops.views import view_op
from pyggml.passes.order import versions
from pyggml.passes.work import written
from pyggml.where import warn
from pyggml.writes import Write, writes_of

# -- checks of the graph --------------------------------------------------------------------------


def stale_reads(graph: Graph) -> Iterator[str]:
    """A warning for each state handle that is read where a write the user built is missed."""
    seen = versions(graph.nodes)
    replaced = {seen[written(node)]: node for node in graph.nodes if node.op.writes is not None}
    for handle, readers in _readers(graph, seen).items():
        state, write = label_of(handle.root), replaced.get(handle)
        if write is None:
            dropped = next((w for w in writes_of(handle) if _is_dropped(w, graph)), None)
            if dropped is not None:
                yield (
                    f"{_at(readers[0])} reads the state {state!r}, but {dropped.text}, which "
                    "writes it, never runs because nothing uses the handle it returned; read that "
                    "handle, or pass it in updates="
                )
        elif _comes_late(graph, write):
            before = set(toposort([write]))
            reader = next((reader for reader in readers if reader not in before), None)
            if reader is not None:
                yield (
                    f"{_at(reader)} reads the state {state!r} before {_at(write)} writes it, so it "
                    "misses the rows of this run; read the handle that the write returned"
                )


def _readers(graph: Graph, seen: Mapping[Node, Node]) -> dict[Node, list[Node]]:
    """Handle of a state -> the nodes that read it, in order."""
    readers: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        for i, source in enumerate(node.src):
            if source is None or source not in seen:
                continue
            if node.op.view is None and i != node.op.writes:
                readers.setdefault(seen[source], []).append(node)
    return readers


def _is_dropped(write: Write, graph: Graph) -> bool:
    """Whether a write that is in no compiled graph was probably meant for this one.

    It was if its handle is gone, or if this graph has all inputs that it depends on. Other writes
    may belong to another plan.
    """
    node = write.node()
    if write.in_graph or node is None:
        return not write.in_graph
    inputs = {node for node in toposort([node]) if node.op is input_op}
    return bool(inputs) and inputs <= set(graph.nodes)


def _comes_late(graph: Graph, write: Node) -> bool:
    """Whether a write only stores rows for later runs.

    That is, no node of the graph reads its handle, and no other node reads its rows.
    """
    return (
        write.op is set_rows
        and write in graph.updates
        and not any(_users(graph, write))
        and all(user is write for user in _users(graph, write["b"].base))
    )


def _users(graph: Graph, node: Node) -> Iterator[Node]:
    """The nodes that read `node`, directly or through views."""
    nodes = [node]
    while nodes:
        for user in graph.users[nodes.pop()]:
            if user.op.view is None:
                yield user
            else:
                nodes.append(user)


def _at(node: Node) -> str:
    return f"{node.op.name} at {line_of(node)}"


# -- checks of input values -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Limit:
    """The limit that the numbers in an input must stay below.

    text      what a number at or above it means
    is_error  raise an IdError, not a StateWarning
    """

    input: str
    below: int
    text: str
    is_error: bool

    def exceeded(self, number: int) -> None:
        """IdError or StateWarning for a number that is not below the limit."""
        text = f"input {self.input!r} contains {number}: {self.text}"
        if self.is_error:
            raise IdError(text)
        warn(text, StateWarning)


def limits(graph: Graph) -> Iterable[Limit]:
    """The limits of inputs that are positions of a causal mask or ids of rows to write.

    All layers of a model write the same rows: equal limits are one.
    """
    first: dict[tuple[str, int, bool], Limit] = {}
    for limit in _limits(graph):
        first.setdefault((limit.input, limit.below, limit.is_error), limit)
    return first.values()


def _limits(graph: Graph) -> Iterator[Limit]:
    for node in graph.nodes:
        if node.op is causal_mask and (key := _input(node["pos"])) is not None:
            if node.get("kv_end") is not None:
                continue
            past = first_past(node)
            below = "n_kv" if node.attrs["stride"] == 1 else str(past)
            text = (
                f"a position of {_at(node)} with n_kv={node.attrs['n_kv']} keys. Positions must be "
                f"below {below}, or the token does not see its own key; a negative position sees "
                "no key"
            )
            yield Limit(key, past, text, is_error=True)
        elif node.op is set_rows and (key := _input(node["ids"])) is not None:
            view, rows = _rows_read(graph, node)
            if view is not None and rows < node.ne[1]:
                text = (
                    f"a row that {_at(node)} writes, but {_at(view)} reads only the first {rows} "
                    "rows"
                )
                yield Limit(key, rows, text, is_error=False)


def _input(node: Node) -> str | None:
    """The name of the input that `node` shows completely, else None."""
    base = node.base
    if base.op is not input_op:
        return None
    return str(base.attrs["name"]) if base.spec.elements == node.spec.elements else None


def _rows_read(graph: Graph, write: Node) -> tuple[Node | None, int]:
    """The view that shows the most rows of a written state, and their number.

    None if something may read all rows.
    """
    users = graph.users[write]
    if not users or write in graph.outputs.values():
        return None, 0
    views: list[tuple[int, Node]] = []
    for user in users:
        if user.op is not view_op or user.ne[0] != write.ne[0]:
            return None, 0
        start, step = user.attrs["start"][1], user.attrs["step"][1]
        views.append((start + (user.ne[1] - 1) * step + 1, user))
    rows, view = max(views, key=lambda pair: pair[0])
    return view, rows

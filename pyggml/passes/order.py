"""The order of all nodes: sources first, readers of a state before its writers.

Order follows from data. A write to a state returns a new handle. Readers of the old handle run
before the write; a reader of the old handle that depends on the write is an error, and so are two
writes of one handle. (ggml runs nodes in the order in which they were built.) Writes that no
output needs are listed in `updates=`.

The same order holds on every device, so each lifetime is an interval of it and each arena is
packed alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from heapq import heappop, heappush

from pyggml.errors import GraphError
from pyggml.graph import Graph, toposort
from pyggml.node import Node, line_of
from pyggml.ops.leaf import state_op
from pyggml.ops.views import bases
from pyggml.passes.work import Work, runs
from pyggml.transfer import origin, transfer

Edges = Mapping[Node, tuple[Node, ...]]


def order(work: Work) -> Work:
    """One order for all nodes: sources first, readers of a state before its writers.

    With several devices each goes on as long as it has something to do.
    """
    edges = state_edges(work.graph.nodes)
    nodes = toposort(work.graph.roots, edges)
    if work.several:
        nodes = _in_runs(work, nodes, edges)
    return replace(work, order=nodes)


def _in_runs(work: Work, order: Sequence[Node], edges: Edges) -> tuple[Node, ...]:
    """`order` with as few changes of device as going on where one is gives.

    Views and transfers come right before the first node that reads them: what a device borrows
    stands in its memory only while it is needed.
    """
    steps = [node for node in order if runs(node) and node.op is not transfer]
    number = {node: i for i, node in enumerate(steps)}
    readers: dict[Node, list[Node]] = {}  # transfer -> the steps for which it is made
    needs: dict[Node, set[Node]] = {}
    for node in steps:
        needs[node] = set()
        for source in bases(node):
            if source.op is transfer:
                readers.setdefault(source, []).append(node)
                source = origin(source).base
            if source in number:
                needs[node].add(source)
    for write, before in edges.items():
        for reader in before:
            needs[write].update(readers.get(reader, [reader]))
        needs[write].discard(write)
    waiting = {node: len(found) for node, found in needs.items()}
    users: dict[Node, list[Node]] = {node: [] for node in steps}
    for node, found in needs.items():
        for source in found:
            users[source].append(node)
    ready: dict[str, list[int]] = {backend.device: [] for backend in work.backends}
    for node in steps:
        if not waiting[node]:
            heappush(ready[work.home(node).device], number[node])
    made: dict[Node, None] = {}
    device = ""
    while any(ready.values()):
        if not ready.get(device):
            device = min((d for d in ready if ready[d]), key=lambda d: ready[d][0])
        node = steps[heappop(ready[device])]
        _emit(node, made)
        for user in users[node]:
            waiting[user] -= 1
            if not waiting[user]:
                heappush(ready[work.home(user).device], number[user])
    for node in order:  # views and leaves that only outputs look at
        _emit(node, made)
    return tuple(made)


def _emit(node: Node, made: dict[Node, None]) -> None:
    """`node` after the views, transfers and leaves that it reads."""
    made.update(dict.fromkeys(toposort([node], stop=made.__contains__)))


def check_order(graph: Graph) -> None:
    """GraphError where reads and writes of states have no order.

    `order` finds that too; before transfers stand in the graph, the nodes it names are the user's.
    """
    toposort(graph.roots, state_edges(graph.nodes))


# -- states -----------------------------------------------------------------------------------


def versions(nodes: Iterable[Node]) -> dict[Node, Node]:
    """For every node that looks at a state: the handle whose values it sees.

    The state itself before any write, else the write (`set_rows`, `cpy`) that made the handle.
    """
    seen: dict[Node, Node] = {}
    for node in nodes:
        if node.op is state_op or node.op.writes is not None:
            seen[node] = node
        elif node.op.view is not None and node.src[0] in seen:
            seen[node] = seen[node.src[0]]
    return seen


def state_writes(nodes: Iterable[Node], seen: dict[Node, Node]) -> dict[Node, Node]:
    """Handle -> the one write that replaces it."""
    writes: dict[Node, Node] = {}
    for node in nodes:
        if node.op.writes is None:
            continue
        target = node.src[node.op.writes]
        assert target is not None
        first = writes.setdefault(seen[target], node)
        if first is not node:
            raise GraphError(
                f"{node!r} (at {line_of(node)}) and {first!r} (at {line_of(first)}) write the same "
                f"handle of {seen[target]!r}: let the second write into what the first returned "
                "(after cpy into a part, into a view of state_of(...) of it)"
            )
    return writes


def state_edges(nodes: Iterable[Node]) -> dict[Node, tuple[Node, ...]]:
    """For each write the readers of the handle it replaces: they run before it."""
    nodes = tuple(nodes)
    seen = versions(nodes)
    writes = state_writes(nodes, seen)
    before: dict[Node, list[Node]] = {}
    for node in nodes:
        if node.op.view is not None:
            continue
        for i, source in enumerate(node.src):
            if source is None or i == node.op.writes or source not in seen:
                continue
            write = writes.get(seen[source])
            if write is node:
                raise GraphError(
                    f"{node!r} (at {line_of(node)}) reads the state that it writes; "
                    "copy what it reads with cont first"
                )
            if write is not None:
                before.setdefault(write, []).append(node)
    return {write: tuple(readers) for write, readers in before.items()}

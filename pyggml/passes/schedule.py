"""The order of nodes, and splits: runs of one device with their copies, waits and signals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from heapq import heappop, heappush

from pyggml.backends.base import Backend, Step, own_nodes
from pyggml.graph import toposort
from pyggml.node import Node
from pyggml.ops.leaf import constant_op
from pyggml.passes.borders import bases
from pyggml.passes.lowering import lower
from pyggml.passes.states import state_edges
from pyggml.passes.work import Split, Work
from pyggml.transfer import is_resident, origin, transfer

Edges = Mapping[Node, tuple[Node, ...]]


def runs(node: Node) -> bool:
    """Whether some step computes the node."""
    return not is_resident(node) and node.op.view is None


def order_nodes(work: Work) -> Work:
    """One order for all nodes: sources first, readers of a state before its writers.

    With several devices each goes on as long as it has something to do.
    """
    edges = state_edges(work.graph.nodes)
    order = toposort(work.graph.roots, edges)
    if work.several:
        order = _in_runs(work, order, edges)
    return replace(work, order=order)


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


# -- splits -----------------------------------------------------------------------------------


def lower_nodes(work: Work) -> Work:
    """Splits: runs of one device lowered by its backend, with the copies that they wait for."""
    users = work.graph.users
    layouts = {
        node: work.home(node).weight_layout(origin(node), users[node])
        for node in work.order
        if origin(node).op is constant_op and node in users
    }
    work = replace(work, layouts=layouts)
    groups: list[tuple[Backend, list[Node]]] = []
    for node in work.order:
        if runs(node):
            home = work.home(node)
            if not groups or groups[-1][0] is not home:
                groups.append((home, []))
            groups[-1][1].append(node)
    splits = [_split(work, backend, nodes, users) for backend, nodes in groups]
    own = {node: s.backend for s in splits for node in own_nodes(work.order, s.steps)}
    work = replace(work, homes={**work.homes, **own})
    return replace(work, splits=tuple(_with_waits(work, splits)))


def _split(
    work: Work, backend: Backend, nodes: list[Node], users: Mapping[Node, list[Node]]
) -> Split:
    copies = {n: None for n in nodes if n.op is transfer and n not in work.layouts}
    rest = [n for n in nodes if n not in copies]
    roots, layouts = set(work.graph.roots), work.layouts
    steps = lower(rest, backend, roots, users, work.scores, layouts, work.fuse)
    return Split(backend, tuple(Step(n, (n,), (origin(n),)) for n in copies), tuple(steps))


def _with_waits(work: Work, splits: Sequence[Split]) -> Iterator[Split]:
    """Splits with what must be over before each: values that it copies, and copies that others
    make of memory which it may use again."""
    made = {
        node: i for i, split in enumerate(splits) for step in split.steps for node in step.nodes
    }
    copying: dict[str, dict[str, int]] = {}  # device -> who copies from it since its last split
    for i, split in enumerate(splits):
        mine = split.backend.device
        waits: dict[str, int] = {}
        for step in split.copies:
            source = origin(step.node).base
            device = work.home(source).device
            if source in made:
                waits[device] = max(made[source], waits.get(device, 0))
            if mine != "host":  # for the host, the other device does it in its turn
                copying.setdefault(device, {})[mine] = i
        spares = copying.pop(mine, {})
        yield replace(
            split, waits=tuple(sorted(waits.values())), spares=tuple(sorted(spares.values()))
        )

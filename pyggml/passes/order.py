"""Puts all nodes in one order: sources first, readers of a state before its writers.

The order follows from the data. A write to a state returns a new handle, and readers of the old
handle run before the write. It is an error if such a reader depends on the write, or if two writes
replace the same handle. (ggml runs nodes in the order in which they were built.) Writes that no
output needs are listed in `updates=`.

The order is the same for all devices, so each lifetime is an interval of it, and each device's
arena is packed on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from heapq import heappop, heappush

from pyggml.errors import GraphError
from pyggml.graph import Graph, toposort
from pyggml.node import Node, line_of
from pyggml.ops.leaf import constant_op, state_op
from pyggml.ops.views import bases
from pyggml.passes.ahead import borrowed, loads_ahead, reads_ahead
from pyggml.passes.jointly import joint_edges
from pyggml.passes.work import Work, runs, viewed, written
from pyggml.transfer import origin, transfer

Edges = Mapping[Node, tuple[Node, ...]]


def order(work: Work) -> Work:
    """The work with `order` filled in.

    With several devices, each one goes on as long as it has a step that can run; what the host
    waits for comes first.
    """
    edges = {**state_edges(work.graph.nodes), **joint_edges(work)}
    nodes = soon(work.graph, edges)
    if work.several:
        nodes = _few_switches(work, nodes, edges)
    return replace(work, order=nodes)


def soon(graph: Graph, edges: Edges) -> tuple[Node, ...]:
    """All nodes; a write that no output needs comes as soon as it can, with what it alone needs
    right before it. At the end of the graph it would keep a tensor of each layer until then: with
    61 layers of DeepSeek-V3.2 that are 1.6 GiB, for rows that only an indexer reads.
    """
    nodes = toposort(graph.roots, edges)
    needed = toposort(graph.outputs.values(), edges)
    if not needed or len(needed) == len(nodes):
        return nodes
    place = {node: i for i, node in enumerate(needed)}  # that of the node it follows
    after: list[list[Node]] = [[] for _ in needed]
    writes = set(graph.updates)
    waiting: list[Node] = []
    last = 0
    for node in nodes:
        if node in place:
            continue
        waiting.append(node)
        sources = [s for s in (*node.src, *edges.get(node, ())) if s is not None]
        last = max([last, *(place[s] for s in sources if s in place)])
        if node in writes:
            after[last] += waiting
            place |= dict.fromkeys(waiting, last)
            waiting, last = [], 0
    return tuple(n for node, rest in zip(needed, after) for n in (node, *rest))


def _few_switches(work: Work, nodes: Sequence[Node], edges: Edges) -> tuple[Node, ...]:
    """`nodes` in an order that seldom changes the device.

    Views and transfers come right before the first step that reads them, so that a device holds
    what it borrows only while it needs it; what it reads ahead comes one product earlier. So do
    steps that read constants only: a device that waits for another could run those of all layers.
    Transfers of results to the host come right after the results: the host waits for them, and the
    device can meanwhile go on. Not with joint steps: what devices do together starts with the last
    of them, so nothing may read it before.
    """
    fixed = _of_constants(work, nodes)
    steps = [node for node in nodes if runs(node) and node.op is not transfer and node not in fixed]
    needs = _needs(steps, edges)
    host = {step for step in steps if work.home(step).device == "host"}
    stages = _stages(steps, needs, host)
    if work.shard is not None:
        sequence = _by_level(steps, needs, lambda step: work.home(step).device)
    else:
        sequence = list(_by_device(steps, needs, stages, lambda step: work.home(step).device))
    sends = {} if any(step.op.joint for step in steps) else _sends(sequence, stages)
    loads = loads_ahead(work, sequence, sends) if reads_ahead(work) else {}
    ordered: dict[Node, None] = {}
    for step in sequence:
        for part in ([*borrowed(step), *loads.get(step, ())], [step, *sends.get(step, ())]):
            missing = toposort(part, stop=ordered.__contains__)
            ordered.update(dict.fromkeys(missing))
    ordered.update(dict.fromkeys(nodes))  # what only an output reads
    return tuple(ordered)


def _of_constants(work: Work, nodes: Sequence[Node]) -> set[Node]:
    """Nodes that depend on constants of their device alone, and whose readers are all there."""
    fixed: set[Node] = set()
    for node in nodes:
        constants = (s.op is constant_op or s in fixed for s in node.src if s is not None)
        if node.src and node.op is not transfer and all(constants):
            fixed.add(node)
    for node in reversed(nodes):  # a reader that is elsewhere, or is a transfer to there
        for source in node.src:
            if source in fixed and node not in fixed and work.home(node) != work.home(source):
                fixed.discard(source)
    return fixed


def _sends(sequence: Sequence[Node], stages: Mapping[Node, int]) -> dict[Node, list[Node]]:
    """Step -> the transfers to the host that come right after it.

    All results that a stage of the host reads leave together, after the last of them.
    """
    number = {step: i for i, step in enumerate(sequence)}
    results: dict[int, dict[Node, int]] = {}  # stage -> transfer -> number of the step it copies
    seen: set[Node] = set()
    for step in sequence:
        for source in bases(step) if step in stages else ():
            if source.op is transfer and source not in seen:
                seen.add(source)
                if (computed := number.get(origin(source).base)) is not None:
                    results.setdefault(stages[step], {})[source] = computed
    sends: dict[Node, list[Node]] = {}
    for numbers in results.values():
        sends.setdefault(sequence[max(numbers.values())], []).extend(numbers)
    return sends


def _needs(steps: Sequence[Node], edges: Edges) -> dict[Node, set[Node]]:
    """Step -> the steps that must run before it. A transfer counts as part of its readers: it runs
    when they do."""
    needs: dict[Node, set[Node]] = {step: set() for step in steps}
    readers: dict[Node, list[Node]] = {}  # of transfers
    for step in steps:
        for source in bases(step):
            if source.op is transfer:
                readers.setdefault(source, []).append(step)
                source = origin(source).base
            if source in needs:
                needs[step].add(source)
    for write, earlier in edges.items():
        for reader in earlier:
            needs[write].update(readers.get(reader, [reader]))
        needs[write].discard(write)
    return needs


def _by_device(
    steps: Sequence[Node],
    needs: Mapping[Node, set[Node]],
    stages: Mapping[Node, int],
    device_of: Callable[[Node], str],
) -> Iterator[Node]:
    """Each step after those that it needs, on one device for as long as it has a step to run.

    Of its steps, those come first that the host waits for, in the order of the host's stages.
    Otherwise in the order of `steps`; the next device is that of the first step that can run.
    """
    number = {step: i for i, step in enumerate(steps)}
    users = _users(needs)
    awaited = _awaited(needs, stages)
    missing = {step: len(sources) for step, sources in needs.items()}
    ready: dict[str, list[tuple[int, int]]] = {}  # device -> heap of the steps that can run

    def add(step: Node) -> None:
        urgency = awaited.get(step, len(steps))
        heappush(ready.setdefault(device_of(step), []), (urgency, number[step]))

    for step in steps:
        if not missing[step]:
            add(step)
    device = ""
    while ready:
        if device not in ready:
            device = min(ready, key=lambda name: ready[name][0][1])
        step = steps[heappop(ready[device])[1]]
        if not ready[device]:
            del ready[device]
        yield step
        for user in users[step]:
            missing[user] -= 1
            if not missing[user]:
                add(user)


def _by_level(
    steps: Sequence[Node], needs: Mapping[Node, set[Node]], device_of: Callable[[Node], str]
) -> list[Node]:
    """The steps of all devices up to their first collective, then up to the next, and so on.

    A step is behind as many collectives as it has to wait for other devices. If each device went on
    for as long as it can, the others would wait for all that it computes after a collective. Joint
    steps do not count: the devices of one have the same level, and go on from there.
    """
    level: dict[Node, int] = {}
    places: dict[str, int] = {}
    for step in steps:
        device = device_of(step)
        places.setdefault(device, len(places))
        crosses = (not step.op.joint and device_of(s) != device for s in needs[step])
        level[step] = max((level[s] + c for s, c in zip(needs[step], crosses)), default=0)
    return sorted(steps, key=lambda step: (level[step], places[device_of(step)]))


def _users(needs: Mapping[Node, set[Node]]) -> dict[Node, list[Node]]:
    users: dict[Node, list[Node]] = {step: [] for step in needs}
    for step, sources in needs.items():
        for source in sources:
            users[source].append(step)
    return users


def _stages(
    steps: Sequence[Node], needs: Mapping[Node, set[Node]], host: Collection[Node]
) -> dict[Node, int]:
    """Step of the host -> its stage: how often data must change between the host and other devices
    before it can run. The host runs a stage without waiting for another device."""
    if not host:
        return {}
    users, missing = _users(needs), {step: len(needs[step]) for step in steps}
    stages = dict.fromkeys(steps, 0)
    ready = [step for step in steps if not missing[step]]
    for step in ready:
        for user in users[step]:
            crosses = (step in host) != (user in host)
            stages[user] = max(stages[user], stages[step] + crosses)
            missing[user] -= 1
            if not missing[user]:
                ready.append(user)
    return {step: stages[step] for step in steps if step in host}


def _awaited(needs: Mapping[Node, set[Node]], stages: Mapping[Node, int]) -> dict[Node, int]:
    """Step of another device -> the first stage of the host that waits for it, with no step of the
    host in between."""
    awaited: dict[Node, int] = {}
    for step in sorted(stages, key=stages.__getitem__):
        stack = [step]
        while stack:
            for source in needs[stack.pop()]:
                if source not in awaited and source not in stages:
                    awaited[source] = stages[step]
                    stack.append(source)
    return awaited


def checked_order(graph: Graph) -> tuple[Node, ...]:
    """All nodes in an order in which they can run; GraphError if reads and writes of states allow
    none.

    `order` finds the same errors, but after `cross` they would name copies of the user's nodes.
    """
    return toposort(graph.roots, state_edges(graph.nodes))


# -- states -----------------------------------------------------------------------------------


def versions(nodes: Iterable[Node]) -> dict[Node, Node]:
    """Node -> the handle of a state whose values it shows, for states, writes and their views.

    A handle is the state itself, before any write, or a write (`set_rows`, `cpy`).
    """
    handles: dict[Node, Node] = {}
    for node in nodes:
        if node.op is state_op or node.op.writes is not None:
            handles[node] = node
        elif node.op.view is not None and viewed(node) in handles:
            handles[node] = handles[viewed(node)]
    return handles


def state_writes(nodes: Iterable[Node], handles: Mapping[Node, Node]) -> dict[Node, Node]:
    """Handle -> the one write that replaces it.

    handles  as `versions` returns them
    """
    writes: dict[Node, Node] = {}
    for node in nodes:
        if node.op.writes is None:
            continue
        handle = handles[written(node)]
        first = writes.setdefault(handle, node)
        if first is not node:
            raise GraphError(
                f"{node!r} (at {line_of(node)}) and {first!r} (at {line_of(first)}) write the same "
                f"handle of {handle!r}: let the second write into what the first returned "
                "(after cpy into a part, into a view of state_of(...) of it)"
            )
    return writes


def state_edges(nodes: Iterable[Node]) -> dict[Node, tuple[Node, ...]]:
    """Write -> the readers of the handle that it replaces; they run before it."""
    nodes = tuple(nodes)
    handles = versions(nodes)
    writes = state_writes(nodes, handles)
    earlier: dict[Node, list[Node]] = {}
    for node in nodes:
        if node.op.view is not None:
            continue
        for i, source in enumerate(node.src):
            if source is None or i == node.op.writes or source not in handles:
                continue
            write = writes.get(handles[source])
            if write is node:
                raise GraphError(
                    f"{node!r} (at {line_of(node)}) reads the state that it writes; "
                    "copy what it reads with cont first"
                )
            if write is not None:
                earlier.setdefault(write, []).append(node)
    return {write: tuple(readers) for write, readers in earlier.items()}

"""Replaces what every run would compute from constants alone by constants, computed once.

A model whose file has `attn_k_b` in a block type casts it to f16 for its transpose. Here that cast
becomes a derived constant: a weight that the host computes when a plan that reads it is bound. Its
key in the store is the expression, so all plans of a store share it. Weights that nothing else
reads are then no longer part of the plan.

The pass runs after `assign`, so a derived constant is where its node would have run, and before
`budget`, so it is a weight and not a tensor of an attention. It leaves alone

- outputs, and what only outputs read: someone wants to see the device compute them;
- views, which cost nothing;
- graphs compiled with fuse=False, in which each node is a step;
- what would make a device's weights more than `GROWTH` larger. A cast of a 4-bit weight to f16
  takes 3.6 times the memory of the weight, for the life of the model, and saves one kernel in a
  run. For a small part of the weights that is a good trade; for all of them it is not.

Two designs lost. Running the device's own kernels once, at bind, needs a second plan with its own
arena while weights fill the memory. Folding in the layer functions of `models/` has to be
written for each model, and knows neither devices nor what a plan weighs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import replace
from functools import partial

from pyggml.graph import Graph, toposort
from pyggml.interning import identity, inherit, replanted
from pyggml.node import Node, label, label_of, labels
from pyggml.ops.leaf import Derived, constant_op, derived, shared_key, source_of
from pyggml.ops.views import bases
from pyggml.passes.evaluate import value_of
from pyggml.passes.work import Work
from pyggml.transfer import transfer

#: How much larger derived constants may make the weights of a device.
GROWTH = 1 / 64


def folded(work: Work, run: Callable[[Work], Work]) -> Work:
    """The work with derived constants in its graph.

    run  all passes; they plan the computation of a derived constant
    """
    constant, computed = _constants(work.graph.nodes)
    if not computed or not work.fuse:
        return work
    chosen = _within_growth(work, _last(work, constant, computed))
    if not chosen:
        return work
    new = {node: inherit(_derived(node, run), node) for node in chosen}
    graph = _with(work.graph, new)
    homes = work.homes
    if len(work.backends) > 1:
        homes = {new.get(node, node): home for node, home in homes.items()}
    return replace(work, graph=graph, homes=homes)


def _with(graph: Graph, new: dict[Node, Node]) -> Graph:
    """The graph with `new` nodes in place of others; adds to `new` all nodes that this changes.

    It does what `Graph.rewrite` does, in half the time, because no strides change.
    """
    for node in graph.nodes:
        for source in node.src:
            if source in new:
                break
        else:
            continue
        if node not in new:
            src = [new.get(s, s) if s is not None else None for s in node.src]
            new[node] = replanted(node, tuple(src))
    outputs = {key: new.get(node, node) for key, node in graph.outputs.items()}
    return Graph(outputs, [new.get(node, node) for node in graph.updates])


def _constants(nodes: Iterable[Node]) -> tuple[set[Node], set[Node]]:
    """The nodes whose values no run changes, and those of them that a step computes."""
    constant: set[Node] = set()
    computed: set[Node] = set()
    for node in nodes:
        op = node.op
        if op.leaf:
            if op is constant_op:
                constant.add(node)
            continue
        for source in node.src:
            if source is not None and source not in constant:
                break
        else:
            if op is not transfer:
                constant.add(node)
                if op.view is None:
                    computed.add(node)
    return constant, computed


def _last(work: Work, constant: Collection[Node], computed: Collection[Node]) -> list[Node]:
    """The computed constants that other nodes read, directly or through views. Not outputs."""
    read = {
        base
        for node in work.graph.nodes
        if node not in constant and node.op.view is None
        for base in bases(node)
    }
    read -= {root.base for root in work.graph.roots}
    return [node for node in work.graph.nodes if node in computed and node in read]


def _within_growth(work: Work, nodes: Iterable[Node]) -> set[Node]:
    """Those of `nodes` that together add at most `GROWTH` to the weights of their devices.

    Nodes with the least growth come first. Those with equal growth, such as the same cast in each
    layer, are taken together or not at all.
    """
    room: dict[str, float] = {}
    for node in work.graph.nodes:
        if node.op is constant_op:
            device = work.home(node).device
            room[device] = room.get(device, 0.0) + GROWTH * node.spec.nbytes
    alike: dict[tuple[int, str], list[Node]] = {}
    for node in nodes:
        alike.setdefault((_growth(work, node), work.home(node).device), []).append(node)
    chosen: set[Node] = set()
    for growth, device in sorted(alike):
        group = alike[growth, device]
        left = room.get(device, 0.0) - growth * len(group)
        if left >= 0:
            room[device] = left
            chosen.update(group)
    return chosen


def _growth(work: Work, node: Node) -> int:
    """The bytes of `node` less those of the weights that nothing else reads."""
    users = work.graph.users
    roots = work.graph.roots
    unread = {node}
    growth = node.spec.nbytes
    for source in toposort([node])[-2::-1]:
        if source not in roots and all(user in unread for user in users[source]):
            unread.add(source)
            if source.op is constant_op and work.home(source).device == work.home(node).device:
                growth -= source.spec.nbytes
    return growth


def _derived(node: Node, run: Callable[[Work], Work]) -> Node:
    """The constant that replaces `node`. It has the labels of its weights, because pins match
    labels; those of `node` come after them."""
    expression = toposort([node])
    weights = tuple(part for part in expression if part.op.leaf)
    key = _expression(expression, shared_key)
    source = _expression(expression, source_of)
    new = derived(node.spec, Derived(key, source, weights, partial(value_of, node, run)))
    for weight in weights:
        for text in labels(weight):
            label(new, text)
    operands = ", ".join(label_of(s) for s in node.src if s is not None)
    return label(new, f"{node.op.name}({operands})")


def _expression(nodes: Iterable[Node], of_leaf: Callable[[Node], Hashable]) -> Hashable:
    """A key of sorted `nodes` that is equal if all their ops, attributes and leaves are."""
    index: dict[Node | None, int] = {None: -1}
    parts: list[Hashable] = []  # flat: a nested key would be as deep as the expression
    for node in nodes:
        index[node] = len(parts)
        if node.op.leaf:
            parts.append((of_leaf(node), node.spec))
        else:
            sources = tuple(index[s] for s in node.src)
            parts.append((node.op, sources, *map(identity, node.attrs.values()), node.spec))
    return tuple(parts)

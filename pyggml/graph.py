"""Graph: named outputs and everything they need, in an order where sources come first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property

from pyggml.errors import DTypeError, GraphError
from pyggml.interning import inherit
from pyggml.node import Node, label_of, labels, line_of

Rebuild = Callable[[Node, tuple[Node | None, ...]], Node]


def toposort(
    roots: Iterable[Node],
    before: Mapping[Node, tuple[Node, ...]] | None = None,
    stop: Callable[[Node], bool] | None = None,
) -> tuple[Node, ...]:
    """Every node that `roots` need, sources first, depth first and left to right.

    before  further edges: nodes that must stand before the key. GraphError on a cycle
    stop    where to end: such nodes are in the order, what only they need is not
    """
    order: list[Node] = []
    done: dict[Node, bool] = {}  # False while a node waits for its sources
    stack: list[tuple[Node, bool]] = [(root, False) for root in reversed(list(roots))]
    while stack:
        node, ready = stack.pop()
        if ready:
            done[node] = True
            order.append(node)
            continue
        if node in done:
            continue
        if stop is not None and stop(node):
            done[node] = True
            order.append(node)
            continue
        done[node] = False
        stack.append((node, True))
        wanted = [s for s in node.src if s is not None]
        if before is not None and node in before:
            wanted += before[node]
        for source in reversed(wanted):
            state = done.get(source)
            if state is None:
                stack.append((source, False))
            elif not state:
                raise GraphError(
                    f"{source!r} (at {line_of(source)}) must run before {node!r} "
                    f"(at {line_of(node)}) and after it: read the handle that the write returned"
                )
    return tuple(order)


def users_of(nodes: Iterable[Node]) -> dict[Node, list[Node]]:
    """Who of `nodes` reads each of them, in order."""
    users: dict[Node, list[Node]] = {node: [] for node in nodes}
    for node in users:
        for source in node.src:
            if source is not None:
                users[source].append(node)
    return users


class Graph:
    """Outputs by name, updates (writes that no output reaches), and all nodes in order."""

    def __init__(self, outputs: Mapping[str, Node], updates: Iterable[Node] = ()) -> None:
        if not isinstance(outputs, Mapping) or isinstance(updates, Node):
            raise DTypeError(
                "outputs are a dict of names to nodes, updates a list of handles: "
                f"got {outputs!r} and {updates!r}"
            )
        self.outputs = dict(outputs)
        self.updates = tuple(updates)
        if not self.roots:
            raise GraphError("there is nothing to compute: no outputs and no updates")
        for key, node in self.outputs.items():
            if not isinstance(node, Node) or not isinstance(key, str):
                raise DTypeError(f"outputs are a dict of names to nodes; got {key!r}: {node!r}")
        for node in self.updates:
            if not isinstance(node, Node) or node.op.writes is None:
                raise GraphError(
                    f"updates are the handles that set_rows or cpy returned; got {node!r}"
                )
        self.nodes = toposort(self.roots)
        self._check_names()

    @property
    def roots(self) -> tuple[Node, ...]:
        """What is wanted: outputs, then updates."""
        return (*self.outputs.values(), *self.updates)

    @cached_property
    def users(self) -> dict[Node, list[Node]]:
        """Who reads each node, in order."""
        return users_of(self.nodes)

    def _check_names(self) -> None:
        seen: dict[str, Node] = {}
        for node in self.nodes:
            key = node.attrs.get("name") if node.op.leaf else None
            if key is not None and seen.setdefault(key, node) is not node:
                raise GraphError(
                    f"two leaves are named {key!r}: {seen[key].spec} built at "
                    f"{line_of(seen[key])} and {node.spec} built at {line_of(node)}; "
                    "build a leaf once and use it in both places"
                )

    def rewrite(self, rebuild: Rebuild) -> Graph:
        """The graph with every node replaced by `rebuild(node, new sources)`, labels carried."""
        new: dict[Node, Node] = {}
        for node in self.nodes:
            src = tuple(None if s is None else new[s] for s in node.src)
            new[node] = inherit(rebuild(node, src), node)
        outputs = {key: new[node] for key, node in self.outputs.items()}
        return Graph(outputs, [new[node] for node in self.updates])

    def __str__(self) -> str:
        """Text form: a line a node, `%3 = mul_mat(%0, %2) f32 [64, 5]  "kq-0"`."""
        index = {node: f"%{i}" for i, node in enumerate(self.nodes)}
        lines = [f"{index[n]} = {describe(n, index)}" for n in self.nodes]
        lines += [f"output {key!r} = {index[node]}" for key, node in self.outputs.items()]
        lines += [f"update {label_of(node)!r} = {index[node]}" for node in self.updates]
        return "\n".join(lines)


def rebuilt(node: Node, src: tuple[Node | None, ...]) -> Node:
    """`node` over other sources of the same specs; the default step of `Graph.rewrite`."""
    if src == node.src:
        return node
    return node.op.make(src, dict(node.attrs), node.spec, line=False)


def describe(node: Node, index: Mapping[Node, str]) -> str:
    """One node in words: op, sources, attributes that are not hidden, spec, labels."""
    parts = [index.get(s, "?") if s is not None else "-" for s in node.src]
    parts += [f"{k}={_short(v)}" for k, v in node.attrs.items() if k != "name" and v is not None]
    names = "".join(f'  "{label}"' for label in labels(node))
    return f"{node.op.name}({', '.join(parts)}) {node.spec}{names}"


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")

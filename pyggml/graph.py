"""Graph: named outputs, and all nodes that they need, sorted so that sources come first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

from pyggml.errors import DTypeError, GraphError
from pyggml.interning import inherit
from pyggml.node import Node, Sources, label_of, labels, line_of

Rebuild = Callable[[Node, Sources], Node]
#: Node -> the nodes that read it.
Users = Mapping[Node, Sequence[Node]]


def toposort(
    roots: Iterable[Node],
    before: Mapping[Node, tuple[Node, ...]] | None = None,
    stop: Callable[[Node], bool] | None = None,
) -> tuple[Node, ...]:
    """All nodes that `roots` need, each after its sources: depth first, left to right.

    before  node -> further nodes that must come before it. GraphError if this makes a cycle
    stop    nodes for which this is true are included, but their sources are not visited
    """
    order: list[Node] = []
    done: dict[Node, bool] = {}  # False while a node waits for its sources
    stack = list(roots)[::-1]
    while stack:
        node = stack.pop()
        finished = done.get(node)
        if finished:
            continue
        if finished is False or (stop is not None and stop(node)):
            done[node] = True
            order.append(node)
            continue
        done[node] = False
        stack.append(node)
        sources = node.src if before is None else (*node.src, *before.get(node, ()))
        for source in sources[::-1]:
            if source is None:
                continue
            if source not in done:
                stack.append(source)
            elif not done[source]:
                raise GraphError(
                    f"{source!r} (at {line_of(source)}) must run before {node!r} "
                    f"(at {line_of(node)}) and after it; read the handle that the write returned"
                )
    return tuple(order)


def users_of(nodes: Iterable[Node]) -> dict[Node, list[Node]]:
    """Node -> those of `nodes` that read it, in order; `nodes` must include all sources."""
    users: dict[Node, list[Node]] = {node: [] for node in nodes}
    for node in users:
        for source in node.src:
            if source is not None:
                users[source].append(node)
    return users


class Graph:
    """Named outputs, updates, and all nodes that they need.

    updates  handles of writes to make even though no output depends on them, and steps that other
             devices take together with this one
    nodes    sorted: each node comes after its sources
    """

    def __init__(self, outputs: Mapping[str, Node], updates: Iterable[Node] = ()) -> None:
        if not isinstance(outputs, Mapping) or isinstance(updates, Node):
            raise DTypeError(
                "outputs are a dict of names to nodes, updates a list of handles; "
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
            if not isinstance(node, Node) or (node.op.writes is None and not node.op.joint):
                raise GraphError(
                    f"updates are the handles that set_rows or cpy returned; got {node!r}"
                )
        self.nodes = toposort(self.roots)
        self._check_names()

    @property
    def roots(self) -> tuple[Node, ...]:
        """The nodes to compute: outputs, then updates."""
        return (*self.outputs.values(), *self.updates)

    @cached_property
    def users(self) -> dict[Node, list[Node]]:
        """Node -> the nodes that read it, in order."""
        return users_of(self.nodes)

    def _check_names(self) -> None:
        seen: dict[tuple[str, int], Node] = {}  # of a device: a sharded graph has a leaf for each
        for node in self.nodes:
            name = node.attrs.get("name") if node.op.leaf else None
            if name is None:
                continue
            first = seen.setdefault((name, node.attrs.get("rank", 0)), node)
            if first is not node:
                raise GraphError(
                    f"two leaves are named {name!r}: {first.spec} built at "
                    f"{line_of(first)} and {node.spec} built at {line_of(node)}; "
                    "build a leaf once and use it in both places"
                )

    def rewrite(self, rebuild: Rebuild) -> Graph:
        """The graph with `rebuild(node, new sources)` in place of each node.

        The new nodes inherit the labels and lines of those that they replace.
        """
        new: dict[Node, Node] = {}
        for node in self.nodes:
            src = tuple(None if s is None else new[s] for s in node.src)
            new[node] = inherit(rebuild(node, src), node)
        if all(node is old for old, node in new.items()):
            return self
        outputs = {key: new[node] for key, node in self.outputs.items()}
        return Graph(outputs, [new[node] for node in self.updates])

    def __str__(self) -> str:
        """The graph as text, one line per node: `%3 = mul_mat(%0, %2) f32 [64, 5]  "kq-0"`."""
        index = {node: f"%{i}" for i, node in enumerate(self.nodes)}
        lines = [f"{index[n]} = {describe(n, index)}" for n in self.nodes]
        lines += [f"output {key!r} = {index[node]}" for key, node in self.outputs.items()]
        lines += [f"update {label_of(node)!r} = {index[node]}" for node in self.updates]
        return "\n".join(lines)


def rebuilt(node: Node, src: Sources) -> Node:
    """`node` with other sources of the same specs. Most functions for `Graph.rewrite` end here."""
    if src == node.src:
        return node
    return node.op.make(src, dict(node.attrs), node.spec, line=False)


def precise(graph: Graph) -> Graph:
    """The graph with prec="f32" in every op that has this attribute."""

    def rebuild(node: Node, src: Sources) -> Node:
        if "prec" not in node.attrs:
            return rebuilt(node, src)
        return node.op.make(src, {**node.attrs, "prec": "f32"}, node.spec, line=False)

    return graph.rewrite(rebuild)


def describe(node: Node, index: Mapping[Node, str]) -> str:
    """One node as text: op, sources, attributes, spec and labels."""
    arguments = [index.get(s, "?") if s is not None else "-" for s in node.src]
    attrs = {k: v for k, v in node.attrs.items() if k != "name" and v is not None}
    arguments += [f"{key}={_short(value)}" for key, value in attrs.items()]
    quoted = "".join(f'  "{label}"' for label in labels(node))
    return f"{node.op.name}({', '.join(arguments)}) {node.spec}{quoted}"


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")

"""Which device runs a node, and which nodes are said in simpler ops.

What a node wants comes first: its own pin, the state it writes, pins of what it reads, the state it
reads, the preferred device for its weights. A node that wants nothing goes where its last source
was made. Where that device lacks the op, the op's meaning runs there before it goes elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from pyggml.backends.base import Backend
from pyggml.errors import GraphError, UnsupportedOpError
from pyggml.graph import Graph, rebuilt, toposort
from pyggml.interning import inherit
from pyggml.loop import loop_op
from pyggml.node import Node, copy_line, label_of, line_of
from pyggml.operation import cost_of
from pyggml.ops.leaf import constant_op, state_op
from pyggml.ops.views import bases
from pyggml.passes.work import Expanded, Work

#: Multiply-adds with each element of a weight, from which bringing it to a faster device pays:
#: llama.cpp offloads a product from 32 rows on (for experts: 32 rows an expert).
BORROWED = 32

#: Walks over the graph in search of a better place for free nodes; one mostly is enough.
WALKS = 4

Homes = dict[Node, Backend]


def assign(work: Work) -> Work:
    """The graph with its ops settled, and every node's home.

    UnsupportedOpError lists all refusals.
    """
    maker = _Assigner(work)
    graph = maker.graph()
    homes = maker.homes
    if work.several:
        homes = fewer_copies(work.backends, graph, homes, maker.free)
        homes.update(leaf_homes(work, graph, homes))
    return replace(work, graph=graph, homes=homes, expanded=tuple(maker.expanded))


class _Refused(Exception):
    """No way to run a node on one device; says why."""


class _Assigner:
    def __init__(self, work: Work) -> None:
        self.work = work
        self.homes: dict[Node, Backend] = {}
        self.wanted: dict[Node, Backend] = {}  # what a node would have if every device could
        self.free: dict[Node, Backend] = {}  # nodes with no wish of their own, and where they went
        self.made: dict[Node, int] = {}
        self.expanded: list[Expanded] = []
        self.writers: dict[Node, list[Node]] = {}
        for node in work.graph.nodes:
            if node.op is state_op:
                self._settle_state(node)
            elif node.op.writes is not None:
                self.writers.setdefault(node.root, []).append(node)

    def graph(self) -> Graph:
        """The user's graph over ops that run where they are."""
        return self.work.graph.rewrite(lambda node, src: self._settled(rebuilt(node, src), node))

    # -- where ----------------------------------------------------------------------------------

    def _settled(self, node: Node, origin: Node) -> Node:
        """`node` on a device that runs it, or its meaning."""
        if node.op.leaf or node.op.view is not None or node.op is loop_op or node in self.homes:
            return node
        inherit(node, origin)  # pins are of labels
        own = self._own_wish(node) if self.work.several else self.work.backends[0]
        wanted = own or self._flow(node)
        fixed = self.work.pinned(node) is not None or node.op.writes is not None
        order = [wanted] if fixed else [wanted, *(b for b in self.work.backends if b != wanted)]
        refusals = []
        for backend in order:
            before = len(self.expanded)
            try:
                made = self._on(node, backend)
            except _Refused as refused:
                del self.expanded[before:]
                refusals.append(f"{backend.place}: {refused}")
                continue
            self._keep(made, backend, wanted, own is None)
            return made
        return self._scattered(node, wanted, refusals, fixed)

    def _own_wish(self, node: Node) -> Backend | None:
        """Where the node's pin, states, pinned sources or weights put it."""
        pin = self.work.pinned(node)
        if node.op.writes is not None:
            home = self._state_home(node.root, node)
            if pin is not None and pin.device != home.device:
                raise GraphError(
                    f"{node!r} (at {line_of(node)}) is pinned to {pin.place}, but it writes the "
                    f"state {label_of(node.root)}, which is on {home.place}; pin the state too"
                )
            return pin or home
        if pin is not None:
            return pin
        roots = [s.root for s in node.src if s is not None]
        leaves = [root for root in roots if root.op.leaf]
        for leaf in leaves:
            pin = self.work.pinned(leaf)
            if pin is not None:
                lent = leaf.op is constant_op and self._borrows(node, leaves, pin)
                return self.work.backends[0] if lent else pin
        for leaf in leaves:
            if leaf.op is state_op:
                return self._state_home(leaf, node)
        return self.work.backends[0] if any(map(_is_weight, leaves)) else None

    def _borrows(self, node: Node, leaves: list[Node], pin: Backend) -> bool:
        """Whether the preferred device should bring the host's weights for this node."""
        best = self.work.backends[0]
        elements = sum(leaf.spec.elements for leaf in leaves if leaf.op is constant_op)
        return (
            pin.device == "host" != best.device
            and cost_of(node).flops >= 2.0 * BORROWED * elements
            and best.supports(node) is None
        )

    def _settle_state(self, state: Node) -> None:
        """Put a state where the store has it, or where it is pinned."""
        name = state.attrs["name"]
        home, pin = self.work.settled.get(name), self.work.pinned(state)
        if home is not None and pin is not None and home.device != pin.device:
            raise GraphError(
                f"the state {name!r} is pinned to {pin.place}, but this store has it on "
                f"{home.place}; use another store"
            )
        found = home or pin
        if found is not None:
            self.homes[state] = found

    def _state_home(self, state: Node, user: Node) -> Backend:
        """Where a state is; if nothing says so, with its first user, if all that write it run
        there."""
        if state not in self.homes:
            writers = self.writers.get(state, [])
            ways = [self._flow(user), *self.work.backends]
            able = [b for b in ways if all(b.supports(w) is None for w in writers)]
            self.homes[state] = (able or ways)[0]
        return self.homes[state]

    def _flow(self, node: Node) -> Backend:
        """Where the last computed source was wanted; without one the preferred device."""
        made = [b for b in bases(node) if b in self.made]
        last = max(made, key=self.made.__getitem__, default=None)
        return self.work.backends[0] if last is None else self.wanted[last]

    def _keep(self, node: Node, home: Backend, wanted: Backend, free: bool) -> None:
        """Note the home of a node, and of the parts of a meaning below it."""
        stack = [node]
        while stack:
            part = stack.pop()
            if part in self.made or part.op.leaf:
                continue
            if part.op.view is None:
                self.homes[part], self.wanted[part] = home, wanted
            stack += [s for s in part.src if s is not None and s not in self.made]
            self.made[part] = len(self.made)
            if free and part.op.view is None:
                self.free[part] = wanted
        self.made[node] = len(self.made)

    # -- meanings -------------------------------------------------------------------------------

    def _on(self, node: Node, backend: Backend) -> Node:
        """`node` on `backend`, or its meaning with every part there; _Refused with the reason."""
        reason = backend.supports(node)
        if reason is None:
            return node
        if node.op.meaning is None:
            raise _Refused(reason)
        try:
            meant = _in_parts(node, lambda part, _: self._on(part, backend))
        except _Refused as refused:
            raise _Refused(f"{reason}, and its meaning in simpler ops: {refused}") from None
        self.expanded.append(Expanded(label_of(node), node.op.name, backend.place, reason))
        return meant

    def _scattered(self, node: Node, wanted: Backend, refusals: list[str], fixed: bool) -> Node:
        """The meaning with each part where it can run; UnsupportedOpError if one cannot."""
        if node.op.writes is not None and self.work.pinned(node.root) is None:
            reasons = ((b.place, b.supports(node)) for b in self.work.backends)
            refusals = [f"{place}: {reason}" for place, reason in reasons if reason is not None]
        told = "; ".join(refusals)
        if fixed or node.op.meaning is None:
            why = f"{node.op.name} has no meaning in simpler ops"
            if fixed:
                why = "it writes a state" if node.op.writes is not None else "it is pinned there"
            raise UnsupportedOpError(f"no place runs {node!r} (at {line_of(node)}): {told}; {why}")
        try:
            meant = _in_parts(node, self._settled)
        except UnsupportedOpError as error:
            raise UnsupportedOpError(
                f"no place runs {node!r} (at {line_of(node)}): {told}; part by part: {error}"
            ) from None
        self.expanded.append(Expanded(label_of(node), node.op.name, "several places", told))
        return meant


def _is_weight(leaf: Node) -> bool:
    """Whether a leaf is worth going to. One row (a norm, factors of rope) can be anywhere."""
    return leaf.op is constant_op and leaf.spec.elements > leaf.ne[0]


def _in_parts(node: Node, settle: Callable[[Node, Node], Node]) -> Node:
    """The meaning of `node`, every op in it put through `settle(op, as it was before)`."""
    assert node.op.meaning is not None
    meant = node.op.meaning(*node.src, **node.attrs)
    if not isinstance(meant, Node):
        raise GraphError(
            f"{node!r} (at {line_of(node)}): the meaning of {node.op.name} must return a node, "
            f"not {type(meant).__name__}"
        )
    if meant.spec != node.spec:
        raise GraphError(
            f"{node!r} (at {line_of(node)}): the meaning of {node.op.name} gives {meant.spec}, "
            f"its shape rule {node.spec}"
        )
    done = {s: s for s in node.src if s is not None}
    for part in toposort([meant], stop=frozenset(done).__contains__):
        if part not in done:
            new = rebuilt(copy_line(part, node), tuple(s and done[s] for s in part.src))
            simple = new.op.leaf or new.op.view is not None
            done[part] = inherit(new if simple else settle(new, part), part)
    return done[meant]


# -- nodes that may move, and leaves ----------------------------------------------------------


def fewer_copies(
    backends: Sequence[Backend],
    graph: Graph,
    homes: Mapping[Node, Backend],
    free: Mapping[Node, Backend],
) -> Homes:
    """Homes with nodes that want nothing moved to where the fewest bytes are copied for them.

    free  those nodes, and where each would be for the sake of its sources. They move only between
          that device, the preferred one and those of their neighbours that are not free
    """
    found = dict(homes)
    rank = {backend: i for i, backend in enumerate(backends)}
    users: dict[Node, list[Node]] = {node: [] for node in found}
    for node in graph.nodes:
        if node in found and not node.op.leaf:
            for base in bases(node):
                if base in users:
                    users[base].append(node)
    order = [node for node in graph.nodes if node in free]
    for walk in range(WALKS):
        moved = False
        for node in order[:: -1 if walk % 2 else 1]:
            near = [*users[node], *(b for b in bases(node) if b in found)]
            ways = {
                found[node],
                free[node],
                backends[0],
                *(found[n] for n in near if n not in free),
            }
            best = min(ways, key=lambda way: (_copied(node, way, found, users), rank[way]))
            if best is not found[node] and best.supports(node) is None:
                found[node], moved = best, True
        if not moved:
            break
    return found


def _copied(
    node: Node, way: Backend, homes: Homes, users: Mapping[Node, list[Node]]
) -> tuple[int, int]:
    """Bytes that are copied because `node` is on `way`, and in how many copies."""
    total = count = 0
    for base in dict.fromkeys(bases(node)):
        here = base in homes and homes[base].device != way.device and not base.op.leaf
        if here and not any(homes[u].device == way.device for u in users[base] if u is not node):
            total += base.spec.nbytes
            count += 1
    far = {homes[user].device for user in users[node]} - {way.device}
    return total + len(far) * node.spec.nbytes, count + len(far)


def leaf_homes(work: Work, graph: Graph, homes: Mapping[Node, Backend]) -> Homes:
    """Homes of leaves: pinned, where the store has a state, else with the first user.

    A weight pinned to a device where none of its readers runs is with the first of them too; on
    the host it stays, and is brought to them.
    """
    found: Homes = {}
    read: dict[Node, set[Backend]] = {}
    for node in graph.nodes:
        if node in homes and not node.op.leaf:
            for base in bases(node):
                read.setdefault(base, set()).add(homes[node])

    def settle(leaf: Node, user: Backend) -> None:
        if leaf.op.leaf and leaf not in homes and leaf not in found:
            held = work.settled.get(leaf.attrs["name"]) if leaf.op is state_op else None
            pin = work.pinned(leaf)
            if pin is not None and pin not in read.get(leaf, {pin}) and leaf.op is constant_op:
                pin = pin if pin.device == "host" else None
            found[leaf] = held or pin or user

    for node in graph.nodes:
        if node in homes and not node.op.leaf:
            for base in bases(node):
                settle(base, homes[node])
    for node in graph.nodes:  # what only an output looks at
        settle(node, work.backends[0])
    return found

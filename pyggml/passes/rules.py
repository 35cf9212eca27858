"""Which device runs a node: the rules of docs/scheduling.md. The first that applies decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from pyggml.backends.base import Backend
from pyggml.errors import GraphError
from pyggml.node import Node, label_of, line_of
from pyggml.operation import cost_of
from pyggml.ops.leaf import constant_op, state_op
from pyggml.ops.linear import expected_share
from pyggml.ops.views import bases
from pyggml.passes.work import Work


class Choice(NamedTuple):
    """The device that a rule chose for a node.

    fixed  no other device may run the node, even if this one refuses it
    free   only the last rule applied, so the node may move to save copies
    """

    device: Backend
    fixed: bool
    free: bool


class Homes:
    """Where nodes run and where states are, filled node by node in the graph's order.

    of      node or state -> its device
    chosen  node -> the device that a rule chose, which may have refused the node
    free    the nodes in `chosen` that only the last rule placed
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.several = work.several
        self.preferred = work.backends[0]
        self.of: dict[Node, Backend] = {}
        self.chosen: dict[Node, Backend] = {}
        self.free: dict[Node, Backend] = {}
        self._turn: dict[Node, int] = {}  # node -> when it was put; the last is the largest
        self._writers: dict[Node, list[Node]] = {}
        for node in work.graph.nodes:
            if node.op is state_op:
                self._settle(node)
            elif node.op.writes is not None:
                self._writers.setdefault(node.root, []).append(node)

    def _settle(self, state: Node) -> None:
        """Put a state where the store has it or where it is pinned, if it is either."""
        name = state.attrs["name"]
        home, pin = self.work.settled.get(name), self.work.pinned(state)
        if home is not None and pin is not None and home.device != pin.device:
            raise GraphError(
                f"the state {name!r} is pinned to {pin.place}, but this store has it on "
                f"{home.place}; use another store"
            )
        place = home or pin
        if place is not None:
            self.of[state] = place

    def choose(self, node: Node) -> Choice:
        """The device for `node` by the first rule that applies."""
        if not self.several:
            pin = self.work.pinned(node)  # another backend in the same memory
            fixed = node.op.writes is not None or pin is not None
            return Choice(pin or self.preferred, fixed=fixed, free=False)
        for rule in RULES:
            device = rule(self, node)
            if device is not None:
                return Choice(device, fixed=rule in FIXED, free=rule is RULES[-1])
        raise AssertionError("the last rule always applies")

    def put(self, node: Node, device: Backend, choice: Choice) -> None:
        """Record that `node` runs on `device`, with all nodes of its meaning."""
        stack = [node]
        while stack:
            part = stack.pop()
            if part in self._turn or part.op.leaf:
                continue
            if part.op.view is None:
                self.of[part], self.chosen[part] = device, choice.device
                if choice.free:
                    self.free[part] = choice.device
            self._turn[part] = len(self._turn)
            stack += [s for s in part.src if s is not None and s not in self._turn]
        self._turn[node] = len(self._turn)

    def state(self, state: Node, user: Node) -> Backend:
        """The device of a state. If nothing has put it anywhere, it goes where its first user's
        sources are, or else to the first device that runs all its writes."""
        if state not in self.of:
            writers = self._writers.get(state, [])
            devices = [self.last_source(user), *self.work.backends]
            able = [d for d in devices if all(d.supports(w) is None for w in writers)]
            self.of[state] = (able or devices)[0]
        return self.of[state]

    def last_source(self, node: Node) -> Backend:
        """The device chosen for the source computed last; without one, the preferred device."""
        computed = [base for base in bases(node) if base in self._turn]
        last = max(computed, key=self._turn.__getitem__, default=None)
        return self.preferred if last is None else self.chosen[last]


# -- the rules --------------------------------------------------------------------------------

Rule = Callable[[Homes, Node], Backend | None]


def own_pin(homes: Homes, node: Node) -> Backend | None:
    """The node's own label is pinned: it runs on that device. If the device cannot run it, this is
    an error."""
    pin = homes.work.pinned(node)
    if pin is not None and node.op.writes is not None:
        home = homes.state(node.root, node)
        if pin.device != home.device:
            raise GraphError(
                f"{node!r} (at {line_of(node)}) is pinned to {pin.place}, but it writes the "
                f"state {label_of(node.root)}, which is on {home.place}; pin the state too"
            )
    return pin


def written_state(homes: Homes, node: Node) -> Backend | None:
    """The node writes a state (`set_rows`, `cpy`): it runs where the state is."""
    return None if node.op.writes is None else homes.state(node.root, node)


def pinned_leaf(homes: Homes, node: Node) -> Backend | None:
    """A leaf that it reads is pinned: it runs on that device, unless it borrows the weight (see
    below)."""
    for leaf in _leaves(node):
        pin = homes.work.pinned(leaf)
        if pin is not None:
            return homes.preferred if _borrows(homes, node, leaf, pin) else pin
    return None


def read_state(homes: Homes, node: Node) -> Backend | None:
    """It reads a state: it runs where the state is."""
    return next((homes.state(x, node) for x in _leaves(node) if x.op is state_op), None)


def read_weight(homes: Homes, node: Node) -> Backend | None:
    """It reads a weight with more than one row: it runs on the preferred device."""
    # A single row (of a norm, or the factors of rope) is small enough to be on any device.
    weights = (x for x in _leaves(node) if x.op is constant_op and x.spec.elements > x.ne[0])
    return homes.preferred if any(weights) else None


def last_source(homes: Homes, node: Node) -> Backend | None:
    """Otherwise it runs on the device that the rules chose for its last computed source, or on the
    preferred device if it has none."""
    return homes.last_source(node)


#: In this order; the last one always applies.
RULES: tuple[Rule, ...] = (
    own_pin,
    written_state,
    pinned_leaf,
    read_state,
    read_weight,
    last_source,
)

#: The rules whose choice no refusal overrides.
FIXED: tuple[Rule, ...] = (own_pin, written_state)


def _leaves(node: Node) -> Iterable[Node]:
    """The leaves that a node reads, through views and writes."""
    roots = (source.root for source in node.src if source is not None)
    return [root for root in roots if root.op.leaf]


def _borrows(homes: Homes, node: Node, leaf: Node, pin: Backend) -> bool:
    """Whether the preferred device copies a weight that is pinned to the host, to run `node`."""
    if leaf.op is not constant_op or pin.device != "host" or homes.preferred.device == "host":
        return False
    elements = sum(x.spec.elements for x in _leaves(node) if x.op is constant_op)
    reads = elements * expected_share(node)
    enough = cost_of(node).flops >= 2.0 * pin.lends_from(node) * reads
    return enough and homes.preferred.supports(node) is None

"""Settles every node on a device that runs it, or replaces it by its meaning in simpler ops.

`rules` choose a device for each node. If that device does not run the node, its meaning on the
same device is tried next, then the other devices in order of preference, and at last each part of
the meaning on its own. `copies` then moves nodes that no rule ties to a device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from pyggml.backends.base import Backend
from pyggml.errors import UnsupportedOpError
from pyggml.graph import Graph, rebuilt
from pyggml.interning import inherit
from pyggml.loop import loop_op
from pyggml.node import Node, label_of, line_of
from pyggml.ops.leaf import constant_op, state_op
from pyggml.ops.views import bases
from pyggml.passes.copies import fewer_copies
from pyggml.passes.meanings import Refused, meaning_of, on_device
from pyggml.passes.rules import Choice, Homes
from pyggml.passes.work import Expanded, Work


def assign(work: Work) -> Work:
    """The graph in ops that its devices run, and the home of every node.

    Errors: UnsupportedOpError with the reasons of all places.
    """
    assigner = _Assigner(work)
    graph = work.graph.rewrite(lambda node, src: assigner.settled(rebuilt(node, src), node))
    homes = assigner.homes.of
    if work.several:
        homes = fewer_copies(work.backends, graph, homes, assigner.homes.free)
        homes.update(leaf_homes(work, graph, homes))
    return replace(work, graph=graph, homes=homes, expanded=tuple(assigner.expanded))


class _Assigner:
    """Settles nodes one by one, sources first.

    refused  for each device, the nodes whose meanings it cannot run, and why
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.homes = Homes(work)
        self.expanded: list[Expanded] = []
        self.refused: defaultdict[Backend, dict[Node, str]] = defaultdict(dict)

    def settled(self, node: Node, original: Node) -> Node:
        """`node` on a device that runs it, or its meaning.

        original  the node that `node` replaces
        """
        result = self._settle(node, original)
        if result is not None:
            return result
        reason = self.expanded[-1].reason
        try:
            return meaning_of(node, self._settle)
        except UnsupportedOpError as error:
            text = f"{_no_place(node)}: {reason}; part by part: {error}"
            raise UnsupportedOpError(text) from None

    def _settle(self, node: Node, original: Node) -> Node | None:
        """`node`, or its meaning, on one device; None if each part of the meaning must find its
        own.

        Errors: UnsupportedOpError if no device runs the node and it must not be split.
        """
        if node.op.leaf or node.op.view is not None or node.op is loop_op or node in self.homes.of:
            return node
        inherit(node, original)  # pins match labels
        choice = self.homes.choose(node)
        refusals = []
        for backend in self._candidates(choice):
            try:
                supported = on_device(node, backend, self.refused[backend])
            except Refused as refused:
                refusals.append(f"{backend.place}: {refused}")
                continue
            self.expanded += supported.expanded
            self.homes.put(supported.node, backend, choice)
            return supported.node
        reason = self._reason(node, choice, refusals)
        self.expanded.append(Expanded(label_of(node), node.op.name, "several places", reason))
        return None

    def _candidates(self, choice: Choice) -> Iterator[Backend]:
        """The devices to try, in order."""
        yield choice.device
        if not choice.fixed:
            yield from (backend for backend in self.work.backends if backend != choice.device)

    def _reason(self, node: Node, choice: Choice, refusals: Sequence[str]) -> str:
        """Why the node must be split over several devices.

        Errors: UnsupportedOpError if it must not be.
        """
        if node.op.writes is not None and self.work.pinned(node.root) is None:
            reasons = ((b.place, b.supports(node)) for b in self.work.backends)
            refusals = [f"{place}: {reason}" for place, reason in reasons if reason is not None]
        reason = "; ".join(refusals)
        if choice.fixed:
            why = "it writes a state" if node.op.writes is not None else "it is pinned there"
            raise UnsupportedOpError(f"{_no_place(node)}: {reason}; {why}")
        if not node.op.composes(node):
            why = f"{node.op.name} has no meaning in simpler ops"
            raise UnsupportedOpError(f"{_no_place(node)}: {reason}; {why}")
        return reason


def _no_place(node: Node) -> str:
    return f"no place runs {node!r} (at {line_of(node)})"


def leaf_homes(work: Work, graph: Graph, homes: Mapping[Node, Backend]) -> dict[Node, Backend]:
    """The homes of the leaves that have none yet: the device of the store or the pin, else of the
    first reader."""
    readers: dict[Node, list[Backend]] = {}
    for node in graph.nodes:
        if node in homes and not node.op.leaf:
            for base in bases(node):
                readers.setdefault(base, []).append(homes[node])
    leaves = (node for node in graph.nodes if node.op.leaf and node not in homes)
    return {leaf: _leaf_home(work, leaf, readers.get(leaf, ())) for leaf in leaves}


def _leaf_home(work: Work, leaf: Node, readers: Sequence[Backend]) -> Backend:
    """The home of a leaf that nodes on the devices `readers` read, in graph order."""
    if leaf.op is state_op and leaf.attrs["name"] in work.settled:
        return work.settled[leaf.attrs["name"]]
    pin = work.pinned(leaf)
    if leaf.op is constant_op and pin is not None and readers and pin not in readers:
        # Only the host lends its weights; elsewhere the pin is of no use to any reader.
        pin = pin if pin.device == "host" else None
    return pin or (readers[0] if readers else work.backends[0])

"""Steps that cover several nodes: patterns that `lower` looks for before each node gets its own.

A family registers a pattern by the op that ends it:

    @fuses(ops.mul)
    def norm_times_row(node: Node, run: Run) -> Fused | None: ...
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pyggml.backends.cuda.launch import Call
from pyggml.node import Node, Op
from pyggml.ops.leaf import state_op


@dataclass(frozen=True, slots=True)
class Fused:
    """One step for `nodes`, the last of which is its result; only its attributes may be shifted by
    a loop.

    reads    what the kernel takes: `call.src`, in this order
    record   as in the kernel table; `call.node` and `call.attrs` are the last node's
    inplace  sources whose memory the result may take over
    also     further nodes that the kernel leaves in memory where others read them: `call.also`
    at       where the step stands if not where its last node does: one of `nodes`, before it
    again    of `nodes`: what every reader computes for itself, none of them for all
    prepares another `record`: it leaves the result in fixed point as well, the last of `call.also`
    """

    nodes: tuple[Node, ...]
    reads: tuple[Node, ...]
    record: Callable[[Call], None]
    inplace: tuple[Node, ...] = ()
    scratch: int = 0
    also: tuple[Node, ...] = ()
    at: Node | None = None
    again: tuple[Node, ...] = ()
    prepares: Callable[[Call], None] | None = None


class Run:
    """The nodes that are lowered together, in order, and who reads what of them."""

    def __init__(self, nodes: Sequence[Node], keep: Collection[Node]) -> None:
        self.nodes, self.keep = nodes, keep
        self.number = {node: i for i, node in enumerate(nodes)}
        self.readers: dict[Node, list[Node]] = {}  # through views
        for node in nodes:
            for source in node.src:
                if source is not None:
                    self.readers.setdefault(source.base, []).append(node)

    def only(self, node: Node, *readers: Node) -> bool:
        """Whether a node of the run is read by nothing but these, so that it needs no memory."""
        alone = node in self.number and node not in self.keep
        return alone and set(self.readers.get(node, ())) <= set(readers)

    def allows(self, match: Fused) -> bool:
        """Whether all that the step reads is made before it, and still the same where it stands."""
        place = self.number[match.at or match.nodes[-1]]
        inside, read = set(match.nodes), {node.base for node in match.reads}
        if read & inside or any(self.number.get(node, -1) >= place for node in read):
            return False
        outside = (r for node in match.also for r in self.readers.get(node, ()) if r not in inside)
        if any(self.number[reader] <= place for reader in outside):
            return False
        return not any(self._changed(node, place, inside) for node in match.nodes)

    def _changed(self, node: Node, place: int, inside: Collection[Node]) -> bool:
        """Whether a state that `node` reads would be another at `place`."""
        states = {s.root for s in node.src if s is not None and s.root.op is state_op}
        first, last = sorted((self.number.get(node, place), place))
        return bool(states) and any(
            other.op.writes is not None and other not in inside and other.root in states
            for other in self.nodes[first : last + 1]
        )


Fuser = Callable[[Node, Run], Fused | None]

FUSERS: dict[Op[Any], list[Fuser]] = {}


def fuses(last: Op[Any]) -> Callable[[Fuser], Fuser]:
    """Register a pattern that ends in that op; the first that matches counts."""

    def register(fuser: Fuser) -> Fuser:
        FUSERS.setdefault(last, []).append(fuser)
        return fuser

    return register


def fused(nodes: Sequence[Node], keep: Collection[Node]) -> list[Node | Fused]:
    """`nodes` in order, those that a pattern covers as one where it stands."""
    run = Run(nodes, keep)
    found: list[Fused] = []
    taken: set[Node] = set()
    for node in reversed(nodes):
        for fuser in FUSERS.get(node.op, ()) if node not in taken else ():
            match = fuser(node, run)
            if match is None or taken & (set(match.nodes) - set(match.again)):
                continue
            if run.allows(match):
                found.append(match)
                taken.update(set(match.nodes) - set(match.again))
                break
    return list(_in_place(nodes, run, found))


def _in_place(nodes: Sequence[Node], run: Run, found: Sequence[Fused]) -> Iterator[Node | Fused]:
    """Where a reader does not compute a node `again`, that is made once, for all of them."""
    inside = {(node, match.nodes[-1]) for match in found for node in match.again}
    once = {n for n, _ in inside if any((n, r) not in inside for r in run.readers[n])}
    found = [match for match in found if not once & set(match.again)]
    standing = {match.at or match.nodes[-1]: match for match in found}
    covered = {node for match in found for node in match.nodes}
    for node in nodes:
        if node in standing:
            yield standing[node]
        elif node not in covered:
            yield node

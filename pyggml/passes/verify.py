"""The invariants of a graph on its way to a plan, checked between passes."""

from __future__ import annotations

import os
from collections.abc import Iterable

from pyggml.backends.step import Spot, Step
from pyggml.errors import GraphError
from pyggml.node import Node
from pyggml.passes.work import Work


def verifying() -> bool:
    """Whether PYGGML_VERIFY=1 asks for the checks."""
    return os.environ.get("PYGGML_VERIFY", "") == "1"


def verify(work: Work, after: str) -> None:
    """GraphError naming the pass where an invariant does not hold."""
    try:
        _nodes(work.graph.nodes)
        if work.steps:
            _steps(work.steps, set(work.leaves))
            _splits(work)
        if work.placement is not None:
            _places(work)
    except GraphError as error:
        raise GraphError(f"after the pass {after}: {error}") from None


def _nodes(nodes: Iterable[Node]) -> None:
    seen: set[Node] = set()
    for node in nodes:
        missing = [s for s in node.src if s is not None and s not in seen]
        if missing:
            raise GraphError(f"{node!r} stands before its sources {missing}")
        seen.add(node)


def _steps(steps: Iterable[Step], known: set[Node]) -> None:
    """Every read has been made by an earlier step (or is a leaf), views by way of their root."""
    known = set(known)
    for step in steps:
        for read in step.reads:
            if read not in known and read.base not in known:
                raise GraphError(f"the step of {step.node!r} reads {read!r} before it is made")
        known.update(step.nodes)
        for body in step.bodies:
            inside = {spot.base for spot in body.spots.values() if spot.base is not None}
            _steps(body.steps, inside)


def _splits(work: Work) -> None:
    """A step reads its own device's memory; a copy brings what another device has made, once."""
    seen: set[tuple[Node, str]] = set()
    for split in work.splits:
        device = split.backend.device
        for step in split.steps:
            for node in (*step.nodes, *(() if step.layout else step.reads)):
                if work.home(node).device != device:
                    raise GraphError(f"{step.node!r} on {device} reads {node!r} of another device")
        for step in (*split.copies, *(s for s in split.steps if s.layout)):
            source = step.reads[0]
            if (source, device) in seen:
                raise GraphError(f"{source!r} is copied to {device} twice")
            seen.add((source, device))


def _places(work: Work) -> None:
    """Blocks alive in the same step do not overlap, unless they share on purpose."""
    placed = work.placed
    last: dict[Node, int] = {}
    for i, step in enumerate(work.steps):
        for read in (*step.reads, step.node):
            last[read.root] = i
    for root in work.graph.roots:
        last[root.root] = len(work.steps)
    alive: dict[Node, tuple[int, int]] = {}
    for i, step in enumerate(work.steps):
        for made in step.nodes:
            at = placed.spots.get(made)
            if at is None or at.base is not None or made.root is not made:
                continue
            span, device = _span(made, at), work.home(made).device
            taken = {r.root for r in step.inplace} if step.node is made else set()
            parts = set(made.src) if made.op.parts is not None else set()
            for other, used in alive.items():
                apart = span[1] <= used[0] or used[1] <= span[0]
                strided = at.nb != made.nb or placed.spots[other].nb != other.nb
                near = work.home(other).device == device
                if near and not apart and not (other in taken or other in parts or strided):
                    raise GraphError(f"{made!r} at {span} overlaps {other!r} at {used}")
            alive[made] = span
        if step.scratch:
            at_scratch = placed.scratch_at[i]
            device = work.home(step.node).device
            for other, used in alive.items():
                if work.home(other).device != device:
                    continue
                if at_scratch < used[1] and used[0] < at_scratch + step.scratch:
                    raise GraphError(f"the scratch of {step.node!r} overlaps {other!r}")
        alive = {node: span for node, span in alive.items() if last.get(node, i) > i}


def _span(node: Node, at: Spot) -> tuple[int, int]:
    units = (node.ne[0] // node.dtype.block, *node.ne[1:])
    extent = node.dtype.nbytes + sum((n - 1) * b for n, b in zip(units, at.nb))
    return at.offset, at.offset + extent

"""Checks the invariants of a graph between passes, with PYGGML_VERIFY=1."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from pyggml.backends.step import LoadStep, LoopStep, Spot, Step
from pyggml.errors import GraphError
from pyggml.joint import cliques
from pyggml.node import Node
from pyggml.passes.work import Work

#: The first byte of a tensor, and the byte after its last.
Span = tuple[int, int]


def verifying() -> bool:
    """Whether PYGGML_VERIFY=1 asks for the checks."""
    return os.environ.get("PYGGML_VERIFY", "") == "1"


def verify(work: Work, after: str) -> None:
    """Check a work; GraphError with the name of the pass if an invariant is broken."""
    try:
        _check_nodes(work.graph.nodes)
        if work.steps:
            _check_steps(work.steps, set(work.leaves))
            _check_splits(work)
            _check_cliques(work)
        if work.placement is not None:
            _check_memory(work)
    except GraphError as error:
        raise GraphError(f"after the pass {after}: {error}") from None


def _check_nodes(nodes: Iterable[Node]) -> None:
    """Every node comes after its sources."""
    seen: set[Node] = set()
    for node in nodes:
        missing = [s for s in node.src if s is not None and s not in seen]
        if missing:
            raise GraphError(f"{node!r} is before its sources {missing}")
        seen.add(node)


def _check_steps(steps: Iterable[Step], known: set[Node]) -> None:
    """Every step reads leaves and results of earlier steps, or views of them.

    known  nodes that are in memory before the first step
    """
    known = set(known)
    for step in steps:
        for read in step.reads:
            if read not in known and read.base not in known:
                raise GraphError(f"the step of {step.node!r} reads {read!r} before it is computed")
        known.update(step.nodes)
        for body in step.bodies if isinstance(step, LoopStep) else ():
            inside = {spot.base for spot in body.spots.values() if spot.base is not None}
            _check_steps(body.steps, inside)


def _check_splits(work: Work) -> None:
    """Every step uses the memory of its device, and copies bring a tensor to a device once."""
    copied: set[tuple[Node, str]] = set()
    for split in work.splits:
        device = split.backend.device
        for step in split.steps:
            for node in (*step.nodes, *(() if isinstance(step, LoadStep) else step.reads)):
                if work.home(node).device != device:
                    raise GraphError(f"{step.node!r} on {device} reads {node!r} of another device")
        for step in (*split.copies, *(s for s in split.steps if isinstance(s, LoadStep))):
            source = step.reads[0]
            if (source, device) in copied:
                raise GraphError(f"{source!r} is copied to {device} twice")
            copied.add((source, device))


def _check_cliques(work: Work) -> None:
    """Splits that run together start with the last of them: until then, nothing waits for one of
    them or runs on its device."""
    splits = work.splits
    for members in cliques([[step.joint for step in split.steps] for split in splits]):
        for i in range(members[0], members[-1] + 1):
            earlier = [k for k in members if k < i]
            devices = [splits[k].backend.device for k in earlier]
            if splits[i].backend.device in devices or not set(earlier).isdisjoint(splits[i].waits):
                raise GraphError(f"split {i} needs one of the splits {members}, which run later")


def _check_memory(work: Work) -> None:
    """Blocks that are alive in the same step do not overlap, unless they share on purpose."""
    last = _last_reads(work)
    alive: dict[Node, Span] = {}
    for i, step in enumerate(work.steps):
        for node, span in _results(work, step):
            _check_result(work, step, node, span, alive)
            alive[node] = span
        if step.scratch:
            at = work.placed.scratch_at[i]
            for other in _overlaps(work, step.node, (at, at + step.scratch), alive):
                raise GraphError(f"the scratch of {step.node!r} overlaps {other!r}")
        alive = {node: span for node, span in alive.items() if last.get(node, i) > i}


def _last_reads(work: Work) -> dict[Node, int]:
    """Root -> the last step that reads or writes its memory; for roots of the graph, the number of
    steps."""
    last: dict[Node, int] = {}
    for i, step in enumerate(work.steps):
        for node in (*step.reads, step.node):
            last[node.root] = i
    for root in work.graph.roots:
        last[root.root] = len(work.steps)
    return last


def _results(work: Work, step: Step) -> Iterator[tuple[Node, Span]]:
    """The nodes that a step leaves in an arena, with their spans."""
    for node in step.nodes:
        spot = work.placed.spots.get(node)
        if spot is not None and spot.base is None and node.root is node:
            yield node, _span(node, spot)


def _check_result(work: Work, step: Step, node: Node, span: Span, alive: dict[Node, Span]) -> None:
    """A result overlaps only what it takes over, its own parts, and parts of the same concat."""
    spots = work.placed.spots
    shared = {source.root for source in step.inplace} if step.node is node else set()
    if node.op.parts is not None:
        shared |= {source for source in node.src if source is not None}
    for other in _overlaps(work, node, span, alive):
        strided = spots[node].nb != node.nb or spots[other].nb != other.nb
        if other not in shared and not strided:
            raise GraphError(f"{node!r} at {span} overlaps {other!r} at {alive[other]}")


def _overlaps(work: Work, node: Node, span: Span, alive: dict[Node, Span]) -> Iterator[Node]:
    """The live tensors on the device of `node` that use some of the bytes of `span`."""
    device = work.home(node).device
    for other, used in alive.items():
        if work.home(other).device == device and span[0] < used[1] and used[0] < span[1]:
            yield other


def _span(node: Node, spot: Spot) -> Span:
    units = (node.ne[0] // node.dtype.block, *node.ne[1:])
    extent = node.dtype.nbytes + sum((n - 1) * b for n, b in zip(units, spot.nb))
    return spot.offset, spot.offset + extent

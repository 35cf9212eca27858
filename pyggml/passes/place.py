"""Gives every tensor its place in an arena, from the lifetimes of steps.

Steps are lowered before memory is planned, so the scratch of a step is an interval like any
tensor. Kernels can write strided results: a part of a `concat` is written directly into it if its
step and all its views allow this. `print(plan)` counts the parts that must be copied.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from pyggml.backends.step import LoopStep, Spot, Step, own_nodes
from pyggml.node import Node
from pyggml.passes.arena import Interval, live_bytes, pack
from pyggml.passes.sharing import Sharing
from pyggml.passes.work import Arena, Placement, Work, viewed, written


def place(work: Work) -> Work:
    """The work with `placement` filled in."""
    alignments: dict[str, int] = {}
    for backend in work.backends:
        alignments[backend.device] = max(backend.alignment, alignments.get(backend.device, 1))
    placement = place_steps(
        work.order,
        work.steps,
        frozenset(work.graph.roots),
        frozenset(work.leaves),
        work.scores,
        alignments,
        lambda node: work.home(node).device,
    )
    return replace(work, placement=placement)


def place_steps(
    nodes: Sequence[Node],
    steps: Sequence[Step],
    roots: Collection[Node],
    outside: Collection[Node],
    scores: Collection[Node],
    alignments: Mapping[str, int],
    device_of: Callable[[Node], str] = lambda node: "",
) -> Placement:
    """Give every one of `nodes` a place.

    steps       of all devices, in one order; lifetimes on every device follow it
    roots       nodes whose memory must survive to the end
    outside     nodes whose memory is not in an arena: leaves, and the result of a loop's body
    scores      nodes that the attention budget counts
    alignments  of each device's arena
    """
    nodes = (*nodes, *own_nodes(nodes, steps))
    sharing = Sharing(nodes, steps, roots, outside)
    blocks = lifetimes(sharing)
    scratch = {i: Interval(i, i, step.scratch) for i, step in enumerate(steps) if step.scratch}
    counted = [node for node in sharing.computed if node in scores and sharing.in_arena(node)]
    devices = [device_of(step.node) for step in steps]
    offsets: dict[Node, int] = {}
    scratch_at = [0] * len(steps)
    arenas = {}
    for device, alignment in alignments.items():
        mine = [node for node in blocks if device_of(node) == device]
        with_scratch = [i for i in scratch if devices[i] == device]
        intervals = [blocks[node] for node in mine] + [scratch[i] for i in with_scratch]
        packed, nbytes = pack(intervals, alignment)
        offsets.update(zip(mine, packed))
        for i, offset in zip(with_scratch, packed[len(mine) :]):
            scratch_at[i] = offset
        live = tuple(live_bytes(intervals, len(steps)))
        here = [i for i, name in enumerate(devices) if name == device]
        tensors = [node for node in counted if device_of(node) == device]
        peak = _score_peak(sharing, tensors, scores, frozenset(here))
        arenas[device] = Arena(nbytes, live, peak)
    spots = _spots(nodes, sharing, offsets)
    return Placement(spots, tuple(scratch_at), arenas, sharing.copied_parts)


def lifetimes(sharing: Sharing) -> dict[Node, Interval]:
    """Block -> its lifetime and size."""
    spans: dict[Node, list[int]] = {}
    end = len(sharing.steps) - 1
    for node, i in sharing.computed.items():
        if sharing.in_arena(node):
            span = spans.setdefault(sharing.block(node), [i, i])
            span[0] = min(span[0], i)
            span[1] = max(span[1], min(sharing.last[node], end))
    return {node: Interval(a, b, _nbytes(node, sharing)) for node, (a, b) in spans.items()}


def _nbytes(node: Node, sharing: Sharing) -> int:
    step = sharing.steps[sharing.computed[node]]
    return step.nbytes if step.node is node else node.spec.nbytes


def _spots(
    nodes: Sequence[Node], sharing: Sharing, offsets: Mapping[Node, int]
) -> dict[Node, Spot]:
    """The spots of all nodes that are in memory.

    offsets  of blocks, in their arenas
    """
    spots: dict[Node, Spot] = {}
    for node in nodes:
        if node in sharing.outside:
            spots[node] = Spot(node, 0, node.nb)
        elif node.op.view is not None:
            if viewed(node) in spots:  # else a fused step covers it, and no other step reads it
                spots[node] = _view_spot(node, spots[viewed(node)])
        elif node.op.writes is not None:
            if written(node) in spots:
                spots[node] = spots[written(node)]
        elif node in sharing.parent:
            concat, start = sharing.parent[node]
            units = (start[0] // node.dtype.block, *start[1:])
            inside = sum(s * b for s, b in zip(units, concat.spec.nb))
            spots[node] = Spot(None, offsets[sharing.block(node)] + inside, concat.spec.nb)
        elif node in sharing.computed:
            spots[node] = Spot(None, offsets[sharing.block(node)], node.spec.nb)
    return spots


def _view_spot(view: Node, source: Spot) -> Spot:
    assert view.op.view is not None
    place = view.op.view(view, source.nb)
    assert place is not None
    return Spot(source.base, source.offset + place[0], place[1])


def _score_peak(
    sharing: Sharing, counted: Sequence[Node], scores: Collection[Node], here: Collection[int]
) -> int:
    """The largest sum of counted blocks alive at once, and the scratch of steps that use them.

    counted  the nodes in the device's arena that the attention budget counts
    scores   the nodes of all devices that it counts
    here     the steps on the device
    """
    starts: dict[int, list[Node]] = {}
    for node in counted:
        starts.setdefault(sharing.computed[node], []).append(node)
    alive: dict[Node, int] = {}  # node -> the last step that reads it
    peak = 0
    for i, step in enumerate(sharing.steps):
        for node in starts.get(i, ()):
            alive[node] = sharing.last[node]
        scratch = _counted_scratch(step, sharing, scores) if i in here else 0
        if not alive and not scratch:
            continue
        blocks = {sharing.block(node) for node in alive}
        peak = max(peak, scratch + sum(block.spec.nbytes for block in blocks))
        alive = {node: end for node, end in alive.items() if end > i}
    return peak


def _counted_scratch(step: Step, sharing: Sharing, scores: Collection[Node]) -> int:
    """The scratch of a step that the attention budget counts."""
    if isinstance(step, LoopStep):
        return max(body.score_peak for body in step.bodies)
    uses_scores = any(n in scores for n in (*step.nodes, *map(sharing.owner.get, step.reads)))
    return step.scratch if uses_scores else 0

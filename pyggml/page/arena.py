"""The blocks of a plan's arenas over its steps: what the planner packed, found again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pyggml.backends.step import LoopStep, own_nodes
from pyggml.node import Node
from pyggml.passes.place import lifetimes
from pyggml.passes.sharing import Sharing
from pyggml.passes.work import Work
from pyggml.transfer import transfer

#: What a block holds: its number in the page's data.
TENSOR, SCORES, SCRATCH, LOOP, COPY = range(5)


@dataclass(frozen=True, slots=True)
class Block:
    """Memory of an arena that is in use from step `start` through step `end`.

    kind     TENSOR; SCORES: the attention budget counts it; SCRATCH of a kernel; LOOP: the arena
             of a loop's pieces; COPY: from another device
    tensors  what it holds, with the step that computes each: a result may take over the memory of
             a source, and parts of a concat are written in place. Empty for scratch
    """

    device: str
    offset: int
    nbytes: int
    start: int
    end: int
    kind: int
    tensors: tuple[tuple[int, Node], ...]


def blocks_of(work: Work) -> list[Block]:
    """All blocks of all arenas. The bytes alive in each step add up to the arena's `live`."""
    steps = work.steps
    nodes = (*work.order, *own_nodes(work.order, steps))
    sharing = Sharing(nodes, steps, frozenset(work.graph.roots), frozenset(work.leaves))
    inside: dict[Node, list[tuple[int, Node]]] = {}
    for node, step in sharing.computed.items():
        if sharing.in_arena(node):
            inside.setdefault(sharing.block(node), []).append((step, node))
    blocks = []
    for node, life in lifetimes(sharing).items():
        tensors = tuple(sorted(inside[node], key=lambda pair: pair[0]))
        blocks.append(
            Block(
                work.home(node).device, work.placed.spots[node].offset, life.nbytes, life.start,
                life.end, _kind(work, [node for _, node in tensors]), tensors,
            )
        )  # fmt: skip
    return [*blocks, *_scratch(work)]


def _kind(work: Work, nodes: list[Node]) -> int:
    if any(node in work.scores for node in nodes):
        return SCORES
    return COPY if any(node.op is transfer for node in nodes) else TENSOR


def _scratch(work: Work) -> Iterator[Block]:
    for i, (step, offset) in enumerate(zip(work.steps, work.placed.scratch_at)):
        if step.scratch:
            kind = LOOP if isinstance(step, LoopStep) else SCRATCH
            device = work.home(step.node).device
            yield Block(device, offset, step.scratch, i, i, kind, ())

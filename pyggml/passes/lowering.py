"""Nodes in order -> steps in order, loops with their bodies lowered and placed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pyggml.backends.base import Backend, BodyPlan, Step
from pyggml.dag import toposort
from pyggml.graph import Node
from pyggml.loop import Body, loop_of
from pyggml.passes.placement import place


def lower(
    nodes: Sequence[Node], backend: Backend, keep: Collection[Node], scores: Collection[Node]
) -> list[Step]:
    """Steps for `nodes`, sources first. Loops stand alone; between them the backend decides.

    scores  the tensors that the attention budget counts, for the bodies' own peaks
    """
    steps: list[Step] = []
    run: list[Node] = []
    for node in nodes:
        if node.op.leaf or node.op.view is not None:
            continue
        if loop_of(node) is None:
            run.append(node)
            continue
        steps += backend.lower(run, keep)
        run = []
        steps.append(_lower_loop(node, backend, scores))
    return steps + backend.lower(run, keep)


def _lower_loop(node: Node, backend: Backend, scores: Collection[Node]) -> Step:
    loop = loop_of(node)
    assert loop is not None
    bodies = tuple(_plan_body(body, backend, scores) for body in loop.bodies())
    reads = tuple(s for s in node.src if s is not None)
    scratch = max(body.nbytes for body in bodies)
    return Step(node, (node,), reads, scratch=scratch, loop=loop, bodies=bodies)


def _plan_body(body: Body, backend: Backend, scores: Collection[Node]) -> BodyPlan:
    """Lower and place one body; its result and its pieces are memory of the loop's operands."""
    nodes = toposort([body.out])
    steps = lower(nodes, backend, {body.out}, scores)
    outside = {body.out, *(n for n in nodes if n.op.leaf)}
    placed = place(nodes, steps, {body.out}, outside, scores, backend.alignment)
    return BodyPlan(
        body, tuple(steps), placed.places, placed.scratch_at, placed.arena, placed.score_peak
    )

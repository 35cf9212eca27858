"""Nodes in order -> steps in order, loops with their bodies lowered and placed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from pyggml.backends.base import Backend, BodyPlan, Step, WeightLayout
from pyggml.graph import toposort, users_of
from pyggml.loop import Body, loop_of
from pyggml.node import Node
from pyggml.passes.placement import place
from pyggml.transfer import origin, transfer

Layouts = Mapping[Node, WeightLayout]
Users = Mapping[Node, Sequence[Node]]


def lower(
    nodes: Sequence[Node],
    backend: Backend,
    roots: Collection[Node],
    users: Users,
    scores: Collection[Node],
    layouts: Layouts,
    fuse: bool,
) -> list[Step]:
    """Steps for `nodes`, sources first, all of one device. Loops and loading of weights stand
    alone; between them the backend decides.

    scores  the tensors that the attention budget counts, for the bodies' own peaks
    fuse    whether a step may cover several nodes
    """
    steps: list[Step] = []
    run: list[Node] = []

    def finish_run() -> None:
        steps.extend(backend.lower(run, _kept(run, roots, users), layouts, fuse=fuse))
        run.clear()

    for node in nodes:
        if node.op.leaf or node.op.view is not None:
            continue
        if node.op is transfer:
            finish_run()
            kept = layouts[node]
            steps.append(Step(node, (node,), (origin(node),), strided=False, layout=kept))
        elif loop_of(node) is not None:
            finish_run()
            steps.append(_lower_loop(node, backend, scores, fuse))
        else:
            run.append(node)
    finish_run()
    return steps


def _kept(run: Sequence[Node], roots: Collection[Node], users: Users) -> set[Node]:
    """Nodes of a run that something outside it reads, through views too."""
    mine = set(run)
    kept = set()
    for node in run:
        shown = [node]  # the node and its views
        for view in shown:
            if view in roots or any(u.op.view is None and u not in mine for u in users[view]):
                kept.add(node)
                break
            shown += [user for user in users[view] if user.op.view is not None]
    return kept


def _lower_loop(node: Node, backend: Backend, scores: Collection[Node], fuse: bool) -> Step:
    loop = loop_of(node)
    assert loop is not None
    bodies = tuple(_plan_body(body, backend, scores, fuse) for body in loop.bodies())
    reads = tuple(s for s in node.src if s is not None)
    scratch = max(body.nbytes for body in bodies)
    workspace = max(step.workspace for body in bodies for step in body.steps)
    return Step(
        node, (node,), reads, scratch=scratch, loop=loop, bodies=bodies, workspace=workspace
    )


def _plan_body(body: Body, backend: Backend, scores: Collection[Node], fuse: bool) -> BodyPlan:
    """Lower and place one body; its result and its pieces are memory of the loop's operands."""
    nodes = toposort([body.out])
    steps = lower(nodes, backend, {body.out}, users_of(nodes), scores, {}, fuse)
    outside = {body.out, *(n for n in nodes if n.op.leaf)}
    placed = place(nodes, steps, {body.out}, outside, scores, {"": backend.alignment})
    arena = placed.arenas[""]
    return BodyPlan(
        body, tuple(steps), placed.places, placed.scratch_at, arena.nbytes, arena.score_peak
    )

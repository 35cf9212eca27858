"""Steps: splits of one device with their copies and waits, loops with their bodies."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from pyggml.backends.base import Backend
from pyggml.backends.step import BodyPlan, Layouts, Step, own_nodes
from pyggml.graph import toposort, users_of
from pyggml.loop import Body, loop_of
from pyggml.node import Node
from pyggml.ops.leaf import constant_op
from pyggml.passes.place import place_steps
from pyggml.passes.work import Split, Work, runs
from pyggml.transfer import origin, transfer

Users = Mapping[Node, Sequence[Node]]


def lower(work: Work) -> Work:
    """Splits: runs of one device lowered by its backend, with the copies that they wait for."""
    users = work.graph.users
    layouts = {
        node: work.home(node).weight_layout(origin(node), users[node])
        for node in work.order
        if origin(node).op is constant_op and node in users
    }
    work = replace(work, layouts=layouts)
    groups: list[tuple[Backend, list[Node]]] = []
    for node in work.order:
        if runs(node):
            home = work.home(node)
            if not groups or groups[-1][0] is not home:
                groups.append((home, []))
            groups[-1][1].append(node)
    splits = [_split(work, backend, nodes, users) for backend, nodes in groups]
    own = {node: s.backend for s in splits for node in own_nodes(work.order, s.steps)}
    work = replace(work, homes={**work.homes, **own})
    return replace(work, splits=tuple(_with_waits(work, splits)))


def _split(
    work: Work, backend: Backend, nodes: list[Node], users: Mapping[Node, list[Node]]
) -> Split:
    copies = {n: None for n in nodes if n.op is transfer and n not in work.layouts}
    rest = [n for n in nodes if n not in copies]
    roots, layouts = set(work.graph.roots), work.layouts
    steps = steps_of(rest, backend, roots, users, work.scores, layouts, work.fuse)
    return Split(backend, tuple(Step(n, (n,), (origin(n),)) for n in copies), tuple(steps))


def _with_waits(work: Work, splits: Sequence[Split]) -> Iterator[Split]:
    """Splits with what must be over before each: values that it copies, and copies that others
    make of memory which it may use again."""
    made = {
        node: i for i, split in enumerate(splits) for step in split.steps for node in step.nodes
    }
    copying: dict[str, dict[str, int]] = {}  # device -> who copies from it since its last split
    for i, split in enumerate(splits):
        mine = split.backend.device
        waits: dict[str, int] = {}
        for step in split.copies:
            source = origin(step.node).base
            device = work.home(source).device
            if source in made:
                waits[device] = max(made[source], waits.get(device, 0))
            if mine != "host":  # for the host, the other device does it in its turn
                copying.setdefault(device, {})[mine] = i
        copies = copying.pop(mine, {}).items()
        spares = [k for device, k in copies if waits.get(device, -1) < k]  # else that is waited for
        yield replace(split, waits=tuple(sorted(waits.values())), spares=tuple(sorted(spares)))


# -- steps of one device ----------------------------------------------------------------------


def steps_of(
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
    steps = steps_of(nodes, backend, {body.out}, users_of(nodes), scores, {}, fuse)
    outside = {body.out, *(n for n in nodes if n.op.leaf)}
    placed = place_steps(nodes, steps, {body.out}, outside, scores, {"": backend.alignment})
    arena = placed.arenas[""]
    return BodyPlan(
        body, tuple(steps), placed.spots, placed.scratch_at, arena.nbytes, arena.score_peak
    )

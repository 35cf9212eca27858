"""Lowers the ordered nodes to steps: splits by device with copies and waits, loops with bodies."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from pyggml.backends.base import Backend, KeepsDecoded, in_host_memory
from pyggml.backends.step import (
    BodyPlan,
    Layouts,
    LoadStep,
    LoopStep,
    Step,
    WeightLayout,
    own_nodes,
)
from pyggml.graph import Users, toposort, users_of
from pyggml.loop import Body, Loop, loop_of
from pyggml.node import Node
from pyggml.ops.leaf import constant_op
from pyggml.ops.linear import expert_ids
from pyggml.passes.ahead import is_borrowed, reads_ahead
from pyggml.passes.place import place_steps
from pyggml.passes.work import Split, Work, runs
from pyggml.transfer import is_resident, origin, transfer


def lower(work: Work) -> Work:
    """The work with `layouts` and `splits` filled in.

    A split is a run of nodes of one device, lowered by its backend.
    """
    users = work.graph.users
    layouts = {
        node: _layout(work, node)
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
    private = {node: s.backend for s in splits for node in own_nodes(work.order, s.steps)}
    work = replace(work, homes={**work.homes, **private})
    return replace(work, splits=tuple(_with_waits(work, splits)))


def _uses(work: Work, constant: Node) -> list[Node]:
    """The nodes that read a constant, directly or through views, each view before its readers; and
    if the host lends it, likewise those that read the copies."""
    users, roots, lends = work.graph.users, work.graph.roots, in_host_memory(work.home(constant))
    # Copies that a store keeps, and those of another device's weights, come from the file.
    uses = [u for u in users[constant] if u.op is not transfer or (lends and not is_resident(u))]
    for use in uses:
        if (use.op.view is not None or use.op is transfer) and use not in roots:
            uses += users[use]
    return uses


def _layout(work: Work, constant: Node) -> WeightLayout:
    """How the constant's home stores it: as in a file if other backends read the same memory, or
    if a device that borrows it can read nothing else."""
    uses = _uses(work, constant)
    layout = _own_layout(work, constant, uses)
    copies = (use for use in uses if use.op is transfer)
    if all(work.home(u).borrows(origin(constant), layout, _layout(work, u)) for u in copies):
        return layout
    return WeightLayout(constant.spec.nbytes)


def _own_layout(work: Work, constant: Node, uses: Sequence[Node]) -> WeightLayout:
    home = work.home(constant)
    readers = {work.home(use) for use in uses if use.op.view is None}
    if any(other is not home and other.device == home.device for other in readers):
        return WeightLayout(constant.spec.nbytes)
    if work.decode_weights and isinstance(home, KeepsDecoded):
        return home.decoded_layout(constant, uses)
    return home.weight_layout(constant, uses)


def _split(work: Work, backend: Backend, nodes: Sequence[Node], users: Users) -> Split:
    """The split of consecutive nodes of a device, without what it waits for."""
    copies = {n: None for n in nodes if n.op is transfer and n not in work.layouts}
    others = [n for n in nodes if n not in copies]
    roots = set(work.graph.roots)
    steps = steps_of(others, backend, roots, users, work.scores, work.layouts, work.fuse)
    if any(isinstance(step, LoadStep) for step in steps):
        loads = _loads(work, steps, users)
        steps = [loads.get(step.node, step) for step in steps]
    return Split(backend, tuple(Step(n, (n,), (origin(n),)) for n in copies), tuple(steps))


def _loads(work: Work, steps: Sequence[Step], users: Users) -> dict[Node, LoadStep]:
    """Weight -> its load among the steps of a split, which knows what may be left out and whether
    it is early."""
    loads: dict[Node, LoadStep] = {}
    waiting: dict[Node, bool] = {}  # weight that nothing has read yet -> whether a step came since
    place = {node: i for i, node in enumerate(work.order)}
    for step in steps:
        if isinstance(step, LoadStep):
            waiting[step.node] = False
            loads[step.node] = _with_ids(step, users[step.node], place)
            continue
        for node in {read.base for read in step.reads} & waiting.keys():
            loads[node].ahead = waiting.pop(node) and reads_ahead(work)
        waiting = dict.fromkeys(waiting, True)
    return loads


def _with_ids(step: LoadStep, readers: Sequence[Node], place: Mapping[Node, int]) -> LoadStep:
    """The load; with ids, if all its readers choose experts by the same, known when it begins."""
    first, *others = {expert_ids(reader) for reader in readers}
    if first is None or others:
        return step
    source = first.base
    if is_borrowed(source):  # its own load may not be over by then
        return step
    is_computed_here = runs(source) and source.op is not transfer  # copies come before all steps
    if is_computed_here and place[source] > place[step.node]:
        return step
    return replace(step, reads=(*step.reads, first), ids=first)


def _with_waits(work: Work, splits: Sequence[Split]) -> Iterator[Split]:
    """The splits with `waits` and `spares` filled in.

    A split waits for those that compute what it copies. It may overwrite memory that other splits
    copy from its device, so these copies must end first. The host does not wait for splits but for
    what they send: what one device sends may arrive before another has its copies.
    """
    split_of = {
        node: i for i, split in enumerate(splits) for step in split.steps for node in step.nodes
    }
    # Device -> the devices that have copied from it since its last split, and their last split.
    copying: dict[str, dict[str, int]] = {}
    for i, split in enumerate(splits):
        device = split.backend.device
        waits: dict[str, int] = {}  # device -> the last of its splits that this one needs
        for step in split.copies:
            source = origin(step.node).base
            other = work.home(source).device
            if source in split_of:
                waits[other] = max(split_of[source], waits.get(other, 0))
            if device != "host":  # a copy to the host is in the queue of the other device
                copying.setdefault(other, {})[device] = i
        copies = copying.pop(device, {}).items()
        early = device == "host" and len(waits) > 1
        spares = [k for other, k in copies if early or waits.get(other, -1) < k]
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
    """The steps that compute `nodes` (sources first) on one device.

    A loop, and a transfer that loads a weight, is a step by itself. The backend lowers the nodes
    between them.

    roots   nodes that must be in memory at the end
    scores  tensors that the attention budget counts, for the peaks of loops' bodies
    fuse    whether a step may cover several nodes
    """
    steps: list[Step] = []
    run: list[Node] = []

    def lower_run() -> None:
        steps.extend(backend.lower(run, _kept(run, roots, users), layouts, fuse=fuse))
        run.clear()

    for node in nodes:
        if node.op.leaf or node.op.view is not None:
            continue
        if node.op is transfer:
            lower_run()
            source, layout = origin(node), layouts[node]
            steps.append(LoadStep(node, (node,), (source,), strided=False, layout=layout))
        elif (loop := loop_of(node)) is not None:
            lower_run()
            steps.append(_loop_step(node, loop, backend, scores, fuse))
        else:
            run.append(node)
    lower_run()
    return steps


def _kept(run: Sequence[Node], roots: Collection[Node], users: Users) -> set[Node]:
    """The nodes of a run that nodes outside it read, directly or through views, and its roots."""
    inside = set(run)
    stored = set()
    for node in run:
        views = [node]  # the node and its views
        for view in views:
            if view in roots or any(u.op.view is None and u not in inside for u in users[view]):
                stored.add(node)
                break
            views += [user for user in users[view] if user.op.view is not None]
    return stored


# -- loops ------------------------------------------------------------------------------------


def _loop_step(
    node: Node, loop: Loop, backend: Backend, scores: Collection[Node], fuse: bool
) -> LoopStep:
    bodies = tuple(_plan_body(body, backend, scores, fuse) for body in loop.bodies())
    reads = tuple(s for s in node.src if s is not None)
    scratch = max(body.nbytes for body in bodies)
    workspace = max(step.workspace for body in bodies for step in body.steps)
    return LoopStep(
        node, (node,), reads, scratch=scratch, loop=loop, bodies=bodies, workspace=workspace
    )


def _plan_body(body: Body, backend: Backend, scores: Collection[Node], fuse: bool) -> BodyPlan:
    """One body lowered and placed. Its result and its pieces are in the memory of the loop's
    operands."""
    nodes = toposort([body.out])
    steps = steps_of(nodes, backend, {body.out}, users_of(nodes), scores, {}, fuse)
    outside = {body.out, *(n for n in nodes if n.op.leaf)}
    placement = place_steps(nodes, steps, {body.out}, outside, scores, {"": backend.alignment})
    arena = placement.arenas[""]
    return BodyPlan(
        body,
        tuple(steps),
        placement.spots,
        placement.scratch_at,
        arena.nbytes,
        arena.score_peak,
    )

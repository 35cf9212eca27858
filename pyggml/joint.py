"""Joint nodes: what several devices compute in one step that all of them take together.

A collective of `ops/collective.py` reads the parts of all devices. Where a backend runs it as a
whole (`Joins`), the planner replaces it by one joint node on each device, which reads the part of
its own device and nothing else: the library brings the others. A copy between two such devices is a
pair of joint nodes, one that sends and one that receives. So each device's steps stay in one split,
and the memory of a part is free once its own device has read it.

The devices of a turn must all come to it, and all must come to their turns in one order, or each
would wait for another. `turn` is the number of a joint step in that order (passes/jointly.py).

The design that lost keeps the parts of other devices as sources. Orders, lifetimes, copies and
messages would then all have to know which sources are not read here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pyggml.dtypes import F32
from pyggml.node import Node
from pyggml.operation import Op
from pyggml.spec import Spec
from pyggml.traits import Cost


def _rule(
    part: Node, *, places: tuple[str, ...], index: int, turn: int, exact: bool = True
) -> Spec:
    """The sum of the parts of all `places`, in the order of NCCL.

    places  the devices that take the step
    index   the number of this device among them
    turn    the number of the step among the joint steps of a plan
    exact   False: parts are no more exact than products of rounded operands
    """
    return part.spec


def _gather_rule(
    part: Node, *, places: tuple[str, ...], index: int, turn: int, sizes: tuple[int, ...]
) -> Spec:
    """The elements of all parts, one after another; `sizes` are their numbers."""
    return Spec.of(part.dtype, (sum(sizes), 1, 1, 1), 1)


def _scatter_rule(part: Node, *, places: tuple[str, ...], index: int, turn: int) -> Spec:
    """Piece number `index` of the sum of all parts; all pieces have the same number of elements."""
    return Spec.of(part.dtype, (part.spec.elements // len(places), 1, 1, 1), 1)


def _send_rule(part: Node, *, places: tuple[str, ...], index: int, turn: int) -> Spec:
    """`part` leaves for the second of two `places`. The result says nothing; it only orders."""
    return Spec.of(F32, (1, 1, 1, 1), 1)


def _receive_rule(*, places: tuple[str, ...], index: int, turn: int, like: Spec) -> Spec:
    """What the first of two `places` sends."""
    return like


def _send_cost(node: Node) -> Cost:
    nbytes = float(node["part"].spec.nbytes)
    return Cost(0.0, nbytes, sent=nbytes)


def _receive_cost(node: Node) -> Cost:
    return Cost(0.0, float(node.spec.nbytes), sent=float(node.spec.nbytes))


def _devices(node: Node) -> int:
    return len(node.attrs["places"])


def _reduce_cost(node: Node) -> Cost:
    """A ring: each device sends its part in pieces, and then the sum of one piece."""
    n, nbytes = _devices(node), node["part"].spec.nbytes
    flops = (n - 1.0) / n * node["part"].spec.elements
    return Cost(flops, 3.0 * nbytes, sent=2.0 * (n - 1) / n * nbytes)


def _gather_cost(node: Node) -> Cost:
    """Each device sends its part to every other one."""
    sent = float(node.spec.nbytes - node["part"].spec.nbytes)
    return Cost(0.0, 2.0 * node.spec.nbytes, sent=sent)


def _scatter_cost(node: Node) -> Cost:
    n, nbytes = _devices(node), node["part"].spec.nbytes
    flops = (n - 1.0) / n * node["part"].spec.elements
    return Cost(flops, 2.0 * nbytes, sent=(n - 1) / n * nbytes)


joint_reduce: Op[Any] = Op(_rule, name="joint_reduce", cost=_reduce_cost, joint=True)
joint_gather: Op[Any] = Op(_gather_rule, name="joint_gather", cost=_gather_cost, joint=True)
joint_scatter: Op[Any] = Op(_scatter_rule, name="joint_scatter", cost=_scatter_cost, joint=True)

joint_send: Op[Any] = Op(_send_rule, name="joint_send", cost=_send_cost, joint=True)
joint_receive: Op[Any] = Op(_receive_rule, name="joint_receive", cost=_receive_cost, joint=True)


def joint(op: Op[Any], *src: Node, **attrs: Any) -> Node:
    """A joint node. Its attributes are not those of a user, whose types would be checked."""
    spec = op.rule(*src, **attrs)
    assert isinstance(spec, Spec)
    return op.make(src, attrs, spec, line=False)


def turn_of(node: Node) -> int:
    """The number of a joint node among those of its plan."""
    turn: int = node.attrs["turn"]
    return turn


def places_of(node: Node) -> tuple[str, ...]:
    """The devices that take a joint step together."""
    places: tuple[str, ...] = node.attrs["places"]
    return places


def by_turn(nodes: Iterable[Node]) -> dict[int, list[Node]]:
    """Turn -> its joint nodes, one for each device; in the order of turns."""
    turns: dict[int, list[Node]] = {}
    for node in nodes:
        if node.op.joint:
            turns.setdefault(turn_of(node), []).append(node)
    return dict(sorted(turns.items()))


def rounds(parts: Sequence[Sequence[Node | None]]) -> Iterator[Mapping[int, int]]:
    """The turns of several sequences of steps, in order: number of a sequence -> number of its
    joint step.

    parts  the joint node of each step, if it has one
    """
    turns: dict[int, dict[int, int]] = {}
    for number, nodes in enumerate(parts):
        for i, node in enumerate(nodes):
            if node is not None:
                turns.setdefault(turn_of(node), {})[number] = i
    yield from (turns[turn] for turn in sorted(turns))


def cliques(splits: Sequence[Sequence[Node | None]]) -> list[tuple[int, ...]]:
    """The splits with joint steps of the same turns, which run together.

    splits  of each, the joint node of each step, if it has one
    """
    clique: dict[int, list[int]] = {}  # split -> those with which it runs
    first: dict[int, int] = {}  # turn -> the first split that has it
    for i, nodes in enumerate(splits):
        for node in nodes:
            if node is None:
                continue
            mine, others = clique.setdefault(i, [i]), clique[first.setdefault(turn_of(node), i)]
            if mine is not others:
                others += mine
                clique |= dict.fromkeys(mine, others)
    unique = {id(members): tuple(sorted(members)) for members in clique.values()}
    return list(unique.values())

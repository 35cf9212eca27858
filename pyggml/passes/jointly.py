"""Which collectives the devices take together, and the order of such steps.

A backend that `Joins` takes three forms as a whole: a sum of parts (`all_reduce`), parts one after
another in memory (`all_gather` along the outermost axis), and equal pieces of a sum one after
another (`reduce_scatter` along that axis). `in_forms` gives every other collective in these: a
gather along another axis is a gather of whole parts and a `concat`, partial attentions are
gathered and merged on each device.

`cross` puts a joint node on every device in place of these collectives. All devices come to their
joint steps in one order, that of `turn`, which fits the data of all: a collective comes before
another one if any device needs it first. `joint_edges` holds the order of steps to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from pyggml.backends.base import Backend, Joins
from pyggml.dtypes import F32
from pyggml.graph import rebuilt
from pyggml.interning import inherit
from pyggml.joint import (
    by_turn,
    joint,
    joint_gather,
    joint_receive,
    joint_reduce,
    joint_scatter,
    joint_send,
)
from pyggml.node import Node
from pyggml.ops.collective import all_gather, all_reduce, reduce_scatter
from pyggml.ops.copy import concat, cont
from pyggml.ops.elementwise import add
from pyggml.ops.merge import lse_finish, lse_sum
from pyggml.ops.moe import mul_multi_add
from pyggml.ops.views import bases, reshape, state_of, view
from pyggml.passes.work import Work, runs, viewed
from pyggml.transfer import origin, transfer

if TYPE_CHECKING:
    from pyggml.passes.sharded import Builder
    from pyggml.passes.stages import Shard

FORMS = (all_reduce, all_gather, reduce_scatter)
#: Puts a new node on a device.
Put = Callable[[Node], Node]


@dataclass(frozen=True, eq=False, slots=True)
class Meeting:
    """A step that several devices take together.

    node            a collective; or what the first device sends to the second
    parts, devices  what each device has, in the order of the sum
    """

    node: Node
    parts: tuple[Node, ...]
    devices: tuple[Backend, ...]
    turn: int

    def number(self, device: Backend) -> int:
        """The number of a device among those that meet."""
        return self.devices.index(device)

    def attrs(self, number: int) -> dict[str, Any]:
        places = tuple(device.device for device in self.devices)
        return {"places": places, "index": number, "turn": self.turn}

    def joint(self, part: Node, number: int) -> Node:
        """The joint node of a device.

        part  what it has, in the graph that is being built
        """
        if self.node.op in FORMS:
            return _joint(self.node, part, self.attrs(number))
        if number == 0:
            return joint(joint_send, part, **self.attrs(number))
        return joint(joint_receive, like=part.spec, **self.attrs(number))

    def shown(self, node: Node, step: Node) -> Node:
        """The result of the collective, as its readers see it."""
        rank = node.spec.rank  # outputs have it, also where trailing sizes are 1
        same = step.ne == node.ne and step.spec.rank == rank
        return step if same else reshape(step, ne=node.ne[:rank])


@dataclass(frozen=True, slots=True)
class Meetings:
    """The steps of a graph that several devices take together.

    collectives  collective -> its meeting
    copies       (tensor, device that reads it) -> the meeting in which it is sent
    """

    collectives: Mapping[Node, Meeting]
    copies: Mapping[tuple[Node, str], Meeting]


def _joint(node: Node, part: Node, attrs: Mapping[str, Any]) -> Node:
    """The joint node of a collective."""
    if node.op is all_reduce:
        exact = not all(_may_round(each) for each in node.src if each is not None)
        return joint(joint_reduce, part, exact=exact, **attrs)
    if node.op is reduce_scatter:
        return joint(joint_scatter, part, **attrs)
    sizes = tuple(source.spec.elements for source in node.src if source is not None)
    return joint(joint_gather, part, sizes=sizes, **attrs)


def _may_round(part: Node) -> bool:
    """Whether a part consists of products whose operands backends may round."""
    while part.op is reshape:
        part = part["a"]
    if part.op is add:
        return _may_round(part["a"]) and _may_round(part["b"])
    if part.op is mul_multi_add:
        return _may_round(part["a"])
    weights = [part[name] for name in part.op.weights]
    return (
        bool(weights) and part.attrs["prec"] != "f32" and all(w.dtype is not F32 for w in weights)
    )


def meetings(work: Work, nodes: Sequence[Node]) -> Meetings:
    """The steps that devices take together.

    nodes  all nodes in an order in which they can run
    """
    known: dict[tuple[object, ...], Meeting] = {}
    collectives: dict[Node, Meeting] = {}
    copies: dict[tuple[Node, str], Meeting] = {}
    count = 0
    for node in nodes:
        if node.op in FORMS:
            devices = tuple(work.home(part) for part in node.src if part is not None)
            if meets(node, work.home(node), devices, work.shard):
                attrs = tuple((name, value) for name, value in node.attrs.items() if name != "rank")
                key = (node.op, node.src, attrs)
                if key not in known:
                    parts = tuple(part for part in node.src if part is not None)
                    known[key] = Meeting(node, parts, devices, count)
                    count += 1
                collectives[node] = known[key]
                continue
        for source in node.src if node.op.view is None else ():
            base, reader = None if source is None else freed(source), work.home(node)
            if base is None or (base, reader.device) in copies or not _sent(work, base, reader):
                continue
            copies[base, reader.device] = Meeting(
                base, (base, base), (work.home(base), reader), count
            )
            count += 1
    return Meetings(collectives, copies)


def freed(node: Node) -> Node:
    """What a node is a view of that any device can take of its copy of it. `state_of` is not such a
    view: it shows more than its source."""
    while node.op.view is not None and node.op is not state_of:
        node = viewed(node)
    return node


def _sent(work: Work, node: Node, reader: Backend) -> bool:
    """Whether a device sends a tensor to another one in a step that both take. A part of a concat
    may have gaps."""
    sender = work.home(node)
    if sender is reader or not runs(node) or node.op is transfer or work.shard is None:
        return False
    if not {sender, reader} <= set(work.shard.devices):
        return False
    if not isinstance(sender, Joins) or not isinstance(reader, Joins):
        return False
    users = work.graph.users[node]
    gathered = any(user.op.parts is not None and work.home(user) is sender for user in users)
    return sender.sends() and reader.sends() and not gathered


def meets(node: Node, home: Backend, devices: Sequence[Backend], shard: Shard | None) -> bool:
    """Whether the devices of the parts take a collective together: each has one part, and the
    result is wanted on one of them. They are devices of the shard: a process has one of these."""
    if node.op not in FORMS or not isinstance(home, Joins) or home not in devices:
        return False
    if shard is None or not set(devices) <= set(shard.devices):
        return False
    if len(devices) < 2 or len(set(devices)) < len(devices) or not _in_form(node):
        return False
    if not all(part is not None and part.contiguous for part in node.src):
        return False
    part = node.src[0]
    assert part is not None
    attrs = {"places": tuple(d.device for d in devices), "index": 0, "turn": 0}
    step = _joint(node, part, attrs)
    return all(isinstance(device, Joins) and device.joins(step) for device in devices)


def _in_form(node: Node) -> bool:
    part = node.src[0]
    assert part is not None
    if node.op is all_reduce:
        return bool(node.attrs["op"] == "sum")
    if prod(node.ne[node.attrs["dim"] + 1 :]) > 1:
        return False
    return node.op is all_gather or len(set(node.attrs["sizes"])) == 1


def taken_together(builder: Builder, new: Node, d: int, old: Node) -> Node | None:
    """A collective on device `d`, in forms that its devices take together; None if they take none.

    old  the node of the whole graph
    """
    backend, parts = builder.devices[d], [part for part in new.src if part is not None]
    homes = [builder.homes[part.base] for part in parts]
    if backend not in homes or not isinstance(backend, Joins):
        return None
    shard = builder.work.shard
    for i, (part, home) in enumerate(zip(parts, homes)):
        if not part.contiguous:
            parts[i] = builder.put(cont(part), builder.devices.index(home), old)
    new = rebuilt(new, tuple(parts))

    def put(node: Node) -> Node:
        if meets(node, backend, homes, shard):
            builder.homes[node] = backend
            return inherit(node, old)
        return builder.put(node, d, old)

    gather = all_gather(*map(_flat, parts), dim=0)
    able = any(meets(form, backend, homes, shard) for form in (new, gather))
    return in_forms(new, put) if able else None


def _flat(part: Node) -> Node:
    return reshape(part, ne=(part.spec.elements,))


def in_forms(node: Node, put: Put) -> Node:
    """A collective whose parts are contiguous, in the forms that devices take together."""
    parts = tuple(part for part in node.src if part is not None)
    if _in_form(node):
        return put(node)
    rank = node.attrs["rank"]
    if node.op is reduce_scatter:
        total = put(all_reduce(*parts, rank=rank))
        dim, sizes = node.attrs["dim"], node.attrs["sizes"]
        start = tuple(sum(sizes[:rank]) if axis == dim else 0 for axis in range(4))
        return put(cont(put(view(total, ne=node.ne[: node.spec.rank], start=start))))
    pieces = _gathered(parts, rank, put)
    if node.op is all_gather:
        whole = pieces[0]
        for piece in pieces[1:]:
            whole = put(concat(whole, piece, dim=node.attrs["dim"]))
        return whole
    merged: Node | None = None
    for piece in pieces:
        merged = put(lse_sum(piece, merged))
    assert merged is not None
    return put(lse_finish(merged))


def _gathered(parts: Sequence[Node], rank: int, put: Put) -> list[Node]:
    """All parts, on the device that gathers them."""
    whole, start = put(all_gather(*map(_flat, parts), dim=0, rank=rank)), 0
    pieces = []
    for part in parts:
        n = part.spec.elements
        piece = put(view(whole, ne=(n,), start=(start,)))
        pieces.append(put(reshape(piece, ne=part.ne[: part.spec.rank])))
        start += n
    return pieces


# -- order ------------------------------------------------------------------------------------


def joint_edges(work: Work) -> dict[Node, tuple[Node, ...]]:
    """Joint node -> what must be computed before it: all that a device of its turn needs, and its
    joint step of the turn before."""
    edges: dict[Node, tuple[Node, ...]] = {}
    last: dict[str, Node] = {}  # device -> its joint node of the latest turn
    for nodes in by_turn(work.graph.nodes).values():
        needs: dict[Node, None] = {}
        for node in nodes:
            for base in bases(node):
                source = origin(base).base if base.op is transfer else base
                if runs(source):
                    needs[source] = None
            before = last.get(work.home(node).device)
            if before is not None:
                needs[before] = None
        for node in nodes:
            edges[node] = tuple(needs)
            last[work.home(node).device] = node
    return edges

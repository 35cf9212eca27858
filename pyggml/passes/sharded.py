"""Builds the graph of a group of devices: for each node what every device needs of it.

It goes from the outputs to the sources. A device needs all of a tensor, a part of it, or its part
of a sum. Only what somebody needs is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pyggml.backends.base import Backend
from pyggml.errors import PyggmlError
from pyggml.graph import Graph, rebuilt
from pyggml.interning import inherit
from pyggml.node import Node
from pyggml.ops.attention import flash_attn_ext
from pyggml.ops.collective import all_gather, all_reduce, broadcast, reduce_scatter
from pyggml.ops.copy import cast, cont, get_rows
from pyggml.ops.elementwise import add
from pyggml.ops.leaf import constant, constant_op, part_of, state_op
from pyggml.ops.merge import lse_finish, lse_sum
from pyggml.ops.moe import grouped_topk
from pyggml.ops.reduce import top_k
from pyggml.ops.views import reshape, view
from pyggml.passes.bodies import Recursive, unwound
from pyggml.passes.chosen import choice
from pyggml.passes.divisions import Divisions
from pyggml.passes.jointly import taken_together
from pyggml.passes.meanings import on_device
from pyggml.passes.parts import (
    Family,
    Part,
    Sliced,
    along,
    covers,
    divided,
    interleaved,
    sliced,
)
from pyggml.passes.work import Work
from pyggml.spec import Spec
from pyggml.transfer import transfer

COLLECTIVES = (all_reduce, all_gather, reduce_scatter)
#: Numbers of devices.
Group = tuple[int, ...]


class Builder:
    """Nodes on devices. `new` nodes are memoized, so each is built once.

    group      node -> the devices that compute it
    mirrored   states that every device of their group has whole
    split      state -> the parts that the devices of its group have
    conflicts  states that were cut, but are also read whole or in other parts
    """

    def __init__(
        self,
        work: Work,
        devices: Sequence[Backend],
        groups: Mapping[Node, Group],
        divisions: Divisions,
        mirrored: frozenset[Node],
    ) -> None:
        self.work, self.devices = work, devices
        self.groups, self.divisions = groups, divisions
        self.mirrored = mirrored
        self.split: dict[Node, Family] = {}
        self.whole_states: set[Node] = set()
        self.conflicts: set[Node] = set()
        self.homes: dict[Node, Backend] = {}
        self.expanded = list(work.expanded)
        self.memo: dict[tuple[object, ...], Node] = {}
        self.written: dict[Node, dict[int, Node]] = {}
        self.steps: dict[tuple[Node, Family], Sliced | None] = {}
        self.refused: dict[int, dict[Node, str]] = {}

    def graph(self) -> Graph | None:
        """The graph of all devices; None if there are conflicts."""
        old = self.work.graph
        outputs = {
            key: unwound(self.whole(node, self.groups[node][0]))
            for key, node in old.outputs.items()
        }
        updates = [new for node in old.updates for new in self._update(node)]
        return None if self.conflicts else Graph(outputs, updates)

    # -- all of a tensor -----------------------------------------------------------------------

    def whole(self, node: Node, d: int) -> Recursive[Node]:
        """All of `node`, for a device to read."""
        key = (node, d)
        new = self.memo.get(key)
        if new is None:
            new = self.memo[key] = yield self._new_whole(node, d)
        return new

    def _new_whole(self, node: Node, d: int) -> Recursive[Node]:
        group = self.groups[node]
        if node.op.leaf:
            if node.op is state_op and d in group:
                self._read_whole(node)
            if d in group or node.op is not state_op:
                return self._leaf(node, d)
        if d not in group:
            near = group[d % len(group)]
            new = yield self.whole(node, near)
            return new if self._alone(d) else self.put(broadcast(new, rank=d), d, node)
        if self.divisions.is_partial(node):
            return (yield from self._summed(node, d))
        if node in self.divisions.choices:
            return (yield from choice(self, node, d))
        gathered = self.divisions.gathers.get(node)
        if gathered is not None:
            parts = []
            for i, other in enumerate(group):
                parts.append((yield self.part(node, gathered, i, other)))
            return self.put(all_gather(*parts, dim=0, rank=d), d, node)
        if node.op.writes is not None:
            self._read_whole(node.root)
        src: list[Node | None] = []
        for source in node.src:
            whole = None if source is None else (yield self.whole(source, d))
            src.append(whole)
        return self.put(rebuilt(node, tuple(src)), d, node)

    def _alone(self, d: int) -> bool:
        """Whether no other device computes the same as this one from what it reads."""
        plan = self.work.shard
        return plan is None or len(plan.shares) == 1 or d >= len(plan.devices)

    def _summed(self, node: Node, d: int) -> Recursive[Node]:
        parts = []
        for i, other in enumerate(self.groups[node]):
            parts.append((yield self._summand(node, i, other)))
        if self.divisions.kind(node) != "kv":
            return self.put(all_reduce(*parts, rank=d), d, node)
        if parts[0].ne != node.ne:
            return self.put(all_reduce(*parts, op="lse", rank=d), d, node)
        total: Node | None = None  # with its log-sum-exp, which no collective gives
        for part in parts:
            total = self.put(lse_sum(self.brought(part, d), total), d, node)
        assert total is not None
        return self.put(lse_finish(total, lse=True), d, node)

    def _leaf(self, node: Node, d: int) -> Node:
        """The leaf of device `d`."""
        if node.op is state_op and self.groups[node] == (d,):
            self.homes[node] = self.devices[d]
            return node
        new = part_of(node, d)
        self.homes[new] = self.devices[d]
        return inherit(new, node)

    def _read_whole(self, state: Node) -> None:
        if state.op is state_op:
            self.whole_states.add(state)
            if state in self.split:
                self.conflicts.add(state)

    # -- a part of a tensor --------------------------------------------------------------------

    def part(self, node: Node, family: Family, i: int, d: int) -> Recursive[Node]:
        """Part number `i` of the family of `node`, for device `d`.

        Another stage computes its own parts, one for each device of this one.
        """
        group = self.groups[node]
        if d not in group and len(group) == len(family) and node.op is not constant_op:
            d = group[i]
        key = (node, family, d)
        new = self.memo.get(key)
        if new is None:
            new = self.memo[key] = yield self._new_part(node, family, i, d)
        return new

    def _new_part(self, node: Node, family: Family, i: int, d: int) -> Recursive[Node]:
        part = family[i]
        if node.op is constant_op:
            new = inherit(
                part_of(node, d, (part.first(), part.within(node.ne), part.steps())), node
            )
            self.homes[new] = self.devices[d]
            return new
        if node.op is state_op and self._splits(node, family):
            new = part_of(node, d, (part.first(), part.within(node.ne), part.steps()))
            self.homes[new] = self.devices[d]
            return inherit(new, node)
        if not self._in_parts(node, family):
            return (yield from self._shown(node, family, i, d))
        ids = node.op.ids
        if node.op.writes is not None:
            if not self._splits(node.root, self._of_state(node, family)):
                return (yield from self._shown(node, family, i, d))
            if ids is not None and part.axis == ids.axis:
                a = yield self.part(node["a"], family, i, d)
                b = yield self.whole(node["b"], d)
                local = yield self.local(node["ids"], node.ne[ids.axis], family, i, d)
                return self._write(node, node.op(a, b, local), d)
        step = self._sliced(node, family)
        if step is None:
            return (yield from self._shown(node, family, i, d))
        src: list[Node | None] = []
        for source, parts in zip(node.src, step.families):
            if source is None:
                src.append(None)
            elif parts is None:
                src.append((yield self.whole(source, d)))
            else:
                src.append((yield self.part(source, parts, i, d)))
        attrs = {**node.attrs, **step.rules[i].attrs}
        for name, per in step.rules[i].shift.items():
            attrs[name] += per * part.start
        try:
            new = node.op(*src, **attrs)
        except PyggmlError:  # such as a reshape of a part that has gaps
            return (yield from self._shown(node, family, i, d))
        if new.spec.rank != node.spec.rank:  # a slice rule gives all four sizes
            spec = Spec.of(new.dtype, new.ne, node.spec.rank)
            new = new.op.make(new.src, dict(new.attrs), spec, line=False)
        return self._write(node, new, d) if node.op.writes is not None else self.put(new, d, node)

    def _cut(self, leaf: Node, part: Part, d: int) -> Node:
        """The leaf of device `d` for a part of a weight or of a state."""
        new = part_of(leaf, d, (part.first(), part.within(leaf.ne), part.steps()))
        self.homes[new] = self.devices[d]
        return inherit(new, leaf)

    def _in_parts(self, node: Node, family: Family) -> bool:
        """Whether each device computes its own part of a node."""
        if node.base.op is constant_op:  # a view, which is of no stage
            return True
        if len(self.groups[node]) != len(family) or self.divisions.is_partial(node):
            return False
        return self.divisions.gathers.get(node, family) == family

    def _sliced(self, node: Node, family: Family) -> Sliced | None:
        key = (node, family)
        if key not in self.steps:
            self.steps[key] = sliced(node, family)
        return self.steps[key]

    def _shown(self, node: Node, family: Family, i: int, d: int) -> Recursive[Node]:
        """A part of a node that the devices have whole, or of a sum."""
        part, dim = family[i], family[i].axis
        group = self.groups[node]
        scattered = self.divisions.is_partial(node) and len(group) == len(family)
        if scattered and covers(family, node.ne) and self.divisions.kind(node) != "kv":
            parts = []
            for k, other in enumerate(group):
                parts.append((yield self._summand(node, k, other)))
            sizes = tuple(each.n for each in family)
            new = reduce_scatter(*parts, dim=dim, sizes=sizes, rank=i)
            return self.put(new, d, node)
        whole = yield self.whole(node, d)
        sizes = part.within(node.ne)[: node.spec.rank]
        new = view(whole, ne=sizes, start=part.first(), step=part.steps())
        return self.put(cont(new) if part.step > 1 else new, d, node)

    # -- states ----------------------------------------------------------------------------------

    def _splits(self, state: Node, family: Family | None) -> bool:
        """Whether the devices have these parts of a state, and not all of it."""
        if state.op is not state_op or family is None or len(self.groups[state]) != len(family):
            return False
        if state in self.mirrored or state in self.whole_states:
            return False
        if self.split.setdefault(state, family) != family:
            self.conflicts.add(state)
            return False
        return True

    def _of_state(self, write: Node, family: Family) -> Family | None:
        """The parts of the state, from those of a handle that shows all of it."""
        if write.ne == write.root.ne:
            return family
        return None

    def _write(self, node: Node, new: Node, d: int) -> Node:
        new = self.put(new, d, node)
        self.written.setdefault(node, {})[d] = new
        return new

    def _update(self, node: Node) -> list[Node]:
        """The writes on every device for a write that no output needs."""
        state, group = node.root, self.groups[node]
        built = self.written.get(node, {})
        if len(built) == len(group) and state not in self.whole_states:
            return [built[d] for d in group]
        family = self._like(node, state)
        news = []
        for i, d in enumerate(group):
            if family is not None and self._splits(state, family):
                news.append(unwound(self.part(node, family, i, d)))
            else:
                news.append(unwound(self.whole(node, d)))
        return news

    def _like(self, node: Node, state: Node) -> Family | None:
        """How a state that this graph only writes is cut: as one of its size, or by its matrices
        or rows. Other graphs of the store read it so."""
        if node.ne != state.ne or len(self.groups[state]) < 2:
            return None
        if state in self.split:
            return self.split[state]
        if any(other.spec == state.spec for other in self.whole_states):
            return None
        for other, family in self.split.items():
            if other.spec == state.spec:
                return family
        count = len(self.groups[state])
        cuts = self.work.shard.cuts if self.work.shard is not None else {}
        if "sequence" in cuts and node.op.ids is not None:
            return interleaved(1, state.ne[1], count)
        if "heads" in cuts and state.ne[2] > 1 and self.work.shard is not None:
            heads = divided(state.ne[2], self.work.shard.shares)
            return None if heads is None else along(2, heads)
        return None

    # -- a part of a sum -------------------------------------------------------------------------

    def _summand(self, node: Node, i: int, d: int) -> Recursive[Node]:
        d = d if d in self.groups[node] else self.groups[node][i]
        key = ("sum", node, d)
        new = self.memo.get(key)
        if new is None:
            new = self.memo[key] = yield self._new_summand(node, i, d)
        return new

    def _new_summand(self, node: Node, i: int, d: int) -> Recursive[Node]:
        total = self.divisions.sums.get(node)
        if total is None:
            return (yield from self._passed_on(node, i, d))
        if total.kind == "ids":
            return (yield from self._chosen(node, total.family, i, d))
        if total.kind == "kv" and node.get("ids") is not None:
            return (yield from self._listed(node, total.family, i, d))
        target = node
        if total.kind == "kv":
            target = inherit(flash_attn_ext.again(node, lse=True), node)
        step = sliced(target, total.family, total.kind)
        assert step is not None
        src: list[Node | None] = []
        for number, (source, parts) in enumerate(zip(node.src, step.families)):
            sinks = total.kind == "kv" and number == node.op.index("sinks")
            if source is None or (sinks and i > 0):  # sinks are one more key, of the first device
                src.append(None)
            elif parts is None:
                src.append((yield self.whole(source, d)))
            else:
                src.append((yield self.part(source, parts, i, d)))
        return self.put(node.op(*src, **target.attrs), d, node)

    def _listed(self, node: Node, family: Family, i: int, d: int) -> Recursive[Node]:
        """The attention to those of the listed rows that this device has."""
        k, mask = node["k"], node.get("mask")
        n = k.ne[1]
        if k.root.op is state_op and k.root.ne[1] % len(family) == 0:
            n = max(n, k.root.ne[1])  # one table for all lengths
        turns = interleaved(1, n, len(family))
        assert turns is not None
        src: dict[str, Node | None] = {name: None for name in node.op.operands}
        src["q"] = yield self.whole(node["q"], d)
        for name in ("k", "v"):
            src[name] = yield self.part(node[name], family, i, d)
        if mask is not None:
            src["mask"] = yield self.part(mask, along(0, family), i, d)
        if i == 0 and node.get("sinks") is not None:  # one more key, of the first device
            src["sinks"] = yield self.whole(node["sinks"], d)
        src["ids"] = yield self.local(node["ids"], n, turns, i, d)
        return self.put(node.op(*src.values(), **{**node.attrs, "lse": True}), d, node)

    def _passed_on(self, node: Node, i: int, d: int) -> Recursive[Node]:
        """The node over the parts of sums that it is linear in."""
        src: list[Node | None] = []
        for source in node.src:
            if source is None:
                src.append(None)
            elif self.divisions.is_partial(source):
                src.append((yield self._summand(source, i, d)))
            else:
                src.append((yield self.whole(source, d)))
        return self.put(rebuilt(node, tuple(src)), d, node)

    def _chosen(self, node: Node, family: Family, i: int, d: int) -> Recursive[Node]:
        """The node with the weights of this device, and zeros where another one has them."""
        ids = node.op.ids
        assert ids is not None
        weights = {*node.op.weights, ids.of}
        n = node[ids.of].ne[ids.axis]
        parts = along(ids.axis, family)
        src: list[Node | None] = []
        for name in node.op.operands:
            source = node.get(name)
            if source is None:
                src.append(None)
            elif name in weights:
                src.append((yield self.part(source, parts, i, d)))
            elif name == ids.operand:
                src.append((yield self.local(source, n, family, i, d)))
            else:
                src.append((yield self._rows(source, node[ids.operand], i, d)))
        return self.put(node.op(*src, **node.attrs), d, node)

    def _rows(self, node: Node, ids: Node, i: int, d: int) -> Recursive[Node]:
        """`node`, of which only the rows are needed whose ids this device has."""
        if self.divisions.masked.get(node) is not ids or len(self.groups[node]) == 1:
            return (yield from self.whole(node, d))
        if node in self.divisions.sums:
            return (yield from self._summand(node, i, d))
        d = d if d in self.groups[node] else self.groups[node][i]
        key = ("rows", node, d)
        new = self.memo.get(key)
        if new is None:
            src: list[Node | None] = []
            for source in node.src:
                rows = None if source is None else (yield self._rows(source, ids, i, d))
                src.append(rows)
            new = self.memo[key] = self.put(rebuilt(node, tuple(src)), d, node)
        return new

    def local(self, ids: Node, n: int, family: Family, i: int, d: int) -> Recursive[Node]:
        """Ids that count from the first element of this device; -1 for what others have.

        ids  choose from n elements, of which this device has a part
        """
        key = ("local", ids, n, family, d)
        if key in self.memo:
            return self.memo[key]
        whole = yield self.whole(ids, d)
        part = family[i]
        # Ids of a choice are never negative. Other ids find 1 more than the rank, and 0 for none.
        sure = ids.base.op in (top_k, grouped_topk)
        table = np.full((n, 1), -1 if sure else 0, np.int32)
        table[part.start :: part.step][: part.n, 0] = np.arange(part.n) + (not sure)
        span = f"{part.start}+{part.n}x{part.step}"
        name = f"shard.{'chosen' if sure else 'local'}.{n}.{span}"
        ranks = self._named(constant(table, name=name), d)
        if whole.dtype.name == "i64":
            whole = self.put(cast(whole, dtype="f32"), d, ids)
            whole = self.put(cast(whole, dtype="i32"), d, ids)
        if not whole.contiguous:
            whole = self.put(cont(whole), d, ids)
        flat = self.put(reshape(whole, ne=(whole.spec.elements,)), d, ids)
        local = self.put(get_rows(ranks, flat), d, ids)
        if not sure:
            minus = self._named(constant(np.full(1, -1, np.int32), name="shard.minus"), d)
            local = self.put(add(local, minus), d, ids)
        new = self.put(reshape(local, ne=ids.ne[: ids.spec.rank]), d, ids)
        self.memo[key] = new
        return new

    def _named(self, leaf: Node, d: int) -> Node:
        key = ("table", leaf.attrs["name"], d)
        if key not in self.memo:
            self.memo[key] = part_of(leaf, d)
            self.homes[self.memo[key]] = self.devices[d]
        return self.memo[key]

    # -- devices -------------------------------------------------------------------------------

    def put(self, new: Node, d: int, old: Node) -> Node:
        """Settle a new node on a device, or its meaning in simpler ops."""
        inherit(new, old)
        if new.op.view is not None or new.op.leaf or new in self.homes:
            return new
        backend = self.devices[d]
        if new.op in COLLECTIVES:
            together = taken_together(self, new, d, old)
            if together is not None:
                return together
            if backend.supports(new) is not None:
                # A meaning has no rank, so copies make the sums of the devices different nodes.
                parts = (None if s is None else self.brought(s, d) for s in new.src)
                new = rebuilt(new, tuple(parts))
        supported = on_device(new, backend, self.refused.setdefault(d, {}))
        self.expanded += supported.expanded
        stack = [supported.node]
        while stack:
            part = stack.pop()
            if part.op.leaf or part in self.homes:
                continue
            if part.op.view is None:
                self.homes[part] = backend
            stack += [s for s in part.src if s is not None and s not in self.homes]
        return inherit(supported.node, old)

    def brought(self, part: Node, d: int) -> Node:
        """A part on this device: a copy if it is on another one."""
        backend = self.devices[d]
        if self.homes[part.base].device == backend.device:
            return part
        attrs = {"to": backend.place, "resident": False}
        copy = transfer.make((part,), attrs, part.spec, line=False)
        self.homes[copy] = backend
        return inherit(copy, part)

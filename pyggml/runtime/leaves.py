"""Leaves of plans, and their memory in a store: weights, states and slots of inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from pyggml.backends.base import Address, Backend, WeightLayout
from pyggml.node import Node, Spec
from pyggml.ops.leaf import constant_op, data_of, state_op
from pyggml.transfer import origin

#: Called while weights go to their devices, with the bytes that are there and those that will be.
Progress: TypeAlias = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class Need:
    """A leaf (or one given to a further device) that a plan reads, and where it reads it."""

    node: Node
    backend: Backend
    layout: WeightLayout | None = None

    @property
    def nbytes(self) -> int:
        return self.node.spec.nbytes if self.layout is None else self.layout.nbytes

    @property
    def key(self) -> tuple[object, ...]:
        """Needs of one key share their memory."""
        leaf = origin(self.node)
        name = leaf.attrs["name"]
        if leaf.op is constant_op:
            assert self.layout is not None
            return leaf if name is None else name, self.backend.device, self.layout.name
        return (name,) if leaf.op is state_op else (name, leaf.spec, self.backend.device)


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf in the store: the node that brought it, its memory, and on which backend it is."""

    node: Node
    at: Address
    backend: Backend

    @property
    def spec(self) -> Spec:
        return self.node.spec


_Table: TypeAlias = dict[tuple[object, ...], Leaf]


@dataclass(slots=True)
class Leaves:
    """Everything that a store holds of leaves. A store replaces it as a whole and never changes
    it, so an interrupt leaves either what was there or all of what is new."""

    weights: _Table = field(default_factory=dict)
    states: _Table = field(default_factory=dict)
    inputs: _Table = field(default_factory=dict)

    def with_room(self, needs: Sequence[Need], progress: Progress | None) -> Leaves:
        """These leaves and those of `needs`, whose memory is allocated and filled."""
        more = Leaves(dict(self.weights), dict(self.states), dict(self.inputs))
        weights = [need for need in needs if origin(need.node).op is constant_op]
        more._upload({need.key: need for need in weights if need.key not in self.weights}, progress)
        for need in needs:
            leaf = origin(need.node)
            if leaf.op is not constant_op and need.key not in more.table(need):
                at = Address(need.backend.alloc(leaf.spec.nbytes), 0, leaf.spec.nb)
                more.table(need)[need.key] = Leaf(leaf, at, need.backend)
        return more

    def table(self, need: Need) -> _Table:
        """The one in which a need's leaf stands."""
        kind = origin(need.node).op
        if kind is constant_op:
            return self.weights
        return self.states if kind is state_op else self.inputs

    def _upload(
        self, missing: Mapping[tuple[object, ...], Need], progress: Progress | None
    ) -> None:
        # The host reads weights where they lie: nothing is copied, nothing counts as progress.
        total = sum(need.nbytes for need in missing.values() if need.backend.device != "host")
        done = 0
        for key, need in missing.items():
            leaf, layout = origin(need.node), need.layout
            assert layout is not None
            buffer = need.backend.weight(leaf, layout, data_of(leaf))
            at = Address(buffer, 0, leaf.spec.nb, layout.name)
            self.weights[key] = Leaf(leaf, at, need.backend)
            if progress is not None and need.backend.device != "host":
                done += need.nbytes
                progress(done, total)

"""The leaves of plans and their memory in a store: weights, states and slots of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pyggml.backends.base import Backend, in_host_memory
from pyggml.backends.step import Address, WeightLayout
from pyggml.node import Node
from pyggml.operation import Op
from pyggml.ops.leaf import constant_op, input_op, shared_key, state_op
from pyggml.runtime.derivations import Derivations
from pyggml.spec import Spec
from pyggml.transfer import origin

#: Called after each weight that is uploaded: bytes uploaded so far, bytes in total.
Progress: TypeAlias = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class Need:
    """A leaf that a plan reads on a device; one for each device that reads the leaf.

    node   the leaf, or a resident transfer of it to a second device
    owner  the rank that has the device; None if it is this process
    """

    node: Node
    backend: Backend
    layout: WeightLayout | None = None
    owner: int | None = None

    @property
    def nbytes(self) -> int:
        if self.layout is not None:
            return self.layout.nbytes
        nbytes, alignment = self.node.spec.nbytes, self.backend.alignment
        return -(-nbytes // alignment) * alignment if self.is_packed else nbytes

    @property
    def is_packed(self) -> bool:
        """Whether it is side by side with other inputs, so that one copy fills them all."""
        return origin(self.node).op is input_op and not in_host_memory(self.backend)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for needs that share memory."""
        leaf = origin(self.node)
        if leaf.op is constant_op:
            assert self.layout is not None
            return shared_key(leaf), self.backend.device, self.layout.name
        name = leaf.attrs["name"]
        return (name,) if leaf.op is state_op else (name, leaf.spec, self.backend.device)


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf with memory in the store: the node it was allocated for, its address and backend.

    owner  the rank that has the memory; None if it is this process. The address is then of no use
    """

    node: Node
    at: Address
    backend: Backend
    owner: int | None = None

    @property
    def spec(self) -> Spec:
        return self.node.spec


_Table: TypeAlias = dict[tuple[object, ...], Leaf]


@dataclass(slots=True)
class Leaves:
    """All leaves with memory in a store.

    A store never changes its `Leaves`; it replaces the whole object. So an interrupt leaves either
    the old leaves or all of the new ones.
    """

    weights: _Table = field(default_factory=dict)
    states: _Table = field(default_factory=dict)
    inputs: _Table = field(default_factory=dict)

    def with_needs(self, needs: Sequence[Need], progress: Progress | None) -> Leaves:
        """These leaves and those of `needs`, with memory allocated and filled for the new ones.

        States of other ranks are listed, without memory, so that all ranks have one order; their
        weights and inputs are not.
        """
        leaves = Leaves(dict(self.weights), dict(self.states), dict(self.inputs))

        def missing(op: Op[Any]) -> dict[tuple[object, ...], Need]:
            return {
                need.key: need
                for need in needs
                if origin(need.node).op is op
                and need.key not in leaves.table(need)
                and need.owner is None
            }

        weights, states = missing(constant_op), missing(state_op)
        with _adjacent(weights.values()):
            leaves._upload(weights, progress)
        with _adjacent(states.values()):
            blocks = {key: need.backend.alloc(need.nbytes) for key, need in states.items()}
        packed: dict[Backend, dict[tuple[object, ...], Need]] = {}
        for need in needs:
            leaf = origin(need.node)
            if leaf.op is constant_op or need.key in leaves.table(need):
                continue
            if need.owner is not None:
                if leaf.op is state_op:
                    at = Address(None, 0, leaf.spec.nb)
                    leaves.states[need.key] = Leaf(leaf, at, need.backend, need.owner)
                continue
            if need.is_packed:
                packed.setdefault(need.backend, {})[need.key] = need
                continue
            if need.key not in blocks:
                blocks[need.key] = need.backend.alloc(need.nbytes)
            at = Address(blocks[need.key], 0, leaf.spec.nb)
            leaves.table(need)[need.key] = Leaf(leaf, at, need.backend)
        for backend, inputs in packed.items():
            leaves._pack(backend, inputs)
        return leaves

    def _pack(self, backend: Backend, inputs: Mapping[tuple[object, ...], Need]) -> None:
        """Allocate inputs side by side, in one block."""
        block, offset = backend.alloc(sum(need.nbytes for need in inputs.values())), 0
        for key, need in inputs.items():
            leaf = origin(need.node)
            self.inputs[key] = Leaf(leaf, Address(block, offset, leaf.spec.nb), backend)
            offset += need.nbytes

    def table(self, need: Need) -> _Table:
        """The table for a need's leaf: weights, states or inputs."""
        op = origin(need.node).op
        if op is constant_op:
            return self.weights
        return self.states if op is state_op else self.inputs

    def _upload(
        self, missing: Mapping[tuple[object, ...], Need], progress: Progress | None
    ) -> None:
        # The host reads weights in place, so nothing is uploaded there.
        total = sum(need.nbytes for need in missing.values() if not in_host_memory(need.backend))
        done = 0
        with Derivations(origin(need.node) for need in missing.values()) as arrays:
            for key, need in missing.items():
                leaf, layout = origin(need.node), need.layout
                assert layout is not None
                buffer = need.backend.weight(leaf, layout, arrays.of(leaf))
                at = Address(buffer, 0, leaf.spec.nb, layout.name)
                self.weights[key] = Leaf(leaf, at, need.backend)
                if progress is not None and not in_host_memory(need.backend):
                    done += need.nbytes
                    progress(done, total)


@contextmanager
def _adjacent(needs: Iterable[Need]) -> Iterator[None]:
    """Inside, each backend may allocate these needs in one block."""
    sizes: dict[Backend, list[int]] = {}
    for need in needs:
        sizes.setdefault(need.backend, []).append(need.nbytes)
    with ExitStack() as stack:
        for backend, each in sizes.items():
            stack.enter_context(backend.adjacent(each))
        yield

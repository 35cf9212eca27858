"""What outlives a plan: weights, states, input slots, and arenas as large as needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any, TypeAlias
from weakref import WeakSet

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyggml.backends.base import Address, Backend, Buffer, WeightLayout
from pyggml.errors import GraphError, OutOfMemoryError, UnknownNameError
from pyggml.node import Node, Spec
from pyggml.ops.leaf import constant_op, data_of, state_op
from pyggml.quants import decode_rows
from pyggml.runtime.arrays import raw_shape, raw_type, stored
from pyggml.transfer import origin

#: Called while weights go to their devices, with the bytes that are there and those that will be.
Progress: TypeAlias = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class Need:
    """A leaf (or one given to a further device) that a plan reads, and where it is wanted."""

    node: Node
    backend: Backend
    layout: WeightLayout | None = None

    @property
    def nbytes(self) -> int:
        return self.node.spec.nbytes if self.layout is None else self.layout.nbytes


_Key: TypeAlias = tuple[str | Node, str, str]  # name or node, device, layout
_Weight: TypeAlias = tuple[Node, Address]


@dataclass(frozen=True, slots=True)
class Arena:
    """Memory that a device's plans share."""

    buffer: Buffer
    nbytes: int


class Store:
    """The memory that plans share: weights and states once, an arena on each device.

    Plans of one store run one at a time; stores are independent. Addresses of weights, states and
    input slots never change while the store lives.
    """

    def __init__(self) -> None:
        self.lock = RLock()
        self.arenas: dict[str, Arena] = {}  # by device
        self.generation = 0  # grows when an arena moves: bound plans then bind again
        self.bound: WeakSet[Any] = WeakSet()  # plans that hold arenas
        self.homes: dict[str, Backend] = {}  # of states, by name, from the first plan bound
        self.planned: dict[str, Backend] = {}  # where plans that are not bound yet want them
        self._weights: dict[_Key, _Weight] = {}
        self._states: dict[str, tuple[Spec, Address]] = {}
        self._inputs: dict[tuple[str, Spec, str], Address] = {}

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arenas of all devices."""
        return sum(arena.nbytes for arena in self.arenas.values())

    @contextmanager
    def alone(self, backends: Iterable[Backend]) -> Iterator[None]:
        """No other thread uses the store, or these devices for another store: a device has one
        queue."""
        with ExitStack() as held:
            held.enter_context(self.lock)
            for backend in sorted(set(backends), key=lambda backend: backend.place):
                held.enter_context(backend.lock)
            yield

    # -- for plans ----------------------------------------------------------------------------

    def check(self, leaves: Iterable[Node]) -> None:
        """GraphError where a leaf contradicts what the store holds under its name."""
        held = {key[0]: node for key, (node, _) in self._weights.items()}
        for leaf in map(origin, leaves):
            key = leaf.attrs["name"]
            if leaf.op is state_op and key in self._states:
                spec = self._states[key][0]
                if (spec.dtype, spec.ne) != (leaf.dtype, leaf.ne):
                    raise GraphError(f"the state {key!r} is {spec} in this store, not {leaf.spec}")
            other = held.get(key, leaf) if leaf.op is constant_op else leaf
            if other is not leaf and not _same_data(other, leaf):
                raise GraphError(f"the store holds other values under the weight {key!r}")

    def reserve(
        self,
        needs: Iterable[Need],
        arenas: Mapping[Backend, int],
        given: Mapping[Node, Address],
        progress: Progress | None = None,
    ) -> dict[Node, Address]:
        """Memory for all leaves but those that are given, and arenas of these sizes; on failure no
        leaf has any."""
        needs = tuple(needs)
        self.check(need.node for need in needs)
        weights = self._uploaded(needs, progress)
        states, inputs, homes = {}, {}, {}
        found: dict[Node, Address] = dict(given)
        for need in needs:
            leaf, backend = origin(need.node), need.backend
            key, spec = leaf.attrs["name"], leaf.spec
            if leaf.op is constant_op:
                weight = _weight_key(need)
                found[need.node] = (self._weights.get(weight) or weights[weight])[1]
            elif leaf.op is state_op:
                if key not in self._states:
                    states[key] = spec, Address(backend.alloc(spec.nbytes), 0, spec.nb)
                    homes[key] = backend
                elif self.homes[key].device != backend.device:
                    raise GraphError(
                        f"this plan has the state {key!r} on {backend.place}, and a plan that was "
                        f"bound first put it on {self.homes[key].place}; compile this one again"
                    )
                found[need.node] = (self._states.get(key) or states[key])[1]
            elif need.node not in given:
                slot = (key, spec, backend.device)
                if slot not in self._inputs:
                    inputs[slot] = Address(backend.alloc(spec.nbytes), 0, spec.nb)
                found[need.node] = self._inputs.get(slot) or inputs[slot]
        grown = {backend.device: self._grown(backend, n) for backend, n in arenas.items()}
        self.arenas.update((device, arena) for device, arena in grown.items() if arena is not None)
        if any(arena is not None for arena in grown.values()):
            self._release()  # or the old arenas would live as long as the plans do
        self._weights.update(weights)
        self._states.update(states)
        self.homes.update(homes)
        self._inputs.update(inputs)
        return found

    def _uploaded(self, needs: Iterable[Need], progress: Progress | None) -> dict[_Key, _Weight]:
        """The weights among `needs` that the store has not yet, on their devices now."""
        new = {
            _weight_key(need): need
            for need in needs
            if origin(need.node).op is constant_op and _weight_key(need) not in self._weights
        }
        # What the host reads in place is not brought anywhere.
        total = sum(need.nbytes for need in new.values() if need.backend.device != "host")
        done, made = 0, {}
        for key, need in new.items():
            leaf, layout = origin(need.node), need.layout
            assert layout is not None
            buffer = need.backend.weight(leaf, layout, data_of(leaf))
            made[key] = leaf, Address(buffer, 0, leaf.spec.nb, layout.name)
            if progress is not None and need.backend.device != "host":
                done += need.nbytes
                progress(done, total)
        return made

    def _grown(self, backend: Backend, nbytes: int) -> Arena | None:
        """An arena of this size where the present one is smaller. Where there is no room for both,
        the present one is given up first: it holds nothing between runs."""
        held = self.arenas.get(backend.device)
        if held is not None and held.nbytes >= nbytes:
            return None
        try:
            return Arena(backend.alloc(nbytes), nbytes)
        except OutOfMemoryError:
            if held is None:
                raise
        del self.arenas[backend.device], held
        self._release()
        return Arena(backend.alloc(nbytes), nbytes)

    def written(self, device: str) -> Iterator[tuple[str, Buffer, int]]:
        """What runs write over on a device: its name, memory and bytes."""
        if device in self.arenas:
            yield "the store's arena", self.arenas[device].buffer, self.arenas[device].nbytes
        for name, (spec, at) in self._states.items():
            if self.homes[name].device == device:
                yield f"the state {name!r}", at.buffer, spec.nbytes

    def _release(self) -> None:
        """Let bound plans bind again at their next run."""
        self.generation += 1
        for plan in tuple(self.bound):
            plan.release()
        self.bound.clear()

    # -- for users ----------------------------------------------------------------------------

    def _state(self, name: str) -> tuple[Spec, Address, Backend]:
        if name not in self._states:
            known = (
                ", ".join(self._states) or "none: states exist once a plan that has them is bound"
            )
            raise UnknownNameError(f"the store has no state {name!r}; it has: {known}")
        return *self._states[name], self.homes[name]

    def read(self, name: str, *, raw: bool = False) -> NDArray[Any]:
        """A copy of a state in NumPy shape; bf16 and block types as f32, or raw rows."""
        with self.lock:
            spec, at, backend = self._state(name)
            with backend.lock:
                found = backend.download(at, spec)
        return found if raw or spec.dtype.numpy is not None else decode_rows(spec.dtype, found)

    def write(self, name: str, array: ArrayLike) -> None:
        """Set a state from an array of its NumPy shape (or its raw rows)."""
        with self.lock:
            spec, at, backend = self._state(name)
            values = stored(f"state {name!r}", spec, array)
            with backend.lock:
                backend.upload(at, spec, values)
                backend.synchronize()

    def clear(self, *names: str) -> None:
        """Set states to zero; all of them without names."""
        with self.lock:
            for name in names or tuple(self._states):
                spec, at, backend = self._state(name)
                zero = np.zeros((), spec.dtype.numpy or raw_type(spec.dtype))
                with backend.lock:
                    backend.upload(at, spec, np.broadcast_to(zero, raw_shape(spec)))
                    backend.synchronize()


def _weight_key(need: Need) -> _Key:
    leaf, layout = origin(need.node), need.layout
    assert layout is not None
    name = leaf.attrs["name"]
    return leaf if name is None else name, need.backend.device, layout.name


def _same_data(a: Node, b: Node) -> bool:
    if a.dtype != b.dtype or a.ne != b.ne:
        return False
    x, y = (data_of(n).reshape(-1).view(np.uint8) for n in (a, b))
    blocks = range(0, len(x), 2**20)  # a weight's size is not to be allocated to compare it
    return x.ctypes.data == y.ctypes.data or all(
        np.array_equal(x[i : i + 2**20], y[i : i + 2**20]) for i in blocks
    )

"""What outlives a plan: weights, states, input slots, and arenas as large as needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import RLock
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyggml.backends.base import Address, Backend, Buffer
from pyggml.errors import GraphError, OutOfMemoryError, UnknownNameError
from pyggml.node import Node
from pyggml.ops.leaf import constant_op, data_of, state_op
from pyggml.quants import decode_rows
from pyggml.runtime.arrays import raw_shape, raw_type, stored
from pyggml.runtime.leaves import Leaf, Leaves, Need, Progress
from pyggml.transfer import origin

T = TypeVar("T")


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
        self.arenas: Mapping[str, Arena] = {}  # by device; replaced, never changed
        self.bound: WeakSet[Any] = WeakSet()  # plans that hold arenas
        self._leaves = Leaves()

    def __repr__(self) -> str:
        held = self._leaves
        arenas = ", ".join(f"{arena.nbytes} bytes on {d}" for d, arena in self.arenas.items())
        return (
            f"<store: {len(held.weights)} weights, {len(held.states)} states, "
            f"arenas: {arenas or 'none'}>"
        )

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arenas of all devices."""
        return sum(arena.nbytes for arena in self.arenas.values())

    @property
    def homes(self) -> dict[str, Backend]:
        """Where the states are, by name: where the first plan that was bound has them."""
        return {str(key[0]): leaf.backend for key, leaf in self._leaves.states.items()}

    def alone(self, backends: Iterable[Backend], action: Callable[[], T]) -> T:
        """Do something while no other thread uses the store, or these devices for another store:
        a device has one queue."""
        devices = sorted(set(backends), key=lambda backend: backend.place)
        return _holding([self.lock, *(backend.lock for backend in devices)], action)

    # -- for plans ----------------------------------------------------------------------------

    def check(self, leaves: Iterable[Node]) -> None:
        """GraphError where a leaf contradicts what the store holds under its name."""
        states = {key[0]: leaf.spec for key, leaf in self._leaves.states.items()}
        weights = {key[0]: leaf.node for key, leaf in self._leaves.weights.items()}
        for leaf in map(origin, leaves):
            key = leaf.attrs["name"]
            spec = states.get(key, leaf.spec) if leaf.op is state_op else leaf.spec
            if (spec.dtype, spec.ne) != (leaf.dtype, leaf.ne):
                raise GraphError(f"the state {key!r} is {spec} in this store, not {leaf.spec}")
            other = weights.get(key, leaf) if leaf.op is constant_op else leaf
            if other is not leaf and not _same_data(other, leaf):
                raise GraphError(f"the store holds other values under the weight {key!r}")

    def reserve(
        self,
        needs: Sequence[Need],
        arenas: Mapping[Backend, int],
        bound: Mapping[Node, Address],
        progress: Progress | None = None,
    ) -> dict[Node, Address]:
        """Where each need is, with memory for what had none, and arenas of at least these sizes.

        bound  inputs that the caller's arrays hold; they get no memory
        On failure, and on an interrupt, no leaf has memory that it did not have before.
        """
        self.check(need.node for need in needs)
        here = [need for need in needs if need.node not in bound]
        leaves = self._leaves.with_room(here, progress)
        self._enlarge(arenas)
        self._leaves = leaves
        return {**bound, **{need.node: leaves.table(need)[need.key].at for need in here}}

    def _enlarge(self, sizes: Mapping[Backend, int]) -> None:
        larger = {
            backend.device: self._larger(backend, nbytes)
            for backend, nbytes in sizes.items()
            if backend.device not in self.arenas or self.arenas[backend.device].nbytes < nbytes
        }
        if larger:
            self._release()  # or the old arenas would live as long as the plans do
            self.arenas = {**self.arenas, **larger}

    def _larger(self, backend: Backend, nbytes: int) -> Arena:
        """A new arena. Where there is no room for it beside the present one, that is given up
        first: it holds nothing between runs."""
        try:
            return Arena(backend.alloc(nbytes), nbytes)
        except OutOfMemoryError:
            if backend.device not in self.arenas:
                raise
        self._release()
        self.arenas = {d: arena for d, arena in self.arenas.items() if d != backend.device}
        return Arena(backend.alloc(nbytes), nbytes)

    def _release(self) -> None:
        """Bound plans let go of their arenas, and bind again at their next run."""
        for plan in tuple(self.bound):
            plan.release()
        self.bound.clear()

    def written(self, device: str) -> Iterator[tuple[str, Buffer, int]]:
        """What runs write over on a device: its name, memory and bytes."""
        if device in self.arenas:
            yield "the store's arena", self.arenas[device].buffer, self.arenas[device].nbytes
        for (name,), leaf in self._leaves.states.items():
            if leaf.backend.device == device:
                yield f"the state {name!r}", leaf.at.buffer, leaf.spec.nbytes

    # -- for users ----------------------------------------------------------------------------

    def _state(self, name: str) -> Leaf:
        states = self._leaves.states
        if (name,) not in states:
            known = ", ".join(str(key[0]) for key in states)
            raise UnknownNameError(
                f"the store has no state {name!r}; it has: "
                f"{known or 'none: states exist once a plan that has them is bound'}"
            )
        return states[name,]

    def read(self, name: str, *, raw: bool = False) -> NDArray[Any]:
        """A copy of a state in NumPy shape; bf16 and block types as f32, or raw rows."""
        with self.lock:
            state = self._state(name)
            with state.backend.lock:
                rows = state.backend.download(state.at, state.spec)
        dtype = state.spec.dtype
        return rows if raw or dtype.numpy is not None else decode_rows(dtype, rows)

    def write(self, name: str, array: ArrayLike) -> None:
        """Set a state from an array of its NumPy shape (or its raw rows)."""
        # Without the locks: an array of a device takes that device's own.
        values = stored(f"state {name!r}", self._state(name).spec, array)
        self._set(name, values)

    def clear(self, *names: str) -> None:
        """Set states to zero; all of them without names."""
        with self.lock:
            for name in names or [str(key[0]) for key in self._leaves.states]:
                spec = self._state(name).spec
                zero = np.zeros((), spec.dtype.numpy or raw_type(spec.dtype))
                self._set(name, np.broadcast_to(zero, raw_shape(spec)))

    def _set(self, name: str, values: NDArray[Any]) -> None:
        with self.lock:
            state = self._state(name)
            with state.backend.lock:
                state.backend.upload(state.at, state.spec, values)
                state.backend.synchronize()


def _holding(locks: Sequence[AbstractContextManager[object]], action: Callable[[], T]) -> T:
    """Call `action` with the locks taken, in this order.

    One `with` statement a lock: Python looks for a signal neither between taking a lock and
    entering its block nor between leaving the block and giving the lock back, so Ctrl-C leaves
    none taken. A generator or an ExitStack in between would let one in.
    """
    if not locks:
        return action()
    with locks[0]:
        return _holding(locks[1:], action)


def _same_data(a: Node, b: Node) -> bool:
    if a.dtype != b.dtype or a.ne != b.ne:
        return False
    x, y = (data_of(n).reshape(-1).view(np.uint8) for n in (a, b))
    blocks = range(0, len(x), 2**20)  # a weight's size is not to be allocated to compare it
    return x.ctypes.data == y.ctypes.data or all(
        np.array_equal(x[i : i + 2**20], y[i : i + 2**20]) for i in blocks
    )

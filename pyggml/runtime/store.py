"""Store: memory that plans share. Weights, states, input slots and arenas.

A state lives where the first plan that was bound put it. A plan that was compiled for another
device is planned again when it is bound. Two designs lost: an error that asks the user to compile
again makes prompt and decode plans depend on the order of their calls, and a note in the store
about plans that are not bound lets a plan that was thrown away move a state. Plans of a store run
one at a time; stores are independent. Addresses of weights, states and inputs change only by
`bind(x=array)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import RLock
from typing import Any, TypeAlias, TypeVar
from weakref import WeakSet

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyggml.backends.base import Backend
from pyggml.backends.step import Address, Buffer
from pyggml.errors import GraphError, OutOfMemoryError, UnknownNameError
from pyggml.node import Node, label_of
from pyggml.ops.leaf import constant_op, data_of, derived_from, shared_key, source_of, state_op
from pyggml.quants import decode_rows
from pyggml.runtime.arrays import raw_shape, raw_type, stored
from pyggml.runtime.leaves import Leaf, Leaves, Need, Progress
from pyggml.runtime.ranks import STATE, Ranks
from pyggml.spec import Spec
from pyggml.transfer import origin
from pyggml.words import counted

T = TypeVar("T")
#: An index of a NumPy array.
Index: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Arena:
    """A block of a device's memory for intermediate tensors, shared by the store's plans."""

    buffer: Buffer
    nbytes: int


class Shared:
    """What a store shares with stores like it.

    arenas   by device; replaced, never changed
    weights  the leaves of weights; replaced, never changed
    bound    the plans that use the arenas
    queued   devices that may still work on submitted runs; replaced, never changed
    ranks    the processes that run the plans together; None: this one alone
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks
        self.lock = RLock()
        self.arenas: Mapping[str, Arena] = {}
        self.weights: dict[tuple[object, ...], Leaf] = {}
        self.bound: WeakSet[Any] = WeakSet()
        self.queued: frozenset[Backend] = frozenset()


class Store:
    """The memory that plans share: weights and states once, and an arena on each device.

    like  a store whose weights and arenas this one shares; its states and inputs are its own. So
          several sequences can use one copy of a model
    ranks the processes that run all plans of the store together (`pyggml.join()`); None: this one
          alone. The store has the memory of this process's device. All of them call the same
          methods of plans and stores, in the same order, with equal values

    Plans of one store, and of stores that share weights, run one at a time; other stores are
    independent. The addresses of weights, states and input slots never change while the store
    exists.
    """

    def __init__(self, like: Store | None = None, *, ranks: Ranks | None = None) -> None:
        self.shared: Shared = Shared(ranks) if like is None else like.shared
        self._leaves = Leaves()

    def __repr__(self) -> str:
        arenas = ", ".join(f"{arena.nbytes} bytes on {d}" for d, arena in self.arenas.items())
        return (
            f"<store: {counted(len(self.shared.weights), 'weight')}, "
            f"{counted(len(self._leaves.states), 'state')}, arenas: {arenas or 'none'}>"
        )

    @property
    def lock(self) -> RLock:
        return self.shared.lock

    @property
    def ranks(self) -> Ranks | None:
        """The processes that run the plans of this store together."""
        return self.shared.ranks

    @property
    def arenas(self) -> Mapping[str, Arena]:
        return self.shared.arenas

    @property
    def bound(self) -> WeakSet[Any]:
        return self.shared.bound

    @property
    def arena_bytes(self) -> int:
        """The bytes of all arenas."""
        return sum(arena.nbytes for arena in self.arenas.values())

    @property
    def homes(self) -> dict[str, Backend]:
        """State name -> its backend, decided by the first plan that was bound."""
        return {str(key[0]): leaf.backend for key, leaf in self._leaves.states.items()}

    def alone(self, backends: Iterable[Backend], action: Callable[[], T]) -> T:
        """Call `action` while no other thread uses the store, these devices, or those that may
        still work on submitted runs.

        Devices are locked too because a device has one queue, which stores share.
        """
        shared = self.shared
        with shared.lock:
            locks = _locks(tuple(backends), shared.queued)
            if len(locks) != 1:
                return _holding(locks, action)
            with locks[0]:
                return action()

    def settle(self) -> None:
        """Wait for the submitted runs. Call it inside `alone`.

        Errors: those of these runs. Afterwards nothing is queued in any case.
        """
        if not self.shared.queued:
            return
        try:
            for backend in self.shared.queued:
                backend.synchronize()
        except BaseException:
            for backend in self.shared.queued:
                with suppress(Exception):
                    backend.abandon()
            raise
        finally:
            self.shared.queued = frozenset()

    # -- for plans ----------------------------------------------------------------------------

    def check(self, leaves: Iterable[Node]) -> None:
        """GraphError if the store has another state or weight with the name of a leaf."""
        states = {key[0]: leaf.spec for key, leaf in self._leaves.states.items()}
        cuts = {_whole_name(leaf.node): leaf.node for leaf in self._leaves.states.values()}
        weights = {key[0]: leaf.node for key, leaf in self.shared.weights.items()}
        for leaf in map(origin, leaves):
            key = leaf.attrs["name"]
            spec = states.get(key, leaf.spec) if leaf.op is state_op else leaf.spec
            if (spec.dtype, spec.ne) != (leaf.dtype, leaf.ne):
                raise GraphError(
                    f"this store has the state {key!r} as {spec}, not {leaf.spec}; use another "
                    "name or another store"
                )
            part = cuts.get(_whole_name(leaf)) if leaf.op is state_op else None
            if part is not None and not _cut_alike(part, leaf, self._leaves.states):
                raise GraphError(
                    f"this store has the state {_whole_name(leaf)!r} on other devices or cut "
                    "otherwise; use the same shard= for all plans of a store"
                )
            other = weights.get(shared_key(leaf), leaf) if leaf.op is constant_op else leaf
            if other is not leaf and not _same_data(other, leaf):
                raise GraphError(
                    f"this store has a weight {label_of(leaf)!r} with other values; use another "
                    "name or another store"
                )

    def reserve(
        self,
        needs: Sequence[Need],
        arenas: Mapping[Backend, int],
        bound: Mapping[Node, Address],
        progress: Progress | None = None,
    ) -> dict[Node, Address]:
        """Allocate what is missing of `needs` and `arenas`; return the address of each need.

        arenas  the bytes that the arena of each backend needs at least
        bound   the addresses of inputs bound to the caller's arrays; they get no memory
        After an error or an interrupt the leaves are as before.
        """
        self.settle()  # a larger arena frees the memory of the old one
        self.check(need.node for need in needs)
        needs = [need for need in needs if need.node not in bound]
        before = replace(self._leaves, weights=self.shared.weights)
        leaves = before.with_needs(needs, progress)
        self._enlarge(arenas)
        self.shared.weights, self._leaves = leaves.weights, leaves
        own = [need for need in needs if need.owner is None]
        return {**bound, **{need.node: leaves.table(need)[need.key].at for need in own}}

    def _enlarge(self, sizes: Mapping[Backend, int]) -> None:
        larger = {
            backend.device: self._larger(backend, nbytes)
            for backend, nbytes in sizes.items()
            if backend.device not in self.arenas or self.arenas[backend.device].nbytes < nbytes
        }
        if larger:
            self._release()  # bound plans would keep the old arenas alive
            self.shared.arenas = {**self.arenas, **larger}

    def _larger(self, backend: Backend, nbytes: int) -> Arena:
        """A new arena. If memory runs out, free the old one first: between runs it is unused."""
        try:
            return Arena(backend.alloc(nbytes), nbytes)
        except OutOfMemoryError:
            if backend.device not in self.arenas:
                raise
        self._release()
        self.shared.arenas = {d: arena for d, arena in self.arenas.items() if d != backend.device}
        return Arena(backend.alloc(nbytes), nbytes)

    def _release(self) -> None:
        """Make bound plans free the arenas; they bind again at their next run."""
        for plan in tuple(self.bound):
            plan.release()
        self.bound.clear()

    def written(self, device: str) -> Iterator[tuple[str, Buffer, int]]:
        """The memory that runs overwrite on a device: a name, the buffer and its bytes."""
        if device in self.arenas:
            yield "the store's arena", self.arenas[device].buffer, self.arenas[device].nbytes
        for (name,), leaf in self._leaves.states.items():
            if leaf.backend.device == device:
                yield f"the state {name!r}", leaf.at.buffer, leaf.spec.nbytes

    # -- for users ----------------------------------------------------------------------------

    def _state(self, name: str) -> tuple[Spec, list[tuple[Leaf, Index]]]:
        """The size of a state; the leaves that have it, and which part of it each one has."""
        states = self._leaves.states
        if (name,) in states:
            return states[name,].spec, [(states[name,], (...,))]
        parts = [(leaf, leaf.node.attrs.get("part")) for leaf in states.values()]
        mine = [(leaf, part) for leaf, part in parts if part is not None and part.name == name]
        if not mine:
            known = ", ".join(dict.fromkeys(_whole_name(leaf.node) for leaf in states.values()))
            raise UnknownNameError(
                f"the store has no state {name!r}; its states are: "
                f"{known or 'none yet. A state exists once a plan with it is bound'}"
            )
        return mine[0][1].spec, [(leaf, part.index) for leaf, part in mine]

    def read(self, name: str, *, raw: bool = False) -> NDArray[Any]:
        """A copy of a state in NumPy shape; bf16 and block types as f32, or as raw rows. Of a
        state that is cut over devices, all parts together.

        Errors: UnknownNameError for a name without a state.
        """
        with self.lock:
            spec, leaves = self._state(name)
            rows = np.empty(raw_shape(spec), spec.dtype.numpy or raw_type(spec.dtype))

            def download() -> None:
                self.settle()
                for leaf, index in leaves:
                    rows[index] = self._downloaded(leaf)

            self.alone([leaf.backend for leaf, _ in leaves if leaf.owner is None], download)
        return rows if raw or spec.dtype.numpy is not None else decode_rows(spec.dtype, rows)

    def _downloaded(self, leaf: Leaf) -> NDArray[Any]:
        """The rows of a leaf as they are stored; all ranks get those of its owner."""
        here = leaf.owner is None
        kind = leaf.spec.dtype.numpy or raw_type(leaf.spec.dtype)
        rows = np.empty(raw_shape(leaf.spec), kind)
        if here:
            rows[...] = leaf.backend.download(leaf.at, leaf.spec)
        if self.ranks is not None:
            owner = self.ranks.rank if leaf.owner is None else leaf.owner
            self.ranks.spread(rows.reshape(-1).view(np.uint8), owner, STATE)
        return rows

    def write(self, name: str, array: ArrayLike) -> None:
        """Set a state from an array of its NumPy shape, or from raw rows.

        Errors: UnknownNameError, ShapeError, DTypeError.
        """
        # Before taking the locks, because converting a device array takes its device's lock.
        values = stored(f"state {name!r}", self._state(name)[0], array)
        self._set(name, values)

    def clear(self, *names: str) -> None:
        """Set states to zero, all of them by default. Errors: UnknownNameError."""
        with self.lock:
            for name in names or [str(key[0]) for key in self._leaves.states]:
                spec, _ = self._state(name)
                zero = np.zeros((), spec.dtype.numpy or raw_type(spec.dtype))
                self._set(name, np.broadcast_to(zero, raw_shape(spec)))

    def _set(self, name: str, values: NDArray[Any]) -> None:
        with self.lock:
            leaves = [(leaf, index) for leaf, index in self._state(name)[1] if leaf.owner is None]

            def upload() -> None:
                self.settle()
                for leaf, index in leaves:
                    leaf.backend.upload(leaf.at, leaf.spec, np.ascontiguousarray(values[index]))
                for leaf, _ in leaves:
                    leaf.backend.synchronize()

            self.alone([leaf.backend for leaf, _ in leaves], upload)


def _whole_name(state: Node) -> str:
    """The name of a state, or of the one that it is a part of."""
    part = state.attrs.get("part")
    return str(state.attrs["name"] if part is None else part.name)


def _cut_alike(known: Node, leaf: Node, states: Mapping[tuple[object, ...], Leaf]) -> bool:
    """Whether a state is whole or cut as a store has it.

    known  a part of it that the store has, or all of it
    """
    if (known.attrs.get("part") is None) != (leaf.attrs.get("part") is None):
        return False
    same = states.get((leaf.attrs["name"],))
    return same is not None and same.node.attrs.get("part") == leaf.attrs.get("part")


@lru_cache(maxsize=64)
def _locks(
    backends: tuple[Backend, ...], queued: frozenset[Backend]
) -> tuple[AbstractContextManager[object], ...]:
    """The locks of these devices, in the order in which every thread takes them."""
    devices = sorted({*backends, *queued}, key=lambda backend: backend.place)
    return tuple(backend.lock for backend in devices)


def _holding(locks: Sequence[AbstractContextManager[object]], action: Callable[[], T]) -> T:
    """Call `action` with the locks taken, in this order.

    Each lock has its own `with` statement: Python checks for signals neither between acquiring a
    lock and entering the block nor between leaving the block and releasing the lock, so Ctrl-C
    never leaves a lock taken. With a generator or an ExitStack in between it could.
    """
    if not locks:
        return action()
    with locks[0]:
        return _holding(locks[1:], action)


def _same_data(a: Node, b: Node) -> bool:
    if a.dtype != b.dtype or a.ne != b.ne:
        return False
    if source_of(a) == source_of(b):  # for example, one file opened twice: nothing is read
        return True
    if derived_from(a):  # by the same expression: that is the key under which the store has them
        return all(map(_same_data, derived_from(a), derived_from(b)))
    x, y = (data_of(n).reshape(-1).view(np.uint8) for n in (a, b))
    blocks = range(0, len(x), 2**20)  # in blocks: the comparison allocates as much as it compares
    return x.ctypes.data == y.ctypes.data or all(
        np.array_equal(x[i : i + 2**20], y[i : i + 2**20]) for i in blocks
    )

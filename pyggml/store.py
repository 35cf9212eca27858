"""What outlives a plan: weights, states, input slots, and one arena as large as needed."""

from __future__ import annotations

from collections.abc import Iterable
from threading import RLock
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyggml import backends
from pyggml.backends.base import Address, Backend, Buffer
from pyggml.dtypes import DType
from pyggml.errors import DTypeError, GraphError, ShapeError, UnknownName
from pyggml.graph import Node, Spec
from pyggml.ops.leaf import data_of
from pyggml.quants import decode_rows, encode_rows


class Store:
    """The memory that plans share: weights and states once, one arena.

    Plans of one store run one at a time; stores are independent. Addresses of weights, states and
    input slots never change while the store lives.
    """

    def __init__(self, backend: str = "numpy") -> None:
        self.backend: Backend = backends.get(backend)
        self.lock = RLock()
        self.arena: Buffer = None
        self.arena_bytes = 0
        self.generation = 0  # grows when the arena moves: bound plans then bind again
        self.bound: WeakSet[Any] = WeakSet()  # plans that hold the arena
        self._weights: dict[object, tuple[Node, Buffer]] = {}
        self._states: dict[str, tuple[Spec, Buffer]] = {}
        self._inputs: dict[tuple[str, Spec], Buffer] = {}

    # -- for plans ----------------------------------------------------------------------------

    def check(self, leaves: Iterable[Node]) -> None:
        """GraphError where a leaf contradicts what the store holds under its name."""
        for leaf in leaves:
            key = leaf.attrs["name"]
            if leaf.op.name == "state" and key in self._states:
                spec = self._states[key][0]
                if (spec.dtype, spec.ne) != (leaf.dtype, leaf.ne):
                    raise GraphError(f"the state {key!r} is {spec} in this store, not {leaf.spec}")
            if leaf.op.name == "constant" and key is not None and key in self._weights:
                held = self._weights[key][0]
                if held is not leaf and not _same_data(held, leaf):
                    raise GraphError(f"the store holds other values under the weight {key!r}")

    def reserve(self, leaves: Iterable[Node], arena_bytes: int) -> dict[Node, Buffer]:
        """Memory for all leaves and an arena of this size; on failure nothing has changed."""
        leaves = tuple(leaves)
        self.check(leaves)
        weights, states, inputs = {}, {}, {}
        found: dict[Node, Buffer] = {}
        for leaf in leaves:
            key = leaf.attrs["name"]
            if leaf.op.name == "constant":
                held = self._weights.get(key if key is not None else leaf)
                if held is None:
                    layout = self.backend.weight_layout(leaf, ())
                    held = leaf, self.backend.weight(leaf, layout, data_of(leaf))
                    weights[key if key is not None else leaf] = held
                found[leaf] = held[1]
            elif leaf.op.name == "state":
                state = self._states.get(key) or (leaf.spec, self.backend.alloc(leaf.spec.nbytes))
                states[key] = state
                found[leaf] = state[1]
            else:
                slot = (key, leaf.spec)
                if slot not in self._inputs:
                    inputs[slot] = self.backend.alloc(leaf.spec.nbytes)
                found[leaf] = inputs[slot] if slot in inputs else self._inputs[slot]
        if arena_bytes > self.arena_bytes:
            self.arena = self.backend.alloc(arena_bytes)
            self.arena_bytes = arena_bytes
            self.generation += 1
            for plan in tuple(self.bound):  # or the old arena would live as long as they do
                plan.release()
            self.bound.clear()
        self._weights.update(weights)
        self._states.update(states)
        self._inputs.update(inputs)
        return found

    # -- for users ----------------------------------------------------------------------------

    def _state(self, name: str) -> tuple[Spec, Address]:
        if name not in self._states:
            known = (
                ", ".join(self._states) or "none: states exist once a plan that has them is bound"
            )
            raise UnknownName(f"the store has no state {name!r}; it has: {known}")
        spec, buffer = self._states[name]
        return spec, Address(buffer, 0, spec.nb)

    def read(self, name: str, *, raw: bool = False) -> NDArray[Any]:
        """A copy of a state in NumPy shape; bf16 and block types as f32, or raw rows."""
        with self.lock:
            spec, at = self._state(name)
            found = self.backend.download(at, spec)
        return found if raw or spec.dtype.numpy is not None else decode_rows(spec.dtype, found)

    def write(self, name: str, array: ArrayLike) -> None:
        """Set a state from an array of its NumPy shape (or its raw rows)."""
        with self.lock:
            spec, at = self._state(name)
            self.backend.upload(at, spec, stored(f"state {name!r}", spec, array))

    def clear(self, *names: str) -> None:
        """Set states to zero; all of them without names."""
        with self.lock:
            for name in names or tuple(self._states):
                spec, at = self._state(name)
                shape = (*spec.shape[:-1], spec.dtype.row_bytes(spec.ne[0]) // _unit(spec.dtype))
                zero = np.zeros((), spec.dtype.numpy or _raw_type(spec.dtype))
                self.backend.upload(at, spec, np.broadcast_to(zero, shape))


def _raw_type(kind: DType) -> Any:
    return np.uint16 if kind.block == 1 else np.uint8


def _unit(kind: DType) -> int:
    """Bytes of one element of the stored array."""
    return kind.nbytes if kind.block == 1 else 1


def _same_data(a: Node, b: Node) -> bool:
    if a.dtype != b.dtype or a.ne != b.ne:
        return False
    x, y = (data_of(n).reshape(-1).view(np.uint8) for n in (a, b))
    blocks = range(0, len(x), 2**20)  # a weight's size is not to be allocated to compare it
    return x.ctypes.data == y.ctypes.data or all(
        np.array_equal(x[i : i + 2**20], y[i : i + 2**20]) for i in blocks
    )


def stored(what: str, spec: Spec, array: ArrayLike) -> NDArray[Any]:
    """An array from the user as the type is stored; errors say what was expected.

    Floats go into every float and block type, whole numbers into integer types if they fit;
    bf16 and block types also take their raw rows (uint16, uint8).
    """
    try:
        given = np.asanyarray(array)
    except ValueError as error:
        raise DTypeError(f"{what}: no array can be made of it: {error}") from None
    if isinstance(given, np.ma.MaskedArray) or given.dtype.kind not in "fiu":
        raise DTypeError(f"{what} takes {spec}; it got an array of {given.dtype}")
    kind = spec.dtype
    if kind.numpy is None and given.dtype == _raw_type(kind):
        raw = (*spec.shape[:-1], kind.row_bytes(spec.ne[0]) // _unit(kind))
        _want_shape(what, spec, given, raw)
        return np.ascontiguousarray(given)
    _want_shape(what, spec, given, spec.shape)
    if kind.kind == "int":
        if given.dtype.kind == "f":
            raise DTypeError(f"{what} takes {spec}; it got {given.dtype}: give whole numbers")
        limit = np.iinfo(kind.numpy or "i4")
        if given.size and (given.min() < limit.min or given.max() > limit.max):
            raise DTypeError(f"{what}: values do not fit in {kind}")
    if kind.numpy is not None:
        return np.ascontiguousarray(given, dtype=kind.numpy)
    return encode_rows(kind, np.ascontiguousarray(given, dtype=np.float32))


def _want_shape(what: str, spec: Spec, given: NDArray[Any], shape: tuple[int, ...]) -> None:
    if given.shape != shape:
        raise ShapeError(
            f"{what} takes {spec}, NumPy shape {shape}; it got NumPy shape {given.shape}"
        )

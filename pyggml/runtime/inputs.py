"""A plan's inputs: copied into slots of the store's, or read where the caller keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.base import Address, Backend, Buffer, Given
from pyggml.dtypes import TYPES
from pyggml.errors import DTypeError, GraphError, ShapeError, UnknownNameError
from pyggml.node import Node, Spec
from pyggml.ops.leaf import input_op
from pyggml.runtime.arrays import check, stored
from pyggml.runtime.leaves import Need
from pyggml.runtime.misuse import Limit
from pyggml.runtime.store import Store
from pyggml.transfer import origin


@dataclass(frozen=True, slots=True)
class Shared:
    """An array in the memory of a device, and the backend that reads it there."""

    backend: Backend
    given: Given

    def at(self, spec: Spec) -> Address:
        return Address(self.given.buffer, self.given.offset, spec.nb)


Bound: TypeAlias = Mapping[str, Shared]
Ready: TypeAlias = Mapping[str, NDArray[np.generic] | Shared]


class Inputs:
    """What a plan takes from its caller. Which of them are bound is the plan's to know."""

    def __init__(self, needs: Iterable[Need], limits: Iterable[Limit] = ()) -> None:
        self._limits = tuple(limits)
        self.specs: dict[str, Spec] = {}
        self._needs: dict[str, list[Need]] = {}  # an input may be read on several devices
        for need in needs:
            leaf = origin(need.node)
            if leaf.op is input_op:
                self.specs[leaf.attrs["name"]] = leaf.spec
                self._needs.setdefault(leaf.attrs["name"], []).append(need)

    def addresses(self, bound: Bound) -> dict[Node, Address]:
        """Where inputs are that need no slot."""
        return {
            need.node: shared.at(self.specs[key])
            for key, shared in bound.items()
            for need in self._needs[key]
            if need.backend.device == shared.backend.device
        }

    def bind(self, arrays: Mapping[str, object], bound: Bound, store: Store) -> Bound:
        """What is bound once these arrays are, too; None in the place of an array ends it."""
        self._check_names(arrays)
        changed = dict(bound)
        for key, array in arrays.items():
            if array is None:
                changed.pop(key, None)
            else:
                changed[key] = self._bindable(key, array, store)
        return changed

    def take(self, arrays: Mapping[str, object]) -> Ready:
        """Arrays for one run: where they are if a device has them, else as the host stores them.

        To be called without the store's lock: an array of another device takes that device's lock.
        """
        self._check_names(arrays)
        ready = {key: self._taken(key, array) for key, array in arrays.items()}
        for limit in self._limits:
            ids = ready.get(limit.input)
            if isinstance(ids, np.ndarray):
                limit.check(ids)
        return ready

    def check(self, arrays: Iterable[str], bound: Bound) -> None:
        """GraphError unless each input is either bound or given."""
        twice = [key for key in arrays if key in bound]
        if twice:
            raise GraphError(
                f"input {twice[0]!r} is bound to an array of yours: write into that one, or "
                f"bind({twice[0]}=None) first"
            )
        missing = [key for key in self.specs if key not in arrays and key not in bound]
        if missing:
            sizes = ", ".join(f"{key} ({self.specs[key]})" for key in missing)
            raise GraphError(f"run lacks inputs: {sizes} (sizes in ne order)")

    def put(self, ready: Ready, bound: Bound, at: Mapping[Node, Address]) -> None:
        """Put arrays into the slots; of what is bound only what other devices have a slot for."""
        for key, array in {**ready, **bound}.items():
            if isinstance(array, Shared):
                self._spread(key, array, key in bound, at)
            else:
                for need in self._needs[key]:
                    need.backend.upload(at[need.node], self.specs[key], array)

    def _check_names(self, arrays: Iterable[str]) -> None:
        for key in arrays:
            if key not in self.specs:
                known = ", ".join(self.specs) or "none"
                hint = _RENAMED.get(key, "")
                raise UnknownNameError(f"the plan has no input {key!r}; its inputs: {known}{hint}")

    def _taken(self, key: str, array: object) -> NDArray[np.generic] | Shared:
        devices = [need for need in self._needs[key] if need.backend.device != "host"]
        shared = self._shared(key, array, devices)
        return shared or stored(f"input {key!r}", self.specs[key], array)  # type: ignore[arg-type]

    def _shared(self, key: str, array: object, needs: Iterable[Need]) -> Shared | None:
        """The array in the memory of the first of these that it belongs to."""
        for need in needs:
            with need.backend.lock, _naming(key):
                given = need.backend.given(array)
            if given is not None:
                check(f"input {key!r}", self.specs[key], given)
                return Shared(need.backend, given)
        return None

    def _bindable(self, key: str, array: object, store: Store) -> Shared:
        needs = self._needs[key]
        shared = self._shared(key, array, needs)
        if shared is None:
            places = ", ".join(need.backend.place for need in needs)
            raise DTypeError(
                f"input {key!r} is read on {places}; bind takes an array in that memory, and it "
                f"got {_described(array)}. Give it to run, which copies it"
            )
        given, device = shared.given, shared.backend.device
        if given.address % given.alignment:
            raise ShapeError(
                f"input {key!r}: the array begins at an address that is no multiple of "
                f"{given.alignment} bytes, as {shared.backend.place} needs: bind a copy of it"
            )
        for what, buffer, nbytes in store.written(device):
            if _inside(shared, buffer, nbytes):
                raise GraphError(
                    f"input {key!r}: the array is part of {what}, which runs write over: give it "
                    "to run, or bind a copy of it"
                )
        return shared

    def _spread(self, key: str, array: Shared, is_bound: bool, at: Mapping[Node, Address]) -> None:
        """Copies of a device's array into the slots of the input, in the devices' queues."""
        spec, sender = self.specs[key], array.backend
        source = array.at(spec)
        with _naming(key):
            array.given.ready()
        for need in self._needs[key]:
            if need.backend.device == "host" != sender.device:
                sender.send(source, at[need.node], spec).wait()
            elif need.backend.device != sender.device:
                need.backend.wait_for(sender.record())
                need.backend.fetch(source, sender, at[need.node], spec)
                if not is_bound:  # it may be in an arena that the run is to write over
                    sender.wait_for(need.backend.record())
            elif not is_bound:
                need.backend.fetch(source, sender, at[need.node], spec)


#: Options that methods of a plan once had, where a name of an input stands now.
_RENAMED = {
    "copy": ". run(copy=False) is now views()",
    "repeat": ". run(repeat=n) is now repeat(n), profile(repeat=n) is profile(inputs, n)",
    "progress": ". bind(progress=f) is now bind(arrays, f): bind({}, f) without arrays",
}


def same_memory(a: Bound, b: Bound) -> bool:
    """Whether what is recorded for one reads the arrays of the other."""

    def addresses(bound: Bound) -> dict[str, tuple[str, int]]:
        return {key: (array.backend.device, array.given.address) for key, array in bound.items()}

    return a is b or addresses(a) == addresses(b)


@contextmanager
def _naming(key: str) -> Iterator[None]:
    """Errors about an array with the input's name."""
    try:
        yield
    except (DTypeError, GraphError) as error:
        raise type(error)(f"input {key!r}: {error}") from None


def _inside(array: Shared, buffer: Buffer, nbytes: int) -> bool:
    """Whether it begins in this block of its device's memory."""
    spec = Spec.of(TYPES["i8"], (max(nbytes, 1),))
    block = array.backend.given(array.backend.view(Address(buffer, 0, spec.nb), spec))
    assert block is not None
    return 0 <= array.given.address - block.address < nbytes


def _described(array: object) -> str:
    kind = type(array)
    return f"a {kind.__module__}.{kind.__qualname__}".replace("builtins.", "")


def together(inputs: Mapping[str, object] | None, named: Mapping[str, object]) -> dict[str, object]:
    """Inputs given in a dict and as keywords."""
    if inputs is not None and not isinstance(inputs, Mapping):
        raise DTypeError(
            f"inputs are given by name, in a dict or as keywords, not as {type(inputs).__name__}"
        )
    twice = [key for key in named if key in (inputs or {})]
    if twice:
        raise GraphError(f"input {twice[0]!r} is given twice, in the dict and as a keyword")
    return {**(inputs or {}), **named}

"""A plan's inputs: copied into slots of the store's, or read where the caller keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.base import Address, Backend, Buffer, Given
from pyggml.dtypes import TYPES
from pyggml.errors import DTypeError, GraphError, ShapeError, UnknownNameError
from pyggml.node import Node, Spec
from pyggml.ops.leaf import input_op
from pyggml.runtime.arrays import check, stored
from pyggml.runtime.store import Need, Store
from pyggml.transfer import origin


@dataclass(frozen=True, slots=True)
class Shared:
    """An array in the memory of a device, and the backend that reads it there."""

    backend: Backend
    given: Given

    def at(self, spec: Spec) -> Address:
        return Address(self.given.buffer, self.given.offset, spec.nb)


class Inputs:
    """What a plan takes from its caller: by copy at each run, or bound once."""

    def __init__(self, needs: Iterable[Need]) -> None:
        self.specs: dict[str, Spec] = {}
        self._needs: dict[str, list[Need]] = {}  # an input may be wanted on several devices
        self._bound: dict[str, Shared] = {}  # replaced, never changed
        for need in needs:
            leaf = origin(need.node)
            if leaf.op is input_op:
                self.specs[leaf.attrs["name"]] = leaf.spec
                self._needs.setdefault(leaf.attrs["name"], []).append(need)

    @property
    def addresses(self) -> dict[Node, Address]:
        """Where inputs are that need no slot."""
        return {
            need.node: shared.at(self.specs[key])
            for key, shared in self._bound.items()
            for need in self._needs[key]
            if need.backend.device == shared.backend.device
        }

    def bind(self, arrays: Mapping[str, object], store: Store) -> bool:
        """Read these inputs where the arrays are from now on, None: from a slot again.

        Whether an address changed. Where one array is refused none is bound.
        """
        self._want_known(arrays)
        bound = dict(self._bound)
        for key, array in arrays.items():
            if array is None:
                bound.pop(key, None)
            else:
                bound[key] = self._bindable(key, array, store)
        before, self._bound = self._bound, bound
        return _addresses(bound) != _addresses(before)

    @property
    def bound(self) -> Mapping[str, Shared]:
        """What is bound, to be `restore`d where binding the plan fails."""
        return self._bound

    def restore(self, bound: Mapping[str, Shared]) -> None:
        self._bound = dict(bound)

    def give(self, arrays: Mapping[str, object], at: Mapping[Node, Address]) -> None:
        """Put arrays into the slots; of what is bound only what other devices have a slot for."""
        self._want_known(arrays)
        twice = [key for key in arrays if key in self._bound]
        if twice:
            raise GraphError(
                f"input {twice[0]!r} is bound to an array of yours: write into that one, or "
                f"bind({twice[0]}=None) first"
            )
        missing = [key for key in self.specs if key not in arrays and key not in self._bound]
        if missing:
            wanted = ", ".join(f"{key} ({self.specs[key]})" for key in missing)
            raise GraphError(f"run lacks inputs: {wanted} (sizes in ne order)")
        ready = {key: self._taken(key, array) for key, array in arrays.items()}
        for key, array in {**ready, **self._bound}.items():
            if isinstance(array, Shared):
                self._spread(key, array, at)
            else:
                for need in self._needs[key]:
                    need.backend.upload(at[need.node], self.specs[key], array)

    def _want_known(self, arrays: Iterable[str]) -> None:
        for key in arrays:
            if key not in self.specs:
                known = ", ".join(self.specs) or "none"
                raise UnknownNameError(f"the plan has no input {key!r}; its inputs: {known}")

    def _taken(self, key: str, array: object) -> NDArray[np.generic] | Shared:
        """An array for one run: where it is if a device has it, else as the host stores it."""
        devices = [need for need in self._needs[key] if need.backend.device != "host"]
        found = self._shared(key, array, devices)
        return found or stored(f"input {key!r}", self.specs[key], array)  # type: ignore[arg-type]

    def _shared(self, key: str, array: object, needs: Iterable[Need]) -> Shared | None:
        """The array in the memory of the first of these that it belongs to."""
        for need in needs:
            with _naming(key):
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

    def _spread(self, key: str, array: Shared, at: Mapping[Node, Address]) -> None:
        """Copies of a device's array into the slots of the input, in the devices' queues."""
        spec, sender = self.specs[key], array.backend
        source, bound = array.at(spec), key in self._bound
        with _naming(key):
            array.given.ready()
        for need in self._needs[key]:
            if need.backend.device == "host" != sender.device:
                sender.send(source, at[need.node], spec).wait()
            elif need.backend.device != sender.device:
                need.backend.wait_for(sender.record())
                need.backend.fetch(source, sender, at[need.node], spec)
                if not bound:  # it may be in an arena that the run is to write over
                    sender.wait_for(need.backend.record())
            elif not bound:
                need.backend.fetch(source, sender, at[need.node], spec)


@contextmanager
def _naming(key: str) -> Iterator[None]:
    """Errors about an array with the input's name."""
    try:
        yield
    except (DTypeError, GraphError) as error:
        raise type(error)(f"input {key!r}: {error}") from None


def _addresses(bound: Mapping[str, Shared]) -> dict[str, tuple[str, int]]:
    return {key: (one.backend.device, one.given.address) for key, one in bound.items()}


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

"""A plan's inputs: checked, converted, or bound to the caller's own memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.base import Backend, Given, in_host_memory
from pyggml.backends.step import Address, Buffer
from pyggml.dtypes import TYPES
from pyggml.errors import DTypeError, GraphError, ShapeError, UnknownNameError
from pyggml.node import Node
from pyggml.ops.leaf import input_op
from pyggml.runtime.arrays import check, stored
from pyggml.runtime.leaves import Need
from pyggml.runtime.misuse import Limit
from pyggml.runtime.store import Store
from pyggml.spec import Spec
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
    """The inputs of a plan. The plan keeps which of them are bound and passes it as `bound`.

    specs  by name
    needs  by name; several where several devices of this process read the input
    """

    def __init__(self, needs: Iterable[Need], limits: Iterable[Limit] = ()) -> None:
        self._limits: dict[str, list[Limit]] = {}
        for limit in limits:
            self._limits.setdefault(limit.input, []).append(limit)
        self.specs: dict[str, Spec] = {}
        self.needs: dict[str, list[Need]] = {}
        #: NumPy's type, if there is one, and the shape in which each is stored.
        self._forms: dict[str, tuple[np.dtype[Any] | None, tuple[int, ...]]] = {}
        for need in needs:
            leaf = origin(need.node)
            if leaf.op is input_op:
                key = leaf.attrs["name"]
                self.specs[key] = leaf.spec
                here = self.needs.setdefault(key, [])
                if need.owner is None:
                    here.append(need)
                kind = leaf.dtype.numpy
                self._forms[key] = None if kind is None else np.dtype(kind), leaf.spec.shape

    def addresses(self, bound: Bound) -> dict[Node, Address]:
        """The addresses of bound inputs on the devices that read the caller's array directly."""
        return {
            need.node: shared.at(self.specs[key])
            for key, shared in bound.items()
            for need in self.needs[key]
            if need.backend.device == shared.backend.device
        }

    def bind(self, arrays: Mapping[str, object], bound: Bound, store: Store) -> Bound:
        """`bound` with these arrays added; None in place of an array unbinds the input."""
        self._check_names(arrays)
        changed = dict(bound)
        for key, array in arrays.items():
            if array is None:
                changed.pop(key, None)
            else:
                changed[key] = self._bindable(key, array, store)
        return changed

    def take(self, arrays: Mapping[str, object]) -> Ready:
        """Arrays for one run: those in a device's memory as they are, others as the type stores.

        Call it without the store's lock: a device array takes the lock of its device.
        """
        ready: dict[str, NDArray[np.generic] | Shared] = {}
        for key, (dtype, shape) in self._forms.items():
            if key not in arrays:
                continue
            array = arrays[key]
            if (
                type(array) is np.ndarray  # in no device's memory
                and array.dtype is dtype
                and array.shape == shape
                and array.flags.c_contiguous
            ):
                ready[key] = array
            else:
                ready[key] = self._taken(key, array)
        if len(ready) < len(arrays):
            self._check_names(arrays)
        for key, limits in self._limits.items():
            ids = ready.get(key)
            if isinstance(ids, np.ndarray):
                largest = int(ids.item() if ids.size == 1 else ids.max())
                for limit in limits:
                    if largest >= limit.below:
                        limit.exceeded(largest)
        return ready

    def check(self, arrays: Collection[str], bound: Bound) -> None:
        """GraphError unless each input either is bound or has an array in this run."""
        twice = [key for key in arrays if key in bound]
        if twice:
            raise GraphError(
                f"input {twice[0]!r} is bound to your array; write into that array, or call "
                f"bind({twice[0]}=None) first"
            )
        missing = [key for key in self.specs if key not in arrays and key not in bound]
        if missing:
            sizes = ", ".join(f"{key} ({self.specs[key]})" for key in missing)
            raise GraphError(f"missing inputs: {sizes} (sizes in ne order)")

    def _check_names(self, arrays: Iterable[str]) -> None:
        for key in arrays:
            if key not in self.specs:
                known = ", ".join(self.specs) or "none"
                hint = _RENAMED.get(key, "")
                raise UnknownNameError(
                    f"the plan has no input {key!r}; its inputs are: {known}{hint}"
                )

    def _taken(self, key: str, array: object) -> NDArray[np.generic] | Shared:
        """An array that may have another form than the stored one, or is in a device's memory."""
        if type(array) is np.ndarray:
            return stored(f"input {key!r}", self.specs[key], array)
        devices = [need for need in self.needs[key] if not in_host_memory(need.backend)]
        shared = self._shared(key, array, devices)
        return shared or stored(f"input {key!r}", self.specs[key], array)  # type: ignore[arg-type]

    def _shared(self, key: str, array: object, needs: Iterable[Need]) -> Shared | None:
        """The array as the first of these devices reads it; None if it is in the memory of none."""
        for need in needs:
            with need.backend.lock, naming(key):
                description = need.backend.given(array)
            if description is not None:
                check(f"input {key!r}", self.specs[key], description)
                return Shared(need.backend, description)
        return None

    def _bindable(self, key: str, array: object, store: Store) -> Shared:
        needs = self.needs[key]
        shared = self._shared(key, array, needs)
        if shared is None:
            places = ", ".join(need.backend.place for need in needs)
            raise DTypeError(
                f"input {key!r}: bind needs an array in the memory of {places}, got "
                f"{_type_name(array)}; pass it to run instead, which copies it"
            )
        given, device = shared.given, shared.backend.device
        if given.address % given.alignment:
            raise ShapeError(
                f"input {key!r}: {shared.backend.place} needs arrays whose address is a multiple "
                f"of {given.alignment} bytes; bind a copy"
            )
        for what, buffer, nbytes in store.written(device):
            if _inside(shared, buffer, nbytes):
                raise GraphError(
                    f"input {key!r}: the array is part of {what}, which runs overwrite; pass it "
                    "to run, or bind a copy"
                )
        return shared


#: Options of a plan's methods in earlier versions -> how to write them now.
_RENAMED = {
    "copy": ". run(copy=False) is now views()",
    "wait": ". To queue a run without a wait, call submit()",
    "repeat": ". run(repeat=n) is now repeat(n), profile(repeat=n) is profile(inputs, n)",
    "progress": ". bind(progress=f) is now bind(arrays, f): bind({}, f) without arrays",
}


def same_memory(a: Bound, b: Bound) -> bool:
    """Whether both bind the same inputs to the same memory."""

    def addresses(bound: Bound) -> dict[str, tuple[str, int]]:
        return {key: (array.backend.device, array.given.address) for key, array in bound.items()}

    return addresses(a) == addresses(b)


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Add the input's name to errors about an array."""
    try:
        yield
    except (DTypeError, GraphError) as error:
        raise type(error)(f"input {key!r}: {error}") from None


def _inside(array: Shared, buffer: Buffer, nbytes: int) -> bool:
    """Whether the array begins in this block of its device's memory."""
    spec = Spec.of(TYPES["i8"], (max(nbytes, 1),))
    block = array.backend.given(array.backend.view(Address(buffer, 0, spec.nb), spec))
    assert block is not None
    return 0 <= array.given.address - block.address < nbytes


def _type_name(array: object) -> str:
    cls = type(array)
    return f"a {cls.__module__}.{cls.__qualname__}".replace("builtins.", "")


def together(
    inputs: Mapping[str, object] | None, named: Mapping[str, object]
) -> Mapping[str, object]:
    """The inputs of a dict and of keywords as one dict."""
    if type(inputs) is not dict and inputs is not None and not isinstance(inputs, Mapping):
        raise DTypeError(
            f"inputs must be a dict or keywords, not {type(inputs).__name__}; they go by name"
        )
    if not named and inputs is not None:
        return inputs
    if not inputs:
        return named
    twice = [key for key in named if key in inputs]
    if twice:
        raise GraphError(f"input {twice[0]!r} is both in the dict and a keyword; pass it once")
    return {**inputs, **named}

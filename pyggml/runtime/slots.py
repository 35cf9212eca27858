"""The slots of a plan's inputs: where they are, and how arrays get there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from numpy.typing import NDArray

from pyggml.backends.base import Backend, Upload
from pyggml.backends.step import Address
from pyggml.node import Node
from pyggml.runtime.inputs import Bound, Inputs, Ready, Shared, naming

#: The uploads of some inputs, one for each device, with the names of the inputs in their order.
Uploads: TypeAlias = Sequence[tuple[tuple[str, ...], Upload]]


class Slots:
    """The slots of inputs at their addresses. Uploads are prepared once for each set of inputs."""

    def __init__(self, inputs: Inputs, at: Mapping[Node, Address]) -> None:
        self._inputs, self._at = inputs, at
        self._uploads: dict[tuple[str, ...], Uploads] = {}

    def fill(self, ready: Ready, bound: Bound) -> None:
        """Queue copies of arrays into their slots; bound ones only to devices that need a copy."""
        arrays: dict[str, NDArray[Any]] = {}
        for key, array in ready.items():
            if isinstance(array, Shared):
                self._spread(key, array, False)
            else:
                arrays[key] = array
        for key, array in bound.items():
            self._spread(key, array, True)
        for names, upload in self.uploads(tuple(arrays)):
            upload([arrays[name] for name in names])

    def uploads(self, keys: tuple[str, ...]) -> Uploads:
        """Uploads of host arrays for these inputs."""
        uploads = self._uploads.get(keys)
        if uploads is None:
            uploads = self._uploads[keys] = self._prepared(keys)
        return uploads

    def _prepared(self, keys: Sequence[str]) -> Uploads:
        """Uploads of host arrays for these inputs to every device that reads them."""
        tensors: dict[Backend, list[tuple[str, Address]]] = {}
        for key in keys:
            for need in self._inputs.needs[key]:
                tensors.setdefault(need.backend, []).append((key, self._at[need.node]))
        return [
            (
                tuple(key for key, _ in each),
                backend.uploads([(at, self._inputs.specs[key]) for key, at in each]),
            )
            for backend, each in tensors.items()
        ]

    def _spread(self, key: str, array: Shared, is_bound: bool) -> None:
        """Queue copies of a device's array into the slots of the input on each device."""
        spec, sender, at = self._inputs.specs[key], array.backend, self._at
        source = array.at(spec)
        with naming(key):
            array.given.ready()
        for need in self._inputs.needs[key]:
            if need.backend.device == "host" != sender.device:
                sender.send(source, at[need.node], spec).wait()
            elif need.backend.device != sender.device:
                need.backend.wait_for(sender.record())
                need.backend.fetch(source, sender, at[need.node], spec)
                if not is_bound:  # the array may be in an arena that the run overwrites
                    sender.wait_for(need.backend.record())
            elif not is_bound:
                need.backend.fetch(source, sender, at[need.node], spec)

"""A backend that keeps its memory on the host between runs, so that the grid is fast on a GPU.

A case writes and reads its memory many times per run of a kernel: values, poison, guards. On a GPU
that many processes share, each access waits. Here they access the host's memory, and a run is one
copy to the device, the kernels, and one copy back. Tensors that do not fit stay on the device.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pyggml import backends
from pyggml.backends.base import Arrival, Download, Upload
from pyggml.backends.step import Address, Step
from pyggml.dtypes import dtype
from pyggml.node import Node
from pyggml.spec import Spec


@dataclass(slots=True)
class Region:
    """A block of the mirrored memory, from byte `start`."""

    mirror: Mirrored
    start: int
    data: Any

    def __del__(self) -> None:
        self.mirror.dropped()


class Mirrored:
    """`backend` with mirrored memory of `nbytes`; all else is the backend's own.

    memory  on the host
    twin    of the same size on the device; a run fills it and reads it back
    top     bytes of the memory in use; 0 again when no region is left
    live    number of regions
    """

    def __init__(self, backend: Any, nbytes: int) -> None:
        self.backend = backend
        self.host: Any = backends.get("numpy")
        self.memory = self.host.alloc(nbytes)
        self.twin: Any = None
        self.top = self.live = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    # -- memory -------------------------------------------------------------------------------

    def alloc(self, nbytes: int) -> Any:
        size = -(-nbytes // self.backend.alignment) * self.backend.alignment
        if self.top + size > len(self.memory):
            return self.backend.alloc(nbytes)
        region = Region(self, self.top, self.memory[self.top : self.top + nbytes])
        region.data[:] = 0
        self.top += size
        self.live += 1
        return region

    def dropped(self) -> None:
        self.live -= 1
        if not self.live:
            self.top = 0

    def upload(self, at: Address, spec: Any, array: Any) -> None:
        self._side(at).upload(_plain(at), spec, array)

    def download(self, at: Address, spec: Any) -> Any:
        return self._side(at).download(_plain(at), spec)

    def uploads(self, tensors: Sequence[tuple[Address, Any]]) -> Upload:
        def upload(arrays: Sequence[Any]) -> None:
            for (at, spec), array in zip(tensors, arrays):
                self.upload(at, spec, array)

        return upload

    def downloads(self, at: Address, spec: Any) -> Download:
        def download() -> Arrival:
            copy = self.download(at, spec)
            return lambda: copy

        return download

    def _side(self, at: Address) -> Any:
        return self.host if isinstance(at.buffer, Region) else self.backend

    # -- runs ---------------------------------------------------------------------------------

    def bind(
        self,
        steps: Sequence[Step],
        at: Mapping[Node, Address],
        scratch: Any,
        scratch_at: Sequence[int],
    ) -> Any:
        if self.twin is None:
            self.twin = self.backend.alloc(len(self.memory))
        starts = [Address(scratch, start, (1, 1, 1, 1)) for start in scratch_at]
        scratches = [self._on_device(start) for start in starts]
        memory = scratches[0].buffer if scratches else self.twin
        places = {node: self._on_device(address) for node, address in at.items()}
        runner = self.backend.bind(steps, places, memory, [s.offset for s in scratches])
        return _Runner(self, runner, (at, scratch))

    def _on_device(self, at: Address) -> Address:
        if not isinstance(at.buffer, Region):
            return at
        return replace(at, buffer=self.twin, offset=at.offset + at.buffer.start)

    def run(self, runner: Any) -> None:
        """Copy the used memory to the device, run the kernels, copy it back."""
        size = self.top
        at = Address(self.twin, 0, (1, size, size, size))
        spec, used = Spec.of(dtype("i8"), (max(size, 1),)), self.memory[: max(size, 1)]
        self.backend.upload(at, spec, used.view(np.int8))
        runner.run()
        used[:] = self.backend.download(at, spec).view(np.uint8)


class _Runner:
    """A runner that copies the memory before and after. It keeps its regions alive."""

    def __init__(self, mirror: Mirrored, runner: Any, regions: object) -> None:
        self.mirror, self.runner, self.regions = mirror, runner, regions

    def run(self) -> None:
        self.mirror.run(self.runner)


def _plain(at: Address) -> Address:
    return replace(at, buffer=at.buffer.data) if isinstance(at.buffer, Region) else at


@contextmanager
def mirrored(name: str, index: int = 0, nbytes: int = 128 << 20) -> Iterator[Mirrored]:
    """Make `backends.get(name, index)` return a device with mirrored memory inside the context."""
    module: Any = importlib.import_module(f"pyggml.backends.{name}")
    device = module.device
    mirror = Mirrored(device(index), nbytes)
    module.device = lambda number: mirror if number == index else device(number)
    backends.get.cache_clear()
    try:
        yield mirror
    finally:
        module.device = device
        backends.get.cache_clear()

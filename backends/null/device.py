"""A null device: the protocol over a queue that runs late and memory that only it can reach."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from pyggml import backends
from pyggml.backends.base import Backend, Event, Given
from pyggml.backends.null.memory import HEADER, PRIVATE, NullBuffer, plain, private
from pyggml.backends.null.queue import Queue
from pyggml.backends.null.runner import NullRunner, room_for_weights
from pyggml.backends.step import Address, Buffer, Step, WeightLayout
from pyggml.errors import DeviceError, OutOfMemoryError
from pyggml.loop import loop_of
from pyggml.node import Node
from pyggml.spec import Spec


class NullDevice:
    """A device of the null backend.

    denied  names of ops that it refuses, on top of NumPy's refusals
    limit   bytes that it has; None for as many as the host has
    """

    name = "null"

    def __init__(self, index: int) -> None:
        self.place = self.device = f"null:{index}"
        self.host = backends.get("numpy")
        self.alignment, self.staging_bytes = self.host.alignment, 0
        self.denied: frozenset[str] = frozenset()
        self.limit: int | None = None
        self._blocks: WeakSet[NullBuffer] = WeakSet()  # a sum beside them could fall behind them
        self.queue = Queue()
        self.lock = RLock()

    @contextmanager
    def denying(self, *ops: str) -> Iterator[None]:
        """Inside the context the device refuses these ops too."""
        before, self.denied = self.denied, self.denied | frozenset(ops)
        try:
            yield
        finally:
            self.denied = before

    def supports(self, node: Node) -> str | None:
        if node.op.name in self.denied:
            return f"{node.op.name} is on the deny list"
        return self.host.supports(node)

    def numeric(self, node: Node) -> str:
        return self.host.numeric(node)

    def weight_layout(self, constant: Node, uses: Collection[Node]) -> WeightLayout:
        """The private layout, but for weights of which somebody reads a part."""
        whole = all(user.op.view is None and loop_of(user) is None for user in uses)
        if not uses or not whole:
            return WeightLayout(constant.spec.nbytes)
        return WeightLayout(HEADER + constant.spec.nbytes, PRIVATE)

    def lower(
        self,
        nodes: Sequence[Node],
        keep: Collection[Node],
        layouts: Mapping[Node, WeightLayout],
        *,
        fuse: bool = True,
    ) -> list[Step]:
        """NumPy's steps, with scratch for the weights that a step must see plain."""
        return [
            replace(step, scratch=step.scratch + room_for_weights(step, layouts))
            for step in self.host.lower(nodes, keep, layouts, fuse=fuse)
        ]

    # -- the runtime half ---------------------------------------------------------------------

    @property
    def allocated(self) -> int:
        """Bytes taken and not given back."""
        return sum(len(block.data) for block in self._blocks)

    def alloc(self, nbytes: int) -> Buffer:
        if self.limit is not None and self.allocated + nbytes > self.limit:
            raise OutOfMemoryError(
                f"{self.place} has no {nbytes} bytes: {self.allocated} of {self.limit} are taken"
            )
        block = NullBuffer(self.place, self.host.alloc(nbytes))
        self._blocks.add(block)
        return block

    def weight(self, constant: Node, layout: WeightLayout, data: NDArray[Any]) -> Buffer:
        buffer = self.alloc(layout.nbytes)
        self.load(Address(buffer, 0, constant.spec.nb, layout.name), layout.nbytes, data)
        return buffer

    def load(self, at: Address, nbytes: int, data: NDArray[Any]) -> None:
        """Values of a weight, now, in the layout of the address."""
        kept = self.bytes_of(at.buffer)[at.offset : at.offset + nbytes]
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        kept[...] = private(raw) if at.layout == PRIVATE else raw

    def upload(self, at: Address, spec: Spec, array: NDArray[Any]) -> None:
        held, here = array.copy(), self.seen(at)
        self.queue.add(lambda: self.host.upload(here, spec, held))

    def download(self, at: Address, spec: Spec) -> NDArray[Any]:
        self.queue.run_all()
        return self.host.download(self.seen(at), spec)

    def view(self, at: Address, spec: Spec) -> NullArray:
        return NullArray(self, at, spec)

    def given(self, array: object) -> Given | None:
        if not isinstance(array, NullArray) or array.device is not self:
            return None
        found = self.host.given(self.host.view(self.seen(array.at), array.spec))
        assert found is not None
        return replace(found, buffer=array.at.buffer, offset=array.at.offset)

    def fetch(self, source: Address, other: Backend, target: Address, spec: Spec) -> None:
        here = self.seen(target)

        def task() -> None:
            # What is there when the queue gets to it, whether or not somebody waited for it.
            if isinstance(other, NullDevice):
                values = self.host.view(other.seen(source), spec)
            elif other.device == "host":
                values = other.view(source, spec)
            else:
                values = other.download(source, spec)
            self.host.upload(here, spec, values)

        self.queue.add(task)

    def send(self, source: Address, target: Address, spec: Spec) -> Event:
        here = self.seen(source)
        held: list[
            NDArray[Any]
        ] = []  # as on a GPU: on its way, and where it belongs once waited for
        self.queue.add(lambda: held.append(self.host.download(here, spec)))
        return _Arrival(self.queue.mark(), lambda: self.host.upload(target, spec, held[0]))

    def bind(
        self,
        steps: Sequence[Step],
        at: Mapping[Node, Address],
        scratch: Buffer,
        scratch_at: Sequence[int],
    ) -> NullRunner:
        return NullRunner(self, steps, at, scratch, scratch_at)

    def record(self) -> Event:
        return self.queue.mark()

    def wait_for(self, event: Event) -> None:
        self.queue.add(event.wait)

    def synchronize(self) -> None:
        self.queue.run_all()

    def abandon(self) -> None:
        self.synchronize()

    # -- its memory ---------------------------------------------------------------------------

    def bytes_of(self, buffer: Buffer) -> NDArray[np.uint8]:
        """The bytes of a buffer; DeviceError where it is another device's."""
        if not isinstance(buffer, NullBuffer) or buffer.owner != self.place:
            raise DeviceError(f"{self.place} was given memory that is not its own: {buffer!r}")
        return buffer.data

    def seen(self, at: Address) -> Address:
        """An address of this device as NumPy's kernels see it."""
        return Address(self.bytes_of(at.buffer), at.offset, at.nb, at.layout)

    def unpacked(self, at: Address, into: NDArray[np.uint8]) -> None:
        """A weight that is kept in the private layout, made plain."""
        plain(self.bytes_of(at.buffer)[at.offset :], into)


@dataclass(frozen=True, slots=True)
class NullArray:
    """A tensor where it stands on a null device, which only that device can read in place."""

    device: NullDevice
    at: Address
    spec: Spec

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError(f"memory of {self.device.place} cannot be seen without a copy")
        with self.device.lock:  # it runs the queue, which may be in use for another store
            rows = self.device.download(self.at, self.spec)
        return rows if dtype is None else rows.astype(dtype)


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A copy on its way to the host."""

    queued: Event
    land: Callable[[], None]

    def wait(self) -> None:
        self.queued.wait()
        self.land()

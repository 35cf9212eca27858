"""A null device: the backend protocol on private memory, with a queue that runs late."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from threading import RLock
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from pyggml import backends
from pyggml.backends.base import (
    Arrival,
    Backend,
    Download,
    Event,
    Given,
    Kernels,
    NamesKernels,
    Peers,
    Runner,
    Upload,
    host_values,
)
from pyggml.backends.null.memory import HEADER, PRIVATE, NullBuffer, plain, private
from pyggml.backends.null.queue import Queue
from pyggml.backends.null.runner import NullRunner, Together, weight_scratch
from pyggml.backends.step import (
    Address,
    Addresses,
    Buffer,
    Layouts,
    LoadStep,
    Step,
    WeightLayout,
    joint_step,
)
from pyggml.errors import DeviceError, OutOfMemoryError
from pyggml.loop import loop_of
from pyggml.node import Node
from pyggml.spec import Spec


class NullDevice:
    """A device of the null backend.

    denied  names of ops that it refuses, in addition to those that NumPy refuses
    limit   size of its memory in bytes; None: limited only by the host's
    carries bytes of the largest tensor that a run copies from and to the host by itself; 0: none
    queue   its pending work
    loads   weights of the host that it loads while it does other work
    """

    name = "null"

    def __init__(self, index: int) -> None:
        self.place = self.device = f"null:{index}"
        self.host = backends.get("numpy")
        self.alignment = self.host.alignment
        self.staging_bytes = self.driver_bytes = self.connection_bytes = 0
        self.denied: frozenset[str] = frozenset()
        self.joining = False  # whether it takes collectives together with others
        self.limit: int | None = None
        self.carries = 0
        # Not a running total of bytes: an interrupt could leave that wrong.
        self._blocks: WeakSet[NullBuffer] = WeakSet()
        self.queue, self.loads = Queue(), Queue()
        self.lock = RLock()

    @contextmanager
    def denying(self, *ops: str) -> Iterator[None]:
        """Make the device refuse these ops too inside the context."""
        before, self.denied = self.denied, self.denied | frozenset(ops)
        try:
            yield
        finally:
            self.denied = before

    def supports(self, node: Node) -> str | None:
        if node.op.name in self.denied:
            return f"{node.op.name} is on the deny list"
        return self.host.supports(node)

    def lends_from(self, node: Node) -> int:
        return 0  # only the host lends

    def joins(self, node: Node) -> bool:
        return self.joining

    def box_bytes(self, count: int) -> int:
        return 0

    def sends(self) -> bool:
        return self.joining

    def numeric(self, node: Node) -> str:
        return self.host.numeric(node)

    def weight_layout(self, constant: Node, uses: Collection[Node]) -> WeightLayout:
        """The private layout if every use reads the whole weight, else plain."""
        whole = all(
            user.op.view is None and loop_of(user) is None and not user.op.joint for user in uses
        )
        if not uses or not whole:
            return WeightLayout(constant.spec.nbytes)
        return WeightLayout(HEADER + constant.spec.nbytes, PRIVATE)

    def borrows(self, constant: Node, lent: WeightLayout, own: WeightLayout) -> bool:
        return True  # loads read the constant's values, however the host keeps it

    def lower(
        self, nodes: Sequence[Node], keep: Collection[Node], layouts: Layouts, *, fuse: bool = True
    ) -> list[Step]:
        """NumPy's steps, with scratch for plain copies of private weights."""
        steps: list[Step] = []
        for joint, part in groupby(nodes, lambda node: node.op.joint):
            if joint:
                steps += [joint_step(node) for node in part]
                continue
            steps += [
                replace(step, scratch=step.scratch + weight_scratch(step, layouts))
                for step in self.host.lower([*part], keep, layouts, fuse=fuse)
            ]
        return steps

    def kernels_of(self, step: Step, at: Addresses, scratch: int) -> Kernels:
        """NumPy's."""
        if isinstance(step, LoadStep):
            return Kernels(("load",))
        if step.node.op.joint:
            return Kernels((step.node.op.name,))
        assert isinstance(self.host, NamesKernels)
        return self.host.kernels_of(step, at, scratch)

    # -- the runtime half ---------------------------------------------------------------------

    @property
    def allocated(self) -> int:
        """Bytes in use."""
        return sum(len(block.data) for block in self._blocks)

    def alloc(self, nbytes: int) -> Buffer:
        if self.limit is not None and self.allocated + nbytes > self.limit:
            raise OutOfMemoryError(
                f"{self.place} cannot allocate {nbytes} bytes: {self.allocated} of {self.limit} "
                "are in use"
            )
        block = NullBuffer(self.place, self.host.alloc(nbytes))
        self._blocks.add(block)
        return block

    def adjacent(self, sizes: Sequence[int]) -> AbstractContextManager[object]:
        return nullcontext()

    def weight(self, constant: Node, layout: WeightLayout, data: NDArray[Any]) -> Buffer:
        buffer = self.alloc(layout.nbytes)
        self.load(Address(buffer, 0, constant.spec.nb, layout.name), layout.nbytes, data)
        return buffer

    def load(self, at: Address, nbytes: int, data: NDArray[Any]) -> None:
        """Write a weight in the layout of its address, without using the queue."""
        target = self.bytes_of(at.buffer)[at.offset : at.offset + nbytes]
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        target[...] = private(raw) if at.layout == PRIVATE else raw

    def upload(self, at: Address, spec: Spec, array: NDArray[Any]) -> None:
        values, here = array.copy(), self.on_host(at)
        self.queue.add(lambda: self.host.upload(here, spec, values))

    def download(self, at: Address, spec: Spec) -> NDArray[Any]:
        self.queue.run_all()
        return self.host.download(self.on_host(at), spec)

    def uploads(self, tensors: Sequence[tuple[Address, Spec]]) -> Upload:
        def upload(arrays: Sequence[NDArray[Any]]) -> None:
            for (at, spec), array in zip(tensors, arrays):
                self.upload(at, spec, array)

        return upload

    def downloads(self, at: Address, spec: Spec) -> Download:
        here = self.on_host(at)

        def download() -> Arrival:
            copies: list[NDArray[Any]] = []
            self.queue.add(lambda: copies.append(self.host.download(here, spec)))
            mark = self.queue.mark()

            def arrival() -> NDArray[Any]:
                mark.wait()
                return copies[0]

            return arrival

        return download

    def view(self, at: Address, spec: Spec) -> NullArray:
        return NullArray(self, at, spec)

    def given(self, array: object) -> Given | None:
        if not isinstance(array, NullArray) or array.device is not self:
            return None
        description = self.host.given(self.host.view(self.on_host(array.at), array.spec))
        assert description is not None
        return replace(description, buffer=array.at.buffer, offset=array.at.offset)

    def fetch(self, source: Address, other: Backend, target: Address, spec: Spec) -> None:
        here = self.on_host(target)

        def task() -> None:
            # Reads the current values even if the other device is not done: a missing wait shows.
            if isinstance(other, NullDevice):
                values = self.host.view(other.on_host(source), spec)
            else:
                values = host_values(other, source, spec)
            self.host.upload(here, spec, values)

        self.queue.add(task)

    def send(self, source: Address, target: Address, spec: Spec) -> Event:
        here = self.on_host(source)
        copies: list[NDArray[Any]] = []  # as on a GPU, the copy reaches `target` only in a wait
        self.queue.add(lambda: copies.append(self.host.download(here, spec)))
        return _Arrival(self.queue.mark(), lambda: self.host.upload(target, spec, copies[0]))

    def connect(self, devices: Sequence[Backend], index: int | None, peers: Peers | None) -> None:
        """Nothing: all devices are in this process, also those of ranks that are threads."""

    def together(self, runners: Sequence[Runner]) -> Runner:
        return Together([r for r in runners if isinstance(r, NullRunner)])

    def bind(
        self, steps: Sequence[Step], at: Addresses, scratch: Buffer, scratch_at: Sequence[int]
    ) -> NullRunner:
        return NullRunner(self, steps, at, scratch, scratch_at)

    def record(self) -> Event:
        return self.queue.mark()

    def wait_for(self, event: Event) -> None:
        self.queue.add(event.wait)

    def synchronize(self) -> None:
        self.queue.run_all()

    def abandon(self) -> None:
        try:
            self.synchronize()
        finally:
            self.loads.run_all()

    # -- memory -------------------------------------------------------------------------------

    def bytes_of(self, buffer: Buffer) -> NDArray[np.uint8]:
        """The bytes of a buffer; DeviceError if it belongs to another device."""
        if not isinstance(buffer, NullBuffer) or buffer.owner != self.place:
            raise DeviceError(f"{self.place} cannot use memory of another device: {buffer!r}")
        return buffer.data

    def on_host(self, at: Address) -> Address:
        """The same address for NumPy's kernels."""
        return Address(self.bytes_of(at.buffer), at.offset, at.nb, at.layout)

    def unpack(self, at: Address, out: NDArray[np.uint8]) -> None:
        """Write the plain bytes of a private weight to `out`."""
        plain(self.bytes_of(at.buffer)[at.offset :], out)


@dataclass(frozen=True, slots=True)
class NullArray:
    """A tensor in a null device's memory; `np.asarray` copies it."""

    device: NullDevice
    at: Address
    spec: Spec

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError(f"NumPy cannot read memory of {self.device.place} without a copy")
        with self.device.lock:  # download runs the queue, which another store may be using
            rows = self.device.download(self.at, self.spec)
        return rows if dtype is None else rows.astype(dtype)


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A copy to the host.

    copied  when the device has made the copy
    write   writes it to the host's memory
    """

    copied: Event
    write: Callable[[], None]

    def wait(self) -> None:
        self.copied.wait()
        self.write()

"""The backend object: a planning half that needs no GPU, and one GPU's memory and queue."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, cached_property, partial
from pathlib import Path
from threading import RLock
from typing import Any

from numpy.typing import NDArray

from pyggml.backends.base import (
    Backend,
    Download,
    Event,
    Given,
    Kernels,
    Peers,
    Runner,
    Upload,
    host_values,
)
from pyggml.backends.cuda import lowering, peer_sum, table
from pyggml.backends.cuda.device import arrays, boxes, memory, nccl, pinned, prepared
from pyggml.backends.cuda.device.context import Context, context
from pyggml.backends.cuda.device.cublas import Cublas
from pyggml.backends.cuda.device.driver import guarded
from pyggml.backends.cuda.device.registered import Registry
from pyggml.backends.cuda.gpu import H200
from pyggml.backends.cuda.naming import kernels_of
from pyggml.backends.cuda.recording import record_step
from pyggml.backends.cuda.runner import CudaRunner
from pyggml.backends.cuda.together import Together
from pyggml.backends.cuda.weights import loading, packing
from pyggml.backends.cuda.weights.borrowing import Borrowing, borrow
from pyggml.backends.cuda.whole import Whole, WholeTogether
from pyggml.backends.host_tiles import LAYOUT
from pyggml.backends.step import Address, Addresses, Buffer, Layouts, LoadStep, Step, WeightLayout
from pyggml.node import Node
from pyggml.spec import Spec
from pyggml.transfer import origin

# Importing a module registers its kernels.
for _module in pkgutil.walk_packages([str(Path(__file__).parent)], "pyggml.backends.cuda."):
    if _module.name != "pyggml.backends.cuda.backend":
        importlib.import_module(_module.name)


class CudaBackend:
    """One GPU: pyggml's kernels, compiled for it on first use, and cuBLAS.

    index    of its place
    ordinal  of the GPU on this machine: the same, unless several machines share the places
             (`Ranks.adopt`)
    """

    name = "cuda"
    alignment = table.ALIGNMENT
    staging_bytes = pinned.PINNED
    driver_bytes = table.DRIVER_BYTES
    connection_bytes = nccl.CONNECTION

    def __init__(self, index: int) -> None:
        self.index = self.ordinal = index
        self.place = self.device = f"cuda:{index}"
        self.lock = RLock()
        self._running = guarded(f"running on {self.place}")
        self._peers: set[int] = set()  # GPUs whose memory this one may access

    def __repr__(self) -> str:
        return f"<backend {self.place}>"

    # -- the pure half: no GPU, no pycuda -----------------------------------------------------

    def supports(self, node: Node) -> str | None:
        return table.KERNELS.refusal(node)

    def lends_from(self, node: Node) -> int:
        return 0  # only the host lends

    def joins(self, node: Node) -> bool:
        return nccl.enabled() and table.KERNELS.refusal(node) is None

    def sends(self) -> bool:
        return nccl.enabled()

    def box_bytes(self, count: int) -> int:
        return peer_sum.box_bytes(count) if boxes.wanted() else 0

    def numeric(self, node: Node) -> str:
        return table.KERNELS.numeric(node)

    def weight_layout(self, constant: Node, uses: Collection[Node]) -> WeightLayout:
        return packing.layout_of(constant, uses)

    def borrows(self, constant: Node, lent: WeightLayout, own: WeightLayout) -> bool:
        if lent.name != LAYOUT:
            return lent.name == "plain"
        return own.name == "tiles8" and loading.can_pack(constant.dtype, constant.ne, lent.name)

    def lower(
        self, nodes: Sequence[Node], keep: Collection[Node], layouts: Layouts, *, fuse: bool = True
    ) -> list[Step]:
        return lowering.lower(nodes, keep, fuse, layouts)

    def kernels_of(self, step: Step, at: Addresses, scratch: int) -> Kernels:
        """For the GPU if it has been opened, else for an H200."""
        if isinstance(step, LoadStep):
            return Kernels(("load",))
        about = self.context.about if "context" in vars(self) else H200
        memory = (scratch, step.scratch)
        return kernels_of(step, record_step(step, at, memory, about, names_only=True))

    # -- the runtime half ---------------------------------------------------------------------

    @cached_property
    def context(self) -> Context:
        """The GPU, opened on first use."""
        return context(self.ordinal)

    @cached_property
    def staging(self) -> pinned.Staging:
        return pinned.Staging(self.context)

    @cached_property
    def registry(self) -> Registry:
        return Registry(self.context)

    @cached_property
    def cublas(self) -> Cublas:
        return Cublas(self.context)

    def alloc(self, nbytes: int) -> memory.Buffer:
        with self.context:
            return memory.Buffer(self.context, nbytes)

    @contextmanager
    def adjacent(self, sizes: Sequence[int]) -> Iterator[None]:
        with self.context:
            self.context.room = memory.room_for(self.context, sizes)
        try:
            yield
        finally:
            self.context.room = None

    def weight(self, constant: Node, layout: WeightLayout, data: NDArray[Any]) -> memory.Buffer:
        with self.context:
            buffer = memory.Buffer(self.context, layout.nbytes)
            loading.load(self.context, self.staging, buffer.ptr, constant, layout, data)
        return buffer

    def upload(self, at: Address, spec: Spec, array: NDArray[Any]) -> None:
        with self.context:
            pinned.put(self.staging, at, spec, array)

    def download(self, at: Address, spec: Spec) -> NDArray[Any]:
        with self.context:
            return pinned.take(self.staging, at, spec)

    def uploads(self, tensors: Sequence[tuple[Address, Spec]]) -> Upload:
        return prepared.Uploads(self.staging, tensors)

    def downloads(self, at: Address, spec: Spec) -> Download:
        return prepared.Downloads(self.staging, at, spec)

    def view(self, at: Address, spec: Spec) -> arrays.DeviceArray:
        return arrays.DeviceArray(self.context, at, spec, partial(self._read, at, spec))

    def _read(self, at: Address, spec: Spec) -> NDArray[Any]:
        with self.lock:
            return self.download(at, spec)

    def given(self, array: object) -> Given | None:
        if not arrays.on_device(array):
            return None  # without opening the GPU
        with self.context:
            return arrays.given(self.context, array)

    def fetch(self, source: Address, other: Backend, target: Address, spec: Spec) -> None:
        if isinstance(other, CudaBackend) and self._fetch_directly(source, other, target, spec):
            return
        self.upload(target, spec, host_values(other, source, spec))

    def _fetch_directly(
        self, source: Address, other: CudaBackend, target: Address, spec: Spec
    ) -> bool:
        """Copy within a GPU or between two if both tensors are contiguous; returns whether it did.
        The caller orders this queue with the other one: `wait_for` before, `record` after."""
        there, here = memory.operand_at(source, spec), memory.operand_at(target, spec)
        if not (there.contiguous and here.contiguous):
            return False
        mine, theirs = self.context, other.context
        with mine, guarded(f"copying from {other.place} to {self.place}"):
            pair = here.ptr, there.ptr, spec.nbytes
            if other is self:
                mine.driver.memcpy_dtod_async(*pair, mine.stream)
            else:
                self._reach(other)
                mine.copy_from(theirs, *pair)
        return True

    def _reach(self, other: CudaBackend) -> None:
        """Enable direct copies from the other GPU. If that is impossible, or if CuPy or PyTorch has
        enabled it already (also an error), copies work without it."""
        if other.index not in self._peers:
            with suppress(self.context.driver.Error):
                self.context.driver.Context.enable_peer_access(other.context.primary)
            self._peers.add(other.index)

    def send(self, source: Address, target: Address, spec: Spec) -> Event:
        with self.context:
            return pinned.send(self.staging, source, target, spec)

    def connect(self, devices: Sequence[Backend], index: int | None, peers: Peers | None) -> None:
        places = tuple(device.device for device in devices)
        if peers is None:
            contexts = [context(_of_cuda(each).ordinal) for each in devices]
            before = self.context.communicators.get(places)
            if before is None or before.lost:
                ends = nccl.alone(contexts)
                for end, box in zip(ends, boxes.boxes_here(contexts) or ()):
                    end.box = box
                for each, end in zip(contexts, ends):
                    end.places = places
                    each.communicators[places] = end
            return
        id = nccl.shared_id(peers, first=index == 0)
        if index is None:
            boxes.box_of_process(None, None, len(devices), peers)
            return
        self.context.peers = peers
        end = nccl.in_processes(self.context, id, len(devices), index, peers)
        end.places = places
        end.box = boxes.box_of_process(self.context, index, len(devices), peers)
        self.context.communicators[places] = end

    def together(self, runners: Sequence[Runner]) -> Together:
        return Together([runner for runner in runners if isinstance(runner, CudaRunner)])

    def bind(
        self, steps: Sequence[Step], at: Addresses, scratch: Buffer, scratch_at: Sequence[int]
    ) -> CudaRunner:
        with self.context:
            self.staging.prepare()
            loads = {
                step.node: self._borrowing(step, at) for step in steps if isinstance(step, LoadStep)
            }
            return CudaRunner(
                self.context,
                steps,
                at,
                scratch,
                scratch_at,
                loads,
                lambda: self.cublas,
                self.staging,
            )

    def whole(
        self, uploads: Sequence[Upload], runner: Runner, downloads: Sequence[Download]
    ) -> Whole | WholeTogether:
        ins = [each for each in uploads if isinstance(each, prepared.Uploads)]
        outs = [each for each in downloads if isinstance(each, prepared.Downloads)]
        if isinstance(runner, Together):
            return WholeTogether(runner.stagings, ins, runner, outs)
        assert isinstance(runner, CudaRunner)
        return Whole(self.staging, ins, runner, outs, self._running)

    def _borrowing(self, step: LoadStep, at: Addresses) -> Borrowing:
        host, constant = (self.context, self.staging, self.registry), origin(step.node)
        here, lent = at[step.node], at.get(constant)
        ids = None if step.ids is None else memory.operand_at(at[step.ids], step.ids.spec)
        ptr, layout = here.buffer.ptr + here.offset, step.layout
        return borrow(*host, ptr, constant, layout, lent, ids=ids, ahead=step.ahead)

    def record(self) -> Event:
        with self.context, guarded("recording an event"):
            flags = self.context.driver.event_flags
            event = self.context.driver.Event(flags.DISABLE_TIMING)
            return CudaEvent(self.context, event.record(self.context.stream))

    def wait_for(self, event: Event) -> None:
        if isinstance(event, CudaEvent):
            with self.context, guarded("waiting for another device"):
                self.context.stream.wait_for_event(event.raw)
        else:
            event.wait()

    def synchronize(self) -> None:
        with self.context, self._running:
            self.staging.settle()

    def abandon(self) -> None:
        self.staging.forget()
        try:
            self.synchronize()
        finally:
            with self.context:
                self.context.wait_for_loads()


def _of_cuda(backend: Backend) -> CudaBackend:
    assert isinstance(backend, CudaBackend)
    return backend


class CudaEvent:
    """A point in a GPU's queue; `raw` is pycuda's event."""

    def __init__(self, context: Context, raw: Any) -> None:
        self.context, self.raw = context, raw

    def wait(self) -> None:
        with self.context, guarded("waiting for a GPU"):
            self.context.wait(self.raw)


@cache
def device(index: int) -> CudaBackend:
    """The backend on GPU `index`. The GPU is opened on first use; planning does not open it."""
    return CudaBackend(index)

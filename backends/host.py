"""The base of backends in host memory: a subclass adds a name and a kernel table."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.base import (
    Arrival,
    Backend,
    Download,
    Event,
    Given,
    Kernels,
    Upload,
    host_values,
)
from pyggml.backends.host_memory import ALIGNMENT, Packed, allocated, array_at
from pyggml.backends.host_runner import HostRunner, kernels_of
from pyggml.backends.step import (
    Address,
    Addresses,
    Buffer,
    Layouts,
    Step,
    WeightLayout,
)
from pyggml.backends.table import Kernel, KernelTable
from pyggml.node import Node
from pyggml.spec import Spec


class HostBackend:
    """A backend in host memory: one step per node, NumPy arrays as operands.

    A subclass sets `name` and `kernels`. Tensors pass between such backends without a copy.

    index  0, or the number of a part of the host that counts as a device of its own: with `shard=`,
           `numpy:1` is what a second process computes, or stands for it in one process
    """

    name: str
    kernels: KernelTable[Kernel]

    alignment = ALIGNMENT
    lock: AbstractContextManager[object] = nullcontext()  # host stores share nothing
    staging_bytes = driver_bytes = 0

    def __init__(self, index: int = 0) -> None:
        number = f":{index}" if index else ""
        self.place, self.device = f"{self.name}{number}", f"host{number}"

    def supports(self, node: Node) -> str | None:
        return self.kernels.refusal(node)

    def lends_from(self, node: Node) -> int:
        return 32  # as in llama.cpp

    def numeric(self, node: Node) -> str:
        return self.kernels.numeric(node)

    def weight_layout(self, constant: Node, uses: Collection[Node]) -> WeightLayout:
        return WeightLayout(constant.spec.nbytes)

    def borrows(self, constant: Node, lent: WeightLayout, own: WeightLayout) -> bool:
        return lent.name == "plain"

    def lower(
        self, nodes: Sequence[Node], keep: Collection[Node], layouts: Layouts, *, fuse: bool = True
    ) -> list[Step]:
        return [self.kernels.step(node, Step) for node in nodes]

    def kernels_of(self, step: Step, at: Addresses, scratch: int) -> Kernels:
        return kernels_of(self.name, self.kernels, step)

    # -- the runtime half ---------------------------------------------------------------------

    def alloc(self, nbytes: int) -> Buffer:
        return allocated(nbytes)

    def adjacent(self, sizes: Sequence[int]) -> AbstractContextManager[object]:
        return nullcontext()

    def weight(self, constant: Node, layout: WeightLayout, data: NDArray[Any]) -> Buffer:
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8)

    def upload(self, at: Address, spec: Spec, array: NDArray[Any]) -> None:
        self.uploads([(at, spec)])([array])

    def uploads(self, tensors: Sequence[tuple[Address, Spec]]) -> Upload:
        places = [array_at(at, spec) for at, spec in tensors]
        targets = [place.raw if isinstance(place, Packed) else place for place in places]

        def upload(arrays: Sequence[NDArray[Any]]) -> None:
            for target, array in zip(targets, arrays):
                target[...] = array.reshape(target.shape)

        return upload

    def download(self, at: Address, spec: Spec) -> NDArray[Any]:
        return self.view(at, spec).copy()

    def downloads(self, at: Address, spec: Spec) -> Download:
        view = self.view(at, spec)

        def download() -> Arrival:
            copy = view.copy()
            return lambda: copy

        return download

    def view(self, at: Address, spec: Spec) -> NDArray[Any]:
        array = array_at(at, spec)
        rows = array.raw.reshape(*array.raw.shape[:3], -1) if isinstance(array, Packed) else array
        view = rows.reshape(*spec.shape[:-1], rows.shape[-1])
        view.flags.writeable = False
        return view

    def given(self, array: object) -> Given | None:
        if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
            return None
        array = np.asarray(array)  # a subclass may index its memory differently
        dtype, contiguous = array.dtype, bool(array.flags.c_contiguous)
        return Given(
            buffer=array.reshape(-1).view(np.uint8) if contiguous and dtype.kind in "fiu" else None,
            offset=0,
            address=array.ctypes.data,
            alignment=dtype.alignment,
            shape=array.shape,
            type=dtype.name if dtype.isnative else dtype.str,
            contiguous=contiguous,
            ready=lambda: None,
        )

    def fetch(self, source: Address, other: Backend, target: Address, spec: Spec) -> None:
        self.upload(target, spec, host_values(other, source, spec))

    def send(self, source: Address, target: Address, spec: Spec) -> Event:
        self.upload(target, spec, self.view(source, spec))
        return _DONE

    def bind(
        self, steps: Sequence[Step], at: Addresses, scratch: Buffer, scratch_at: Sequence[int]
    ) -> HostRunner:
        return HostRunner(self.name, self.kernels, steps, at, scratch, scratch_at)

    def record(self) -> Event:
        return _DONE

    def wait_for(self, event: Event) -> None:
        event.wait()

    def synchronize(self) -> None:
        return None

    def abandon(self) -> None:
        return None


class _Done:
    """An event of the host, whose queue is the calling thread: it has always happened."""

    def wait(self) -> None:
        return None


_DONE = _Done()

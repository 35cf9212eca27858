"""The backend object: one node is one step, memory is bytes of the host."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.base import (
    Address,
    Backend,
    Buffer,
    Event,
    Given,
    Step,
    WeightLayout,
    no_kernel,
    wrong_type,
)
from pyggml.backends.numpy.runner import NumpyRunner, array_at
from pyggml.backends.numpy.table import ALIGNMENT, KERNELS, Packed
from pyggml.errors import OutOfMemoryError
from pyggml.node import Node, Spec

# Every family of kernels registers itself.
for _found in pkgutil.iter_modules([str(Path(__file__).parent)]):
    if _found.name != "backend":
        importlib.import_module(f"pyggml.backends.numpy.{_found.name}")


class NumpyBackend:
    """Kernels in NumPy on the host's memory."""

    name = place = "numpy"
    device = "host"
    alignment = ALIGNMENT
    lock = nullcontext()  # stores share nothing here
    staging_bytes = 0

    def supports(self, node: Node) -> str | None:
        found = KERNELS.get(node.op)
        if found is None:
            return no_kernel(node.op, KERNELS)
        return wrong_type(node, found.types) or found.refuses(node)

    def numeric(self, node: Node) -> str:
        return "f32"

    def weight_layout(self, constant: Node, uses: Collection[Node]) -> WeightLayout:
        return WeightLayout(constant.spec.nbytes)

    def lower(
        self,
        nodes: Sequence[Node],
        keep: Collection[Node],
        layouts: Mapping[Node, WeightLayout],
    ) -> list[Step]:
        return [_step(node) for node in nodes]

    # -- the runtime half ---------------------------------------------------------------------

    def alloc(self, nbytes: int) -> Buffer:
        try:
            raw = np.zeros(nbytes + ALIGNMENT, np.uint8)
        except (MemoryError, ValueError) as error:
            raise OutOfMemoryError(f"the host has no {nbytes} bytes: {error}") from None
        skip = -raw.ctypes.data % ALIGNMENT
        return raw[skip : skip + nbytes]

    def weight(self, constant: Node, layout: WeightLayout, data: NDArray[Any]) -> Buffer:
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8)

    def upload(self, at: Address, spec: Spec, array: NDArray[Any]) -> None:
        target = array_at(at, spec)
        raw = target.raw if isinstance(target, Packed) else target
        raw[...] = array.reshape(raw.shape)

    def download(self, at: Address, spec: Spec) -> NDArray[Any]:
        return self.view(at, spec).copy()

    def view(self, at: Address, spec: Spec) -> NDArray[Any]:
        found = array_at(at, spec)
        if isinstance(found, Packed):
            rows = found.raw.reshape(*found.raw.shape[:3], -1)
        else:
            rows = found
        view = rows.reshape(*spec.shape[:-1], rows.shape[-1])
        view.flags.writeable = False
        return view

    def given(self, array: object) -> Given | None:
        if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
            return None
        array = np.asarray(array)  # a class of its own may look at memory in its own way
        kind, contiguous = array.dtype, bool(array.flags.c_contiguous)
        return Given(
            buffer=array.reshape(-1).view(np.uint8) if contiguous and kind.kind in "fiu" else None,
            offset=0,
            address=array.ctypes.data,
            alignment=kind.alignment,
            shape=array.shape,
            type=kind.name if kind.isnative else kind.str,
            contiguous=contiguous,
            ready=lambda: None,
        )

    def fetch(self, source: Address, other: Backend, target: Address, spec: Spec) -> None:
        here = other.view(source, spec) if other.device == "host" else other.download(source, spec)
        self.upload(target, spec, here)

    def send(self, source: Address, target: Address, spec: Spec) -> Event:
        self.upload(target, spec, self.view(source, spec))
        return _DONE

    def bind(
        self,
        steps: Sequence[Step],
        at: Mapping[Node, Address],
        scratch: Buffer,
        scratch_at: Sequence[int],
    ) -> NumpyRunner:
        return NumpyRunner(steps, at, scratch, scratch_at)

    def record(self) -> Event:
        return _DONE

    def wait_for(self, event: Event) -> None:
        event.wait()

    def synchronize(self) -> None:
        return None

    def abandon(self) -> None:
        return None


class _Done:
    """The host's queue is the calling thread: everything in it is done."""

    def wait(self) -> None:
        return None


_DONE = _Done()


def _step(node: Node) -> Step:
    row = KERNELS[node.op]
    reads = tuple(s for s in node.src if s is not None)
    inplace = [node.src[i] for i in row.inplace if i < len(node.src)]
    return Step(
        node,
        (node,),
        reads,
        scratch=row.scratch(node) if row.scratch is not None else 0,
        inplace=tuple(s for s in inplace if s is not None),
    )

"""Copies that are prepared once and queued in many runs: a plan's inputs and outputs.

A decode step has two inputs of four bytes. The store places a plan's inputs side by side, so one
copy fills them all. Two designs lost: a kernel that scatters a block of inputs to their tensors is
one launch more in each run, and memory of the host that the kernels read themselves would make
every kernel that reads a position wait for PCIe. Where the GPU would wait for the call that queues
the copy, the launch is shorter (cuda/direct.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.base import Arrival, Event
from pyggml.backends.cuda.device import pinned
from pyggml.backends.cuda.device.memory import operand_at
from pyggml.backends.cuda.device.parts import Part
from pyggml.backends.cuda.device.pinned import Staging
from pyggml.backends.cuda.device.results import LEAST, MOST, array_in
from pyggml.backends.cuda.table import ALIGNMENT
from pyggml.backends.step import Address
from pyggml.spec import Spec

Tensor = tuple[Address, Spec]


@dataclass(slots=True)
class Group:
    """Tensors side by side: their first address, the bytes from there to the end of the last, and
    for each the number of its array, its offset and its size."""

    ptr: int
    nbytes: int
    pieces: list[tuple[int, int, int]]


class Uploads:
    """Uploads to these tensors, in one copy for each group of tensors that are side by side.

    In between is only what the alignment of a tensor leaves free.
    """

    def __init__(self, staging: Staging, tensors: Sequence[Tensor]) -> None:
        self._staging, self.context = staging, staging.context
        self.groups, self.others = _grouped(tensors)

    def __call__(self, arrays: Sequence[NDArray[Any]]) -> None:
        with self._staging.context:
            self.queue(arrays)

    def queue(self, arrays: Sequence[NDArray[Any]]) -> None:
        """The call, with the context current."""
        staging = self._staging
        for group in self.groups:
            staging.gather(group.ptr, group.nbytes, group.pieces, arrays)
        for number, (at, spec) in self.others:
            pinned.put(staging, at, spec, arrays[number])


def _grouped(tensors: Sequence[Tensor]) -> tuple[list[Group], list[tuple[int, Tensor]]]:
    """The groups of tensors that are side by side, and the tensors that need their own copies."""
    groups: list[Group] = []
    others: list[tuple[int, Tensor]] = []
    buffer: Any = None
    for number, (at, spec) in sorted(enumerate(tensors), key=lambda each: _pointer(each[1])):
        target = operand_at(at, spec)
        if not target.contiguous or spec.nbytes > pinned.PART:
            others.append((number, (at, spec)))
            continue
        last = groups[-1] if groups and buffer is at.buffer else None
        buffer = at.buffer
        if last is not None:
            start = target.ptr - last.ptr
            nbytes = start + spec.nbytes
            if 0 <= start - last.nbytes < ALIGNMENT and nbytes <= pinned.PART:
                last.pieces.append((number, start, spec.nbytes))
                last.nbytes = nbytes
                continue
        groups.append(Group(target.ptr, spec.nbytes, [(number, 0, spec.nbytes)]))
    return groups, others


def _pointer(tensor: Tensor) -> int:
    at, _ = tensor
    return int(at.buffer.ptr) + at.offset


class Downloads:
    """Downloads of a tensor.

    ptr     its address; None if it has gaps
    nbytes  its size
    stays   whether its copies stay in pinned memory, if there is room
    """

    def __init__(self, staging: Staging, at: Address, spec: Spec) -> None:
        self.staging = self._staging = staging
        self._at, self._spec = at, spec
        source = operand_at(at, spec)
        self.ptr = source.ptr if source.contiguous else None
        self.nbytes = spec.nbytes
        self.stays = self.ptr is not None and LEAST <= spec.nbytes <= MOST
        self._type, self._shape = pinned.form(spec)

    def within(self, part: Part) -> NDArray[Any]:
        """The tensor, if a kernel writes it to this part."""
        return array_in(part, self._type, self._shape)

    def __call__(self) -> Arrival:
        with self._staging.context:
            return self.queue()

    def queue(self, *, marked: bool = True) -> Arrival:
        """The call, with the context current. Without a mark, wait for all queued work before the
        arrival."""
        staging = self._staging
        if self.ptr is None:  # rare: it is put together on the host, so this waits
            copy = pinned.take(staging, self._at, self._spec)
            return lambda: copy
        if self.stays:
            staging.prepare()
            assert staging.results is not None
            array = staging.results.receive(self.ptr, self.nbytes, self._type, self._shape)
            if array is not None:
                mark = staging.mark() if marked else None
                return partial(_arrived, array, mark)
        flat = np.empty(self.nbytes, np.uint8)
        array = flat.view(self._type).reshape(self._shape)
        return partial(_arrived, array, staging.receive(flat, self.ptr, own=True))


def _arrived(array: NDArray[Any], copy: Event | None) -> NDArray[Any]:
    if copy is not None:
        copy.wait()
    return array

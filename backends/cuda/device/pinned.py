"""Copies between a GPU and the host through pinned memory, for tensors with any strides."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any
from weakref import ref

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from pyggml.backends.cuda.device.context import Context
from pyggml.backends.cuda.device.driver import guarded
from pyggml.backends.cuda.device.filling import MOST_THREADS, Filling
from pyggml.backends.cuda.device.memory import operand_at
from pyggml.backends.cuda.device.parts import Parts
from pyggml.backends.cuda.device.results import ROOM, Results
from pyggml.backends.cuda.launch import Operand
from pyggml.backends.processors import n_processors
from pyggml.backends.step import Address
from pyggml.errors import OutOfMemoryError
from pyggml.spec import Ne, Spec

Bytes = NDArray[np.uint8]

#: Bytes of a cell, which holds a small upload, and the number of cells.
CELL, CELLS = 1024, 256
#: Bytes for small tensors that cross in every run (relay.py), and the unit in which they are handed
#: out. 27 layers of DeepSeek-V2-Lite take 0.4 MiB for each plan of one token.
MAIL, MAIL_GRAIN = 8 << 20, 256
#: Bytes of pinned memory that other copies pass through; the most bytes of one part of it; the
#: alignment of a part, which limits the number of events.
RING, PART, GRAIN = (16 << 20) - CELL * CELLS, 4 << 20, 64 << 10
#: Bytes of pinned memory per GPU.
PINNED = RING + ROOM + MAIL + CELL * CELLS

_UPLOADING = guarded("uploading")
#: Up to this many bytes, an array is copied as a bytes object.
_FEW = 4096


class Staging:
    """A ring of pinned memory between a GPU and the host: copies are queued, and a part is reused
    once its copy is complete.

    It takes `PINNED` bytes of host memory per GPU, allocated by the first copy or plan and then
    kept: the ring, `results.ROOM` for results that stay in pinned memory, `MAIL` for small
    tensors that cross in every run, and cells for small uploads. Cells have no events and no list,
    because a decode step waits until its inputs are on their way: one is free again after the next
    `settle`.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self._ring: Bytes | None = None
        self.results: Results | None = None
        self.mail: Parts | None = None
        self._end = 0  # of all parts so far, as if the ring had no end
        self._settled = 0  # copies of parts before this point are complete
        self._cells: Bytes | None = None
        self._used = self._free = 0  # cells used so far; those before this one are free again
        self._flying: deque[_Flying] = deque()
        self._events: list[Any] = []
        # Starts its threads when there is work. They stay, because there are many weights.
        self._pool = ThreadPoolExecutor(min(n_processors(), MOST_THREADS), "pyggml-load")

    def prepare(self) -> None:
        """Allocate the ring. `bind` calls this, so that no run has to allocate."""
        if self._ring is not None:
            return
        try:
            with guarded("allocating"):
                memory = self.context.driver.pagelocked_empty(PINNED, np.uint8)
        except OutOfMemoryError:
            raise OutOfMemoryError(
                f"the host cannot pin {PINNED:,} bytes of memory, which copies to and from "
                f"cuda:{self.context.index} need; check `ulimit -l` and other processes"
            ) from None
        self.results = Results(self.context, memory[RING:][:ROOM])
        self.mail = Parts(memory[RING + ROOM :][:MAIL], MAIL_GRAIN)
        self._cells = memory[RING + ROOM + MAIL :]
        self._ring = memory[:RING]

    def settle(self) -> None:
        """Wait for all queued work. Parts in use so far need no waits of their own."""
        end, used = self._end, self._used
        self.context.wait(self.context.stream)
        self._settled, self._free = end, used

    def is_settled(self, start: int) -> bool:
        """Whether the copy of the part at `start` was queued before the last `settle`."""
        return start < self._settled

    def gather(
        self,
        ptr: int,
        nbytes: int,
        pieces: Iterable[tuple[int, int, int]],
        arrays: Sequence[NDArray[Any]],
    ) -> None:
        """Queue one copy of several arrays to a device address; at most `PART` bytes. Gaps are
        overwritten.

        pieces  the number of each array, its offset and its size
        """
        flying, part = (None, self._cell(nbytes)) if nbytes <= CELL else self._part(nbytes)
        view = part.data
        for number, start, size in pieces:
            array, end = arrays[number], start + size
            if size <= _FEW:  # a fourth of the time that NumPy's assignment takes
                view[start:end] = array.tobytes()
            else:
                part[start:end] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        with _UPLOADING:
            self.context.driver.memcpy_htod_async(ptr, part, self.context.stream)
            if flying is not None:
                flying.record()

    def _cell(self, nbytes: int) -> Bytes:
        """The next cell. It counts as used before its copy is queued, like a part (`_part`)."""
        if self._cells is None:
            self.prepare()
        assert self._cells is not None
        if self._used - self._free >= CELLS:  # many submitted runs, and no wait for all of them
            with guarded("uploading"):
                self.settle()
        start = self._used % CELLS * CELL
        self._used += 1
        return self._cells[start : start + nbytes]

    def upload(self, ptr: int, data: Bytes) -> None:
        """Queue a copy of flat bytes to a device address. After it returns, `data` may change."""
        for start in range(0, len(data), PART):
            chunk = data[start : start + PART]
            flying, part = self._part(len(chunk))
            part[:] = chunk
            with _UPLOADING:
                self.context.driver.memcpy_htod_async(ptr + start, part, self.context.stream)
                flying.record()

    def stream(self, pieces: Iterable[tuple[Bytes, Callable[[Bytes], None]]]) -> None:
        """Let the device read pieces of at most `PART` bytes in pinned memory, in order. For each,
        `queue` of (data, queue) is called with a copy of the data, to queue work that reads it.

        Threads fill the ring while the device reads earlier pieces, so that neither waits for pages
        that must come from a file. After it returns, the data may change.
        """
        ahead: deque[tuple[_Flying, Filling, Callable[[Bytes], None]]] = deque()
        for data, queue in pieces:
            # Leave room for a gap at the end of the ring and for parts that the device reads.
            while ahead and self._end + 2 * len(data) - ahead[0][0].start > RING - PART:
                self._queue(*ahead.popleft())
            flying, part = self._part(len(data))
            flying.filling = filling = Filling(part, data)
            if ahead:  # the first one is left to this thread, and often the only one
                self._pool.submit(filling.run)
            ahead.append((flying, filling, queue))
        while ahead:
            self._queue(*ahead.popleft())

    def _queue(self, flying: _Flying, filling: Filling, queue: Callable[[Bytes], None]) -> None:
        filling.run()
        with guarded("uploading"):
            queue(filling.part)
            flying.record()

    def receive(self, data: Bytes, ptr: int, *, own: bool = False) -> Arrival:
        """Queue a copy from a device address. `data` may be written to at any time from now on, and
        is complete once the arrival has been waited for.

        own  `data` has no other use: `forget` keeps the copy
        """
        landings = []
        for start in range(0, len(data), PART):
            chunk = data[start : start + PART]
            flying, part = self._part(len(chunk))
            landings.append(_Landing(flying, part, chunk, own))
            flying.landing = ref(landings[-1])
            with guarded("downloading"):
                self.context.driver.memcpy_dtoh_async(part, ptr + start, self.context.stream)
                flying.record()
        return Arrival(landings)

    def mark(self) -> _Flying:
        """The current end of the queue, to wait for. It takes the least part of the ring."""
        flying, _ = self._part(GRAIN)
        with guarded("downloading"):
            flying.record()
        return flying

    def download(self, data: Bytes, ptr: int) -> None:
        """Copy flat bytes from a device address; waits for them, and for all work queued before."""
        self.receive(data, ptr).wait()

    def forget(self) -> None:
        """Drop the copies to the host that nobody has waited for, unless their memory has no other
        use."""
        for flying in self._flying:
            landing = flying.landing() if flying.landing is not None else None
            if landing is not None and not landing.own:
                landing.forget()

    def _part(self, nbytes: int) -> tuple[_Flying, Bytes]:
        """The next free bytes of the ring, and their entry in the list of parts in use.

        They are listed before any copy is queued: an interrupt can end this at any line, and a
        part that a copy still reads must never be handed out again.
        """
        self.prepare()
        driver = self.context.driver
        assert self._ring is not None
        start = self._end
        if start % RING + nbytes > RING:  # a part does not wrap around
            start += -start % RING
        self._end = start + -(-nbytes // GRAIN) * GRAIN
        while self._flying and self._flying[0].start < self._end - RING:
            event = self._flying[0].landed()
            self._flying.popleft()
            self._events.append(event)
        if not self._events:
            with guarded("making an event"):
                self._events.append(driver.Event(driver.event_flags.DISABLE_TIMING))
        flying = _Flying(self, start, self._events.pop())
        self._flying.append(flying)
        start %= RING
        return flying, self._ring[start : start + nbytes]


@dataclass(slots=True)
class _Flying:
    """A part of the ring in use, at `start`. It refers to its landing weakly: if nobody waits for
    the landing any more, its target may have another use, and the bytes are dropped.

    recorded  whether the event follows the copy in the stream; until then `wait` waits for the
              whole stream
    filling   the data that a thread writes to the part
    """

    staging: Staging
    start: int
    event: Any
    landing: ref[_Landing] | None = None
    filling: Filling | None = None
    recorded: bool = False

    def record(self) -> None:
        """Record the event after the copy has been queued."""
        self.event.record(self.staging.context.stream)
        self.recorded = True

    def wait(self) -> None:
        """Wait until the copy is complete."""
        if self.staging.is_settled(self.start):
            return
        context = self.staging.context
        with context, guarded("waiting for a copy"):
            context.wait(self.event if self.recorded else context.stream)

    def landed(self) -> Any:
        """The event, for reuse; waits until the copy is complete and the part no longer needed."""
        if self.filling is not None:  # after an interrupt, a thread may still be copying
            self.filling.drop()
        self.wait()
        landing = self.landing() if self.landing is not None else None
        if landing is not None:
            landing.wait()
        return self.event


class _Landing:
    """Bytes on their way into the ring, and their target on the host.

    own  the target has no other use
    """

    def __init__(self, flying: _Flying, part: Bytes, data: Bytes, own: bool) -> None:
        self._flying, self._part, self.own = flying, part, own
        self._data: Bytes | None = data

    def wait(self) -> None:
        if self._data is not None:
            self._flying.wait()
            self._data[:] = self._part
            self._data = None

    def forget(self) -> None:
        self._data = None


class Arrival:
    """A copy on its way to the host, complete once it has been waited for; an `Event`."""

    def __init__(self, landings: Sequence[_Landing] = ()) -> None:
        self._landings = landings

    def wait(self) -> None:
        for landing in self._landings:
            landing.wait()


# -- tensors ---------------------------------------------------------------------------------


def units(spec: Spec) -> Ne:
    """The sizes with dimension 0 counted in blocks, like the strides."""
    return (spec.ne[0] // spec.dtype.block, *spec.ne[1:])


def span(nb: Ne, spec: Spec) -> int:
    """Number of bytes from a tensor's first byte to its last."""
    return sum((n - 1) * step for n, step in zip(units(spec), nb)) + spec.dtype.nbytes


def in_span(memory: Bytes, nb: Ne, spec: Spec) -> Bytes:
    """A view of the tensor's bytes [ne3, ne2, ne1, blocks, bytes] in the memory that it spans."""
    shape = (*units(spec)[::-1], spec.dtype.nbytes)
    return as_strided(memory, shape, (*nb[::-1], 1))


def put(staging: Staging, at: Address, spec: Spec, array: NDArray[Any]) -> None:
    """Write an array (NumPy shape, or raw rows) to an address with any strides."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    target = operand_at(at, spec)
    if target.contiguous:
        staging.upload(target.ptr, flat)
        return
    if _apart(target, spec):
        for ptr, row in _rows(target, spec, flat):
            staging.upload(ptr, row)
        return
    memory = np.empty(span(at.nb, spec), np.uint8)  # preserves the bytes between its rows
    staging.download(memory, target.ptr)
    part = in_span(memory, at.nb, spec)
    part[...] = flat.reshape(part.shape)
    staging.upload(target.ptr, memory)


def take(staging: Staging, at: Address, spec: Spec) -> NDArray[Any]:
    """The array at an address, in NumPy shape: uint16 for bf16, rows of bytes for block types."""
    source = operand_at(at, spec)
    if source.contiguous:
        flat = np.empty(spec.nbytes, np.uint8)
        staging.download(flat, source.ptr)
    elif _apart(source, spec):
        flat = np.empty(spec.nbytes, np.uint8)
        for ptr, row in _rows(source, spec, flat):
            staging.download(row, ptr)
    else:
        memory = np.empty(span(at.nb, spec), np.uint8)
        staging.download(memory, source.ptr)
        flat = np.ascontiguousarray(in_span(memory, at.nb, spec)).reshape(-1)
    dtype, shape = form(spec)
    return flat.view(dtype).reshape(shape)


def form(spec: Spec) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """NumPy's type and shape of a stored tensor: uint16 for bf16, rows of bytes for blocks."""
    dtype = spec.dtype
    stored = np.dtype(dtype.numpy or (np.uint16 if dtype.block == 1 else np.uint8))
    return stored, (*spec.shape[:-1], dtype.row_bytes(spec.ne[0]) // stored.itemsize)


def _apart(x: Operand, spec: Spec) -> bool:
    """Whether copying row by row costs less than copying the whole span."""
    return x.nb[0] == spec.dtype.nbytes and span(x.nb, spec) > PART * prod(spec.ne[1:])


def _rows(x: Operand, spec: Spec, flat: Bytes) -> Iterator[tuple[int, Bytes]]:
    """The address of each row, and its part of the flat bytes."""
    for index, row in zip(np.ndindex(spec.ne[:0:-1]), flat.reshape(prod(spec.ne[1:]), -1)):
        yield x.ptr + sum(i * step for i, step in zip(index, x.nb[:0:-1])), row


def send(staging: Staging, source: Address, target: Address, spec: Spec) -> Arrival:
    """Queue a copy to host memory. If a side is not contiguous, this waits for the copy."""
    there, here = operand_at(source, spec), Operand(0, spec.ne, target.nb, spec.dtype)
    memory = target.buffer[target.offset :][: span(target.nb, spec)]
    if there.contiguous and here.contiguous:
        return staging.receive(memory, there.ptr)
    part = in_span(memory, target.nb, spec)
    part[...] = take(staging, source, spec).reshape(-1).view(np.uint8).reshape(part.shape)
    return Arrival()

"""Copies of small tensors between the host and a GPU as part of a runner's graphs (relay.cu).

The host copies what it sends to pinned memory before it launches the graph, whose first kernel
reads it there; the last one writes to pinned memory what the host waits for. So a layer whose
experts run on the host needs one launch and one event. By a queued copy for each tensor, Python and
the driver took 180 of a layer's 570 us on 16 processors beside an H100.

The design that lost: to launch the next graph ahead, which waits for a word that the host writes.
While a stream waits for the host, whatever waits for the stream, such as the end of an object that
owns memory of the GPU, never returns if this thread does it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate

from pyggml.backends.base import Crossing
from pyggml.backends.cuda.argument import Struct, pack
from pyggml.backends.cuda.device.context import Context
from pyggml.backends.cuda.device.driver import guarded
from pyggml.backends.cuda.device.memory import operand_at
from pyggml.backends.cuda.device.parts import Part
from pyggml.backends.cuda.device.pinned import MAIL_GRAIN, Staging
from pyggml.backends.cuda.launch import Launch, Operand
from pyggml.backends.host_memory import address_of

FILE = "relay.cu"
#: The most tensors of a launch, and the most bytes of one.
MOST, LARGEST = 8, 32 << 10

Copy = tuple[int, int, int]  # to, source, bytes


class KernelCrossing(Struct):
    """The struct `Crossing` of relay.cu."""

    _fields_ = (("to", ctypes.c_uint64), ("source", ctypes.c_uint64), ("nbytes", ctypes.c_int32))


class Crossings(Struct):
    """The struct `Crossings` of relay.cu."""

    _fields_ = (("list", KernelCrossing * MOST),)


class Relay:
    """The copies of one runner; an `Event` of those to the host.

    before, after  actions for the graph: copies to the GPU, and to the host
    """

    def __init__(
        self,
        context: Context,
        part: Part,
        arrivals: Sequence[Crossing],
        departures: Sequence[Crossing],
    ) -> None:
        self._context, self._part = context, part
        mail = [part.address + place for place in _places([*arrivals, *departures])]
        there, back = mail[: len(arrivals)], mail[len(arrivals) :]
        self._filling = [(at, _host(c), c.spec.nbytes) for at, c in zip(there, arrivals)]
        self._landing = [(_host(c), at, c.spec.nbytes) for at, c in zip(back, departures)]
        inwards = [(_device(c), at, c.spec.nbytes) for at, c in zip(there, arrivals)]
        outwards = [(at, _device(c), c.spec.nbytes) for at, c in zip(back, departures)]
        self.before, self.after = actions(context, inwards), actions(context, outwards)
        self._event = context.driver.Event(context.driver.event_flags.DISABLE_TIMING)

    def fill(self) -> None:
        """Copy what the GPU will read to pinned memory. It has read what is there: between two runs
        the host waits for the first (`Execution.follow`)."""
        for copy in self._filling:
            ctypes.memmove(*copy)

    def record(self) -> None:
        """Call this when the run is queued."""
        if self._landing:
            self._event.record(self._context.stream)

    def wait(self) -> None:
        """Wait for the run's copies to the host, and put them where they belong."""
        with self._context, guarded("waiting for a GPU"):
            self._context.wait(self._event)
        for copy in self._landing:
            ctypes.memmove(*copy)


def relay(
    context: Context,
    staging: Staging,
    arrivals: Sequence[Crossing],
    departures: Sequence[Crossing],
) -> Relay | None:
    """The copies of a runner; None if they are too many or too large, or if there is no room."""
    copies = [*arrivals, *departures]
    if max(len(arrivals), len(departures)) > MOST or not all(map(_is_small, copies)):
        return None
    staging.prepare()
    assert staging.mail is not None
    staging.settle()  # a run whose plan is gone may still write to a part that is free
    part = staging.mail.part(_places(copies)[-1])
    return None if part is None else Relay(context, part, arrivals, departures)


def _is_small(crossing: Crossing) -> bool:
    """Whether the kernel can copy it."""
    spec = crossing.spec
    device = operand_at(crossing.device, spec)
    host = Operand(0, spec.ne, crossing.host.nb, spec.dtype)
    aligned = device.ptr % 16 == 0
    return spec.nbytes <= LARGEST and aligned and device.contiguous and host.contiguous


def places(sizes: Iterable[int]) -> list[int]:
    """Where each of these tensors is in the pinned memory, and the end."""
    units = (-(-nbytes // MAIL_GRAIN) for nbytes in sizes)
    return [MAIL_GRAIN * end for end in accumulate(units, initial=0)]


def _places(copies: Sequence[Crossing]) -> list[int]:
    return places(crossing.spec.nbytes for crossing in copies)


def _host(crossing: Crossing) -> int:
    return address_of(crossing.host.buffer) + crossing.host.offset


def _device(crossing: Crossing) -> int:
    return operand_at(crossing.device, crossing.spec).ptr


def actions(context: Context, copies: Sequence[Copy]) -> list[Callable[[], None]]:
    """The launch that makes the copies, if there are any."""
    if not copies:
        return []
    crossings = [KernelCrossing(to=to, source=source, nbytes=n) for to, source, n in copies]
    spare = MOST - len(crossings)
    args = pack([Crossings(list=(*crossings, *crossings[:1] * spare))])
    grid = (len(copies), 1, 1)
    launch = Launch(FILE, "relay", grid, (256, 1, 1), args, overlap=context.about.overlaps)
    context.load([launch])
    return [partial(context.start, launch)]

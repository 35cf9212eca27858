"""Ranks: processes that run one sharded graph together, each with a device of its own.

Every rank compiles the same plan, for all devices, and runs the splits of its own device. It
allocates memory for that device alone. Where a split copies from the device of another rank, the
two exchange a message (`Exchange`). The plan's text is the same everywhere; the rank is only an
attribute of the process. So one comparison of texts shows that all ranks will do the same, in the
same order, and the steps, sums and addresses of a device are those that one process with all
devices has: the results are equal bit for bit.

The design that lost cuts the graph, so that a rank compiles only what its device does. Compiling
would take less time (a plan for N devices has N times the nodes). But then no rank knows the order
in which the others send. The copies between devices, today nodes that are planned, ordered and
reported like any other, would become pairs of sends and receives that two planners must put in
orders that fit, and memory of other devices, predicted times and drawings would need all parts
again. A cut (`shard=auto`, uneven cards) also depends on the whole graph.

Rank i has the i-th device of the shard; rank 0 also has whatever else is in the plan: the host, and
devices that are only in pins. All ranks call the same methods in the same order, with equal inputs,
and get the same outputs.

**Errors.** A rank that fails sends a note to the others, which look for notes while they wait. So
an error ends all of them, and each one's error is that of the rank where it began. `together` is
for what may fail on one rank before anything was sent, such as an allocation: all ranks get the
error, and may go on. After any other error the messages of a run are lost, and so the ranks cannot
be used any more. A process that is killed sends no note; then mpiexec ends the others.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pyggml.errors import DeviceError, PyggmlError
from pyggml.words import counted

if TYPE_CHECKING:
    from pyggml.backends.base import Backend
    from pyggml.passes.stages import Shard
    from pyggml.passes.work import Work

T = TypeVar("T")
Bytes: TypeAlias = NDArray[np.uint8]

#: The tags of messages that are not a copy or an output; those have tags from FIRST on.
NOTE, SIZE, TEXT, STATE, FIRST = 0, 1, 2, 3, 4
#: The bytes of a note: the beginning of an error, or nothing if a rank has ended.
NOTE_BYTES = 2000
#: Seconds for which a message of a rank that has ended may still be on its way.
GRACE = 5.0


class PeerError(DeviceError):
    """Another rank has failed, or differs. The message begins with that rank."""


class Request(Protocol):
    """A message on its way."""

    def done(self) -> bool: ...


class Transport(Protocol):
    """Messages between processes. Those with the same ends and tag arrive in the order sent.

    rank   of this process, from 0 to size - 1
    local  its number among those on this machine: also that of its GPU
    """

    rank: int
    size: int
    local: int

    def send(self, data: Bytes, to: int, tag: int) -> Request:
        """Begin to send; `data` must not change until it is done."""

    def receive(self, data: Bytes, source: int, tag: int) -> Request:
        """Begin to receive exactly len(data) bytes."""

    def sender(self, tag: int) -> int | None:
        """A rank whose message with this tag has come and was not received yet."""


@runtime_checkable
class HasOrdinal(Protocol):
    """A backend that can be told which of this machine's devices it is, before it opens it."""

    ordinal: int


class Ranks:
    """This process among those that run a sharded graph. `pyggml.join()` makes it.

    rank, size  the number of this process, and of all
    block       host memory that messages pass through, for all plans: no two run at the same time
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.rank, self.size, self.local = transport.rank, transport.size, transport.local
        self._lost: str | None = None
        self._ended: dict[int, float] = {}  # rank -> when its last note came
        self._notes: list[Request] = []  # keeps what is being sent alive
        self.block: Bytes = np.zeros(0, np.uint8)
        #: The devices that have been connected, for joint steps.
        self.connected: set[tuple[str, ...]] = set()

    def __repr__(self) -> str:
        return f"<rank {self.rank} of {self.size}>"

    # -- devices ------------------------------------------------------------------------------

    def check(self, shard: Shard | None) -> None:
        """DeviceError unless the plan has as many devices as there are ranks."""
        devices = () if shard is None else shard.devices
        if len(devices) == self.size or (self.size == 1 and not devices):
            return
        processes = f"{counted(self.size, 'process', 'processes')} {self._verb('runs', 'run')}"
        if not devices:
            raise DeviceError(f"{processes}, but the graph is not sharded: pass shard=, or 'auto'")
        names = ", ".join(device.place for device in devices)
        raise DeviceError(
            f"{processes} a plan for {counted(len(devices), 'device')} ({names}); "
            f"start one process a device: mpiexec -n {len(devices)}, or --nproc {len(devices)}"
        )

    def _verb(self, one: str, several: str) -> str:
        return one if self.size == 1 else several

    def owner(self, shard: Shard | None, backend: Backend) -> int:
        """The rank that has the device of `backend`."""
        return owner_of(shard, backend)

    def owns(self, work: Work) -> Callable[[Backend], bool]:
        """Whether a backend's device is this rank's in this plan."""
        return lambda backend: self.owner(work.shard, backend) == self.rank

    def adopt(self, shard: Shard | None) -> None:
        """Let the GPU of this rank be the one with its number on this machine, whatever the number
        of its place: with a GPU on each of two machines, cuda:1 is the first GPU of the second."""
        if shard is not None and self.size > 1:
            device = shard.devices[self.rank]
            if isinstance(device, HasOrdinal):
                device.ordinal = self.local

    def places(self, names: Sequence[str]) -> list[str]:
        """`names` with one device for each rank instead of the first name, if that is no list of
        devices already: cuda, cpu -> cuda:0, cuda:1, cpu."""
        first, *others = names
        if self.size == 1 or ":" in first or first in others:
            return list(names)
        kind = [name for name in others if name.partition(":")[0] == first]
        return list(names) if kind else [*(f"{first}:{i}" for i in range(self.size)), *others]

    # -- messages -----------------------------------------------------------------------------

    def send(self, data: Bytes, to: int, tag: int) -> Request:
        """Begin to send a message; `wait` for the request before `data` changes."""
        self.check_usable()
        return self._transport.send(data, to, tag)

    def receive(self, data: Bytes, source: int, tag: int) -> None:
        """Wait for a message of len(data) bytes."""
        self.check_usable()
        self.wait(self._transport.receive(data, source, tag), source)

    def wait(self, request: Request, peer: int) -> None:
        """Wait for a message from or to `peer`. PeerError if a rank fails meanwhile."""
        turns = 0
        while not request.done():
            turns += 1
            if turns % 16 == 0:
                self._look(peer)
            if turns > 2000:  # a long wait: leave the processor to others
                time.sleep(1e-4 if turns < 20_000 else 5e-3)  # a user may think about an answer

    def look(self) -> None:
        """Read a note, if one has come. PeerError if a rank has failed."""
        self._read_note()
        self.check_usable()

    def _look(self, peer: int) -> None:
        """As `look`; and `peer`, for which this rank waits, must not have ended."""
        self.look()
        ended = self._ended.get(peer)
        if ended is not None and time.monotonic() - ended > GRACE:
            raise PeerError(f"rank {peer} has ended, but rank {self.rank} waits for it")

    def _read_note(self) -> None:
        source = self._transport.sender(NOTE)
        if source is None:
            return
        note = np.zeros(NOTE_BYTES, np.uint8)
        request = self._transport.receive(note, source, NOTE)
        while not request.done():
            pass
        text = note.tobytes().rstrip(b"\0").decode(errors="replace")
        if text:
            self._lost = text
        else:
            self._ended[source] = time.monotonic()

    def check_usable(self) -> None:
        """PeerError if a rank has failed."""
        if self._lost is not None:
            raise PeerError(self._lost)

    def _note(self, text: str) -> None:
        """Tell all others; do not wait until they know."""
        note = np.zeros(NOTE_BYTES, np.uint8)
        data = text.encode()[:NOTE_BYTES]
        note[: len(data)] = np.frombuffer(data, np.uint8)
        for peer in range(self.size):
            if peer != self.rank:
                self._notes.append(self._transport.send(note, peer, NOTE))

    def reserve(self, nbytes: int) -> None:
        """Make the block at least so large. No message may be on its way."""
        if len(self.block) < nbytes:
            self.block = np.zeros(nbytes, np.uint8)

    def spread(self, data: Bytes, owner: int, tag: int) -> None:
        """Copy the bytes of rank `owner` into `data` on all others. All ranks call it."""
        if self.rank != owner:
            self.receive(data, owner, tag)
            return
        others = [peer for peer in range(self.size) if peer != owner]
        for request, peer in [(self.send(data, peer, tag), peer) for peer in others]:
            self.wait(request, peer)

    # -- agreement ----------------------------------------------------------------------------

    def gather(self, text: str) -> list[str]:
        """The texts of all ranks, by rank. All ranks call it."""
        data = np.frombuffer(text.encode(), np.uint8).copy()
        sizes = self._all(np.array([len(data)], np.int64).view(np.uint8), SIZE, [8] * self.size)
        lengths = [int(size.view(np.int64)[0]) for size in sizes]
        return [each.tobytes().decode() for each in self._all(data, TEXT, lengths)]

    def _all(self, mine: Bytes, tag: int, lengths: Sequence[int]) -> list[Bytes]:
        """The messages of all ranks; each sends its own to all others."""
        others = [peer for peer in range(self.size) if peer != self.rank]
        sent = [(self.send(mine, peer, tag), peer) for peer in others]
        parts = [np.zeros(n, np.uint8) for n in lengths]
        parts[self.rank] = mine
        for peer in others:
            self.receive(parts[peer], peer, tag)
        for request, peer in sent:
            self.wait(request, peer)
        return parts

    def agree(self, what: str, text: str) -> None:
        """Compare a text with those of the other ranks. All ranks call it.

        Errors: PeerError with the first line in which a rank differs from rank 0.
        """
        if self.size == 1:
            return
        digests = self.gather(hashlib.sha256(f"{what}\n{text}".encode()).hexdigest())
        if len(set(digests)) == 1:
            return
        texts = self.gather(f"{what}\n{text}")
        for rank, other in enumerate(texts):
            if other != texts[0]:
                theirs, ours = _difference(other, texts[0])
                raise self._lose(
                    f"rank {rank} has another {what} than rank 0: {theirs!r} instead of {ours!r}; "
                    "all ranks need the same version, file and options"
                )

    def together(self, action: Callable[[], T]) -> T:
        """The result of an action that all ranks call and that sends nothing. If it fails on one,
        it fails on all: there with its own error, on the others with a PeerError."""
        error: Exception | None = None
        try:
            result = action()
        except Exception as failure:
            error = failure
        errors = self.gather("" if error is None else first_line(error))
        if error is not None:
            raise error
        for rank, text in enumerate(errors):
            if text:
                raise PeerError(f"rank {rank}: {text}")
        return result

    def _lose(self, text: str) -> PeerError:
        self._lost = text
        return PeerError(text)

    # -- the end ------------------------------------------------------------------------------

    def failed(self, error: BaseException) -> None:
        """End the work of all ranks: they get an error that names this rank, as soon as they wait
        for anything. Afterwards these ranks cannot be used."""
        if self._lost is None:
            self._lost = f"rank {self.rank}: {first_line(error)}"
            self._note(self._lost)

    def leave(self) -> None:
        """Say that this rank is done, and wait for the others, or for an error of one."""
        if self.size == 1 or self._lost is not None:
            return
        self._note("")
        while len(self._ended) < self.size - 1 and self._lost is None:
            self._read_note()
            time.sleep(1e-4)


def owner_of(shard: Shard | None, backend: Backend) -> int:
    """The rank that has a device, with one rank for each device of the shard."""
    devices = [] if shard is None else [device.device for device in shard.devices]
    return devices.index(backend.device) if backend.device in devices else 0


def first_line(error: BaseException) -> str:
    """An error in one line, with its type if it is not one of ours. A table below it is left out,
    and the words that introduce it."""
    text = " ".join(str(error).split("\n")[0].split())
    if text.endswith(":"):
        text = text.rpartition(";")[0] or text
    name = type(error).__name__
    return text if isinstance(error, PyggmlError) and text else f"{name}: {text}".rstrip(": ")


def _difference(theirs: str, ours: str) -> tuple[str, str]:
    """The first line in which two texts differ."""
    a, b = theirs.split("\n"), ours.split("\n")
    n = max(len(a), len(b))
    pairs = zip([*a, *[""] * (n - len(a))], [*b, *[""] * (n - len(b))])
    return next((x, y) for x, y in pairs if x != y)

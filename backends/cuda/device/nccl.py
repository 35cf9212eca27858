"""NCCL through CuPy: communicators of the devices that meet in joint steps.

A communicator belongs to a set of devices, in order, and is made once in a process. With several
processes, that of the first device makes an id, and all get it from `Peers.gather`. Every call
that waits for other processes runs in a thread, while this one looks whether they are still there.

NVLink multicast stays off: what it leaves behind after a crash can stop other users of the GPUs.
Connections are made when a communicator is, so that no later call waits on the host.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Thread
from typing import TYPE_CHECKING, Any

from pyggml.backends.base import Peers
from pyggml.backends.cuda.device.driver import UnusableError, guarded, imported
from pyggml.backends.cuda.launch import Collective
from pyggml.errors import DeviceError
from pyggml.extras import install_command

if TYPE_CHECKING:
    from pyggml.backends.cuda.device.boxes import Box
    from pyggml.backends.cuda.device.context import Context

#: Seconds after which a wait for other processes is an error: one of them may compile kernels or
#: read weights meanwhile.
PATIENCE = 300.0
#: Estimate of the bytes of a GPU that NCCL takes for a communicator: buffers of 24 channels for two
#: directions. Not measured.
CONNECTION = 384 << 20
#: Seconds that NCCL has to end the kernels of a GPU.
ABORTING = 5.0
#: Seconds after which a kernel that waits has seen that it must end.
NOTICING = 0.05
#: The first letter of the text of an id, which CuPy gives as bytes or as signed integers; or of an
#: error.
BYTES, INTEGERS, FAILED = "b", "i", "!"


def enabled() -> bool:
    """Whether collectives run by NCCL; PYGGML_NCCL=0 asks for copies and sums."""
    return os.environ.get("PYGGML_NCCL", "1") != "0"


def library() -> Any:
    """CuPy's module of NCCL; UnusableError if NCCL is not installed."""
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # before NCCL reads it
    os.environ.setdefault("NCCL_RUNTIME_CONNECT", "0")
    nccl = imported("cupy.cuda.nccl")
    if not getattr(nccl, "available", True):
        raise UnusableError(
            "collectives of several GPUs need NCCL, which CuPy does not find",
            install_command("cuda"),
        )
    return nccl


class Communicator:
    """A device's end of a communicator.

    box    memory that the other devices write to, for sums; None: NCCL has all
    mates  the ends of all devices that are in this process
    places of all devices
    """

    def __init__(self, context: Context, raw: Any, index: int) -> None:
        self._nccl = library()
        self.context, self.raw, self.index = context, raw, index
        self.box: Box | None = None
        self.mates: Sequence[Communicator] = (self,)
        self.places: tuple[str, ...] = ()
        self.lost = False
        types = {"f32": "FLOAT32", "f16": "FLOAT16", "bytes": "CHAR"}
        self._types = {k: getattr(self._nccl, f"NCCL_{name}") for k, name in types.items()}

    def call(self, record: Collective) -> None:
        """Queue a collective."""
        stream, kind = self.context.stream.handle, self._types[record.type]
        counts, ends = record.counts, (record.source, record.target)
        if record.kind == "send":
            self.raw.send(record.source, counts[0], kind, 1 - self.index, stream)
        elif record.kind == "receive":
            self.raw.recv(record.target, counts[0], kind, 1 - self.index, stream)
        elif record.kind == "all_reduce":
            self.raw.allReduce(*ends, counts[0], kind, self._nccl.NCCL_SUM, stream)
        elif record.kind == "reduce_scatter":
            self.raw.reduceScatter(*ends, counts[0], kind, self._nccl.NCCL_SUM, stream)
        elif len(set(counts)) == 1:
            self.raw.allGather(*ends, counts[0], kind, stream)
        else:
            self._gather(record, kind, stream)

    def _gather(self, record: Collective, kind: int, stream: int) -> None:
        """Parts of different sizes: each device spreads its own."""
        self._nccl.groupStart()
        start = record.target
        for root, count in enumerate(record.counts):
            source = record.source if root == self.index else start
            self.raw.broadcast(source, start, count, kind, root, stream)
            start += count
        self._nccl.groupEnd()

    def check_usable(self) -> None:
        """DeviceError after `abort`: graphs that were captured before it must not run."""
        if self.lost:
            raise DeviceError(
                "an earlier run of these GPUs ended in a step that they take together; open the "
                "model again, or compile for a new store"
            )

    def check(self) -> None:
        """DeviceError if NCCL has found that a peer or a link is lost."""
        with guarded("a collective"):
            error = self.raw.check_async_error()
        # 7: a call is still in progress.
        if error not in (None, 0, 7):
            raise DeviceError(f"NCCL has lost another device (error {error})")

    def abort(self) -> None:
        """End kernels of this process that wait for other devices. These ends of the communicator
        cannot be used afterwards."""
        ends = [end for end in self.mates if not end.lost]
        for end in ends:
            end.lost = True
            if end.box is not None:
                end.box.end_waits()
        for end in ends:
            # On a GPU that has failed, the library may not come back.
            thread = Thread(target=end._abort, daemon=True)
            thread.start()
            thread.join(ABORTING)

    def _abort(self) -> None:
        with suppress(Exception):
            self.raw.abort()


class Group:
    """NCCL calls of several devices by one thread, which start together."""

    def __enter__(self) -> None:
        library().groupStart()

    def __exit__(self, *_: object) -> None:
        library().groupEnd()


def alone(contexts: Sequence[Context]) -> list[Communicator]:
    """The communicators of devices that are all in this process."""
    nccl = library()
    with contexts[0], guarded("starting NCCL"):
        raws = nccl.NcclCommunicator.initAll([context.index for context in contexts])
    ends = [Communicator(context, raw, i) for i, (context, raw) in enumerate(zip(contexts, raws))]
    for end in ends:
        end.mates = tuple(ends)
    return ends


def shared_id(peers: Peers, first: bool) -> Any:
    """The id of a new communicator, which the process of its first device makes. All processes
    call it."""
    mine = ""
    if first:
        try:
            id = library().get_unique_id()
            form = BYTES if isinstance(id, bytes) else INTEGERS
            mine = form + bytes(x % 256 for x in id).hex()
        except Exception as error:
            mine = f"{FAILED}{error}"
    text = next(filter(None, peers.gather(mine)))
    if text.startswith(FAILED):
        raise DeviceError(text[len(FAILED) :])
    id = bytes.fromhex(text[1:])
    return id if text[0] == BYTES else tuple(x - 256 * (x > 127) for x in id)


def in_processes(context: Context, id: Any, count: int, index: int, peers: Peers) -> Communicator:
    """This process's end of a communicator of `count` processes."""
    nccl = library()

    def connect() -> Communicator:
        with context:
            return Communicator(context, nccl.NcclCommunicator(count, id, index), index)

    with guarded("starting NCCL"):
        end: Communicator = patiently(connect, peers)
    return end


def patiently(action: Callable[[], Any], peers: Peers) -> Any:
    """The result of a call that waits for other processes. Their errors end the wait."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = Thread(target=run, daemon=True)  # after an error it may wait for ever
    thread.start()
    watch = Watch(peers, ())
    while thread.is_alive():
        thread.join(1e-3)
        watch.look()
    if errors:
        raise errors[0]
    return results[0]


class Watch:
    """Looks, while this process waits for a GPU, whether other GPUs and processes are still there.

    peers         the other processes, if there are any
    communicators of the GPU
    """

    def __init__(self, peers: Peers | None, communicators: Sequence[Communicator]) -> None:
        self._peers, self._communicators = peers, communicators
        self._end = time.monotonic() + PATIENCE

    def look(self) -> None:
        """An error if another GPU or process has failed, or this one has waited too long.
        Collectives are then aborted: nobody else would come to them."""
        try:
            if self._peers is not None:
                self._peers.look()
            for each in self._communicators:
                each.check()
                for mate in each.mates:
                    if mate is not each:
                        mate.context.check_alive()
            if time.monotonic() > self._end:
                raise DeviceError(self._late())
        except BaseException:
            for each in self._communicators:
                each.abort()
            raise

    def _late(self) -> str:
        """The text of an error, with the GPU that a kernel of ours waits for."""
        for each in self._communicators:
            each.abort()
            time.sleep(NOTICING)
            missing = None if each.box is None else each.box.missing
            if missing is not None:
                return (
                    f"{each.places[each.index]} has waited {PATIENCE:.0f} s for "
                    f"{each.places[missing]}, which does not come to their joint step; do all "
                    "processes make the same calls?"
                )
        return (
            f"a GPU has waited {PATIENCE:.0f} s for those of other processes; do all make the same "
            "calls?"
        )

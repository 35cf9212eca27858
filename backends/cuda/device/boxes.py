"""Memory of a GPU that other GPUs write to, for small sums (peer_sum.py).

In one process the GPUs open their memory to each other. Between processes of one machine, each
sends a handle of its box, and all say whether they could open those of the others; if one could
not, none uses the boxes, and all close what they have opened.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from pyggml.backends.base import Peers
from pyggml.backends.cuda.device.context import Context
from pyggml.backends.cuda.device.driver import checked, guarded, imported
from pyggml.backends.cuda.device.memory import Buffer
from pyggml.backends.cuda.peer_sum import box_bytes
from pyggml.backends.cuda.peers import MOST, Boxes
from pyggml.errors import DeviceError

#: The texts of a process without a box, and of one that could open all.
NONE, OPEN = "-", "open"


def wanted() -> bool:
    """Whether sums use boxes; PYGGML_PEER_SUM=0 leaves them to NCCL."""
    return os.environ.get("PYGGML_PEER_SUM", "1") != "0"


class Box:
    """A GPU's box, and two words of pinned memory that its kernels look at while they wait.

    boxes  all boxes, as this GPU sees them
    """

    def __init__(self, context: Context, count: int) -> None:
        self.memory = Buffer(context, box_bytes(count))
        with guarded("allocating"):
            self._words = context.driver.pagelocked_empty(2, np.uint32)
        self._words[:] = 0
        self.boxes = Boxes((), 0, 0)
        context.stream.synchronize()  # zeros, before another GPU writes

    def open(self, addresses: Sequence[int], index: int) -> None:
        """Say where the boxes of all GPUs are; this is number `index`."""
        self.boxes = Boxes(tuple(addresses), index, self._words.ctypes.data)

    def end_waits(self) -> None:
        """Kernels that wait for other GPUs end soon, now and later."""
        self._words[0] = 1

    @property
    def missing(self) -> int | None:
        """The number of the GPU that a kernel waited for when all waits had to end."""
        return int(self._words[1]) - 1 if self._words[1] else None


def boxes_here(contexts: Sequence[Context]) -> list[Box] | None:
    """A box for each GPU of this process; None if one cannot write to another."""
    count = len(contexts)
    if not wanted() or count > MOST:
        return None
    for mine in contexts:
        for other in contexts:
            if mine is not other and not _reaches(mine, other):
                return None
    boxes = []
    for context in contexts:
        with context:
            boxes.append(Box(context, count))
    for index, box in enumerate(boxes):
        box.open([each.memory.ptr for each in boxes], index)
    return boxes


def _reaches(mine: Context, other: Context) -> bool:
    """Let a GPU write to the memory of another one of this process; whether it can."""
    cu, what = imported("cuda.bindings.driver"), "peer access"
    devices = [checked(cu, what, cu.cuDeviceGet(each.index)) for each in (mine, other)]
    if not checked(cu, what, cu.cuDeviceCanAccessPeer(*devices)):
        return False
    with mine, suppress(mine.driver.Error):  # an error, too, if it has been enabled before
        mine.driver.Context.enable_peer_access(other.primary)
    return True


def box_of_process(
    context: Context | None, index: int | None, count: int, peers: Peers
) -> Box | None:
    """The box of this process; None if boxes cannot be used, or it has no GPU of them.

    All processes call it, those without one of the devices with None.
    """
    box, text = None, NONE
    if context is not None and wanted() and count <= MOST:
        with suppress(DeviceError), context:
            box = Box(context, count)
            text = f"{index} {socket.gethostname()} {_handle(box.memory)}"
    handles = [each.split() for each in peers.gather(text) if each != NONE]
    addresses: list[int] = []
    answer = NONE if context is not None else OPEN
    if context is not None and box is not None and len(handles) == count:
        with suppress(DeviceError), context:
            ordered = sorted(handles, key=lambda each: int(each[0]))
            addresses += _opened(ordered, at=index, mine=box.memory.ptr)
            answer = OPEN
    if set(peers.gather(answer)) == {OPEN}:
        if box is not None:
            box.open(addresses, index or 0)
        return box
    if context is not None and box is not None:
        with context:
            _close(address for address in addresses if address != box.memory.ptr)
    peers.gather(NONE)  # a box may be freed only when nobody has it open
    return None


def _handle(box: Buffer) -> str:
    cu = imported("cuda.bindings.driver")
    handle: Any = checked(cu, "sharing memory", cu.cuIpcGetMemHandle(box.ptr))
    return bytes(handle.reserved).hex()


def _opened(handles: Sequence[Sequence[str]], at: int | None, mine: int) -> list[int]:
    """The address of each box in this process; `mine` at place `at`. They stay open until the
    process ends. If one cannot be opened, none stays open."""
    if len({host for _, host, _ in handles}) > 1:
        raise DeviceError("the GPUs are of several machines")
    cu = imported("cuda.bindings.driver")
    flags = cu.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS.value
    others: list[int] = []
    try:
        for i, (_, _, text) in enumerate(handles):
            if i != at:
                handle = cu.CUipcMemHandle()
                handle.reserved = bytes.fromhex(text)
                address = cu.cuIpcOpenMemHandle(handle, flags)
                others.append(int(checked(cu, "opening memory of a peer", address)))
    except BaseException:
        _close(others)
        raise
    return others if at is None else [*others[:at], mine, *others[at:]]


def _close(addresses: Iterable[int]) -> None:
    cu = imported("cuda.bindings.driver")
    for address in addresses:
        cu.cuIpcCloseMemHandle(address)

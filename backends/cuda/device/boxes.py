"""Memory of a GPU that other GPUs write to, for sums of small parts (peer_sum.py).

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

from pyggml.backends.base import Peers
from pyggml.backends.cuda.device.context import Context
from pyggml.backends.cuda.device.driver import checked, imported
from pyggml.backends.cuda.device.memory import Buffer
from pyggml.backends.cuda.peer_sum import MOST, box_bytes
from pyggml.errors import DeviceError

#: The texts of a process without a box, and of one that could open all.
NONE, OPEN = "-", "open"


def wanted() -> bool:
    """Whether small sums use boxes; PYGGML_PEER_SUM=0 leaves them to NCCL."""
    return os.environ.get("PYGGML_PEER_SUM", "1") != "0"


def boxes_here(contexts: Sequence[Context]) -> list[Buffer] | None:
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
            boxes.append(Buffer(context, box_bytes(count)))
            context.stream.synchronize()  # zeros, before another GPU writes
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


def boxes_of_processes(
    context: Context | None, index: int | None, count: int, peers: Peers
) -> tuple[Buffer | None, tuple[int, ...]]:
    """The box of this process, and the addresses of all; no addresses if boxes cannot be used.

    All processes call it, those without one of the devices with None.
    """
    box, text = None, NONE
    if context is not None and wanted() and count <= MOST:
        with suppress(DeviceError), context:
            box = Buffer(context, box_bytes(count))
            context.stream.synchronize()
            text = f"{index} {socket.gethostname()} {_handle(box)}"
    handles = [each.split() for each in peers.gather(text) if each != NONE]
    addresses: list[int] = []
    answer = NONE if context is not None else OPEN
    if context is not None and box is not None and len(handles) == count:
        with suppress(DeviceError), context:
            ordered = sorted(handles, key=lambda each: int(each[0]))
            addresses += _opened(ordered, at=index, mine=box.ptr)
            answer = OPEN
    if set(peers.gather(answer)) == {OPEN}:
        return box, tuple(addresses)
    if context is not None and box is not None:
        with context:
            _close(address for address in addresses if address != box.ptr)
    peers.gather(NONE)  # a box may be freed only when nobody has it open
    return None, ()


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

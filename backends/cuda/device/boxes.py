"""Memory of a GPU that other GPUs write to, for sums of small parts (peer_sum.py).

In one process the GPUs open their memory to each other. Between processes of one machine, each
sends a handle of its box, and all say whether they could open those of the others; if one could
not, none uses the boxes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
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
    addresses: tuple[int, ...] = ()
    answer = NONE if context is not None else OPEN
    if context is not None and box is not None and len(handles) == count:
        with suppress(DeviceError), context:
            addresses = _opened(box, index, sorted(handles, key=lambda each: int(each[0])))
            answer = OPEN
    if set(peers.gather(answer)) != {OPEN}:
        return None, ()
    return box, addresses


def _handle(box: Buffer) -> str:
    cu = imported("cuda.bindings.driver")
    handle: Any = checked(cu, "sharing memory", cu.cuIpcGetMemHandle(box.ptr))
    return bytes(handle.reserved).hex()


def _opened(box: Buffer, index: int | None, handles: Sequence[Sequence[str]]) -> tuple[int, ...]:
    """The address of each box in this process. They stay open until it ends."""
    cu, addresses = imported("cuda.bindings.driver"), []
    if len({host for _, host, _ in handles}) > 1:
        raise DeviceError("the GPUs are of several machines")
    for i, (_, _, text) in enumerate(handles):
        if i == index:
            addresses.append(box.ptr)
            continue
        handle = cu.CUipcMemHandle()
        handle.reserved = bytes.fromhex(text)
        flags = cu.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS.value
        opened = checked(cu, "opening memory of a peer", cu.cuIpcOpenMemHandle(handle, flags))
        addresses.append(int(opened))
    return tuple(addresses)

"""GPUs of one host that write to each other's memory: arguments of kernels that add up parts.

Each GPU has a box that the others write to (device/boxes.py). In one process its address is known;
another process gets a handle of its memory (CUDA IPC) and opens it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

from pyggml.backends.cuda.argument import Argument, Struct
from pyggml.backends.cuda.launch import Form, Meets

#: As in include/peers.cuh: the most GPUs, and bytes at the start of a box.
MOST, BOX_HEAD = 8, 256


class Peers(Struct):
    """The struct `Peers` of include/peers.cuh."""

    _fields_ = (
        ("box", ctypes.c_uint64 * MOST),
        ("stop", ctypes.c_uint64),
        ("index", ctypes.c_int32),
        ("count", ctypes.c_int32),
    )


class Round(Struct):
    """The struct `Round` of include/rounds.cuh."""

    _fields_ = (("peers", Peers), ("rounds", ctypes.c_uint64), ("turn", ctypes.c_int32))


def sends(at: int, form: Callable[[Argument], Form]) -> Meets:
    """How a launch meets those of other GPUs that computes the part of a row at this address."""
    return at, True, form


@dataclass(frozen=True, slots=True)
class Boxes:
    """The boxes of GPUs that add up parts together, as number `index` of them sees them.

    addresses  of all boxes
    stop       address of two words of the host that end all waits, and say whom this GPU waited for
    """

    addresses: tuple[int, ...]
    index: int
    stop: int

    @property
    def count(self) -> int:
        return len(self.addresses)

    @property
    def mine(self) -> int:
        return self.addresses[self.index]

    @property
    def argument(self) -> Peers:
        padded = self.addresses + (0,) * (MOST - self.count)
        return Peers(box=padded, stop=self.stop, index=self.index, count=self.count)

"""Sums of small parts by a kernel over the memory of other GPUs (kernels/peer_sum.cu).

A GPU has a box that the others write to. In one process its address is known; another process gets
a handle of its memory (CUDA IPC) and opens it.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from pyggml.backends.cuda.argument import Struct, pack
from pyggml.backends.cuda.launch import Collective, Launch

FILE = "peer_sum.cu"
#: As in the kernel.
CHUNK, ROOM, MOST = 2048, 16 * 2048, 8
#: Bytes of a device's rounds; where among them is the word that stops kernels.
ROUNDS, STOP = 256, 64


class Boxes(Struct):
    """The struct `Boxes` of peer_sum.cu."""

    _fields_ = (("of", ctypes.c_uint64 * MOST), ("rounds", ctypes.c_uint64))


def box_bytes(count: int) -> int:
    """The bytes of a device's box, and of its rounds behind it."""
    return 2 * count * ROOM * 8 + ROUNDS


def suits(record: Collective) -> bool:
    """Whether the kernel can compute a collective."""
    count = len(record.places)
    return (
        record.kind == "all_reduce" and record.type == "f32"
        and record.counts[0] <= ROOM and count <= MOST
    )  # fmt: skip


def launch_of(record: Collective, boxes: tuple[int, ...], overlap: bool) -> Launch:
    """The launch for a collective.

    boxes  the address of each device's box, as this device sees it
    """
    count, n = len(record.places), record.counts[0]
    padded = boxes + (0,) * (MOST - count)
    rounds = boxes[record.index] + box_bytes(count) - ROUNDS
    args: list[Any] = [
        np.uint64(record.target), np.uint64(record.source), Boxes(of=padded, rounds=rounds),
        np.int32(record.index), np.int32(count), np.int32(n),
    ]  # fmt: skip
    grid = (-(-n // CHUNK), 1, 1)
    return Launch(FILE, "peer_sum<true, true>", grid, (512, 1, 1), pack(args), 0, overlap)

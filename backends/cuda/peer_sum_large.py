"""Sums of large parts by a kernel over the memory of other GPUs (kernels/peer_sum_large.cu)."""

from __future__ import annotations

import numpy as np

from pyggml.backends.cuda.argument import Argument, pack
from pyggml.backends.cuda.launch import Collective, Launch
from pyggml.backends.cuda.peers import MOST, Boxes

FILE = "peer_sum_large.cu"
#: As in the kernel: blocks of a GPU, slots of each, the most elements of a tile.
BLOCKS, SLOTS, TILE = 128, 4, 8192
#: Bytes of the flags, and of the counts of tiles behind the slots.
FLAGS, COUNTS = 2 * MOST * BLOCKS * 4, BLOCKS * 4


def _room(count: int) -> int:
    """The most elements of a piece."""
    return TILE // count // 4 * 4


def _slots(count: int) -> int:
    """The bytes of the slots."""
    return 2 * BLOCKS * SLOTS * (count - 1) * _room(count) * 4


def box_bytes(count: int) -> int:
    """The bytes of what the kernel needs of a device's box."""
    return FLAGS + _slots(count) + COUNTS


def suits(record: Collective) -> bool:
    """Whether the kernel can compute a collective."""
    return record.kind == "all_reduce" and record.type == "f32" and len(record.places) <= MOST


def launch_of(record: Collective, boxes: Boxes, at: int, overlap: bool) -> Launch:
    """The launch for a collective.

    at  where in each box its part begins
    """
    n, count = record.counts[0], boxes.count
    rounds = -(-n // (BLOCKS * count * _room(count)))  # tiles of a block
    piece = -(-n // (rounds * BLOCKS * count * 4)) * 4  # all blocks have as many, if it is large
    grid = min(BLOCKS, -(-n // (piece * count)))
    args: list[Argument] = [
        np.uint64(record.target), np.uint64(record.source), np.int64(n), np.int32(piece),
        boxes.argument, np.uint64(at), np.uint64(boxes.mine + at + FLAGS + _slots(count)),
    ]  # fmt: skip
    return Launch(FILE, "peer_sum_large", (grid, 1, 1), (512, 1, 1), pack(args), 0, overlap)

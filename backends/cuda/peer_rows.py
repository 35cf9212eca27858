"""Sums of large parts of two GPUs, which send each other rows of f16
(kernels/include/sent_row.cuh)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pyggml.backends.cuda.argument import Argument, pack
from pyggml.backends.cuda.geometry import threads_for
from pyggml.backends.cuda.launch import Collective, Launch
from pyggml.backends.cuda.norm import EACH, ROW_THREADS
from pyggml.backends.cuda.peers import Boxes
from pyggml.joint import places_of
from pyggml.node import Node

FILE = "peer_rows.cu"
#: As in include/sent_row.cuh: rows and elements of a part, and bytes in front of the parts.
MOST_ROWS, ROOM, HEAD = 8192, 1 << 24, 256
#: Elements of a part up to which words are faster (peer_sum.py).
FEW = 1 << 15


def box_bytes(count: int) -> int:
    """The bytes of the box of one of `count` GPUs that the kernels use: the counts, and two parts
    with their scales."""
    return HEAD + 2 * (4 * MOST_ROWS + 2 * ROOM) if count == 2 else 0


def width_of(joint: Node) -> int:
    """The elements of a row of a sum whose parts are sent as rows of f16; else 0. All devices have
    the same answer."""
    n, count = joint.ne[0], joint.spec.elements
    if joint.attrs.get("exact", True) or len(places_of(joint)) != 2:
        return 0
    fits = FEW < count <= ROOM and count // n <= MOST_ROWS
    return n if fits and n % 128 == 0 and n <= EACH * ROW_THREADS[-1] else 0


def launch_of(record: Collective, boxes: Boxes, at: int, overlap: bool) -> Launch:
    """The launch for a sum, and for what follows in its step.

    at  where in each box these kernels' bytes begin
    """
    ends: list[Argument] = [boxes.argument, np.uint64(at)]
    if (tail := record.tail) is not None:
        return replace(tail.launch, args=pack([*tail.args, *ends]))
    n = record.row
    args = pack([np.uint64(record.target), np.uint64(record.source), np.int32(n), *ends])
    grid, threads = record.counts[0] // n, threads_for(n // EACH)
    return Launch(FILE, "peer_rows", (grid, 1, 1), (threads, 1, 1), args, 0, overlap)

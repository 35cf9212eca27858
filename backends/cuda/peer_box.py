"""What a GPU's box holds, and which of our kernels takes a sum."""

from __future__ import annotations

from pyggml.backends.cuda import peer_sum, peer_sum_large
from pyggml.backends.cuda.launch import Collective, Launch
from pyggml.backends.cuda.peers import MOST, Boxes
from pyggml.backends.cuda.table import ALIGNMENT


def box_bytes(count: int) -> int:
    """The bytes of a box of one of `count` GPUs, for any plan: what small sums need, then large
    ones. 0 if there are none for so many."""
    return _small(count) + peer_sum_large.box_bytes(count) if count <= MOST else 0


def _small(count: int) -> int:
    return -(-peer_sum.box_bytes(count) // ALIGNMENT) * ALIGNMENT


def launch_of(record: Collective, boxes: Boxes, overlap: bool) -> Launch | None:
    """The launch of our own kernel for a collective; None if there is none."""
    if peer_sum.suits(record):
        return peer_sum.launch_of(record, boxes, overlap)
    if peer_sum_large.suits(record):
        return peer_sum_large.launch_of(record, boxes, _small(boxes.count), overlap)
    return None

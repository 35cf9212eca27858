"""Intervals and sizes in, arena offsets out. Pure: knows no tensors and no devices."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Interval:
    """A block of memory that is needed from step `start` to step `end`, both included."""

    start: int
    end: int
    nbytes: int


def pack(intervals: Sequence[Interval], alignment: int) -> tuple[list[int], int]:
    """Offsets such that no two intervals alive in the same step overlap, and the arena's size.

    In order of starts (larger first), each takes the smallest hole that fits, else the end;
    blocks return when their last step is over. About linear in the number of intervals.
    """
    sizes = [-(-i.nbytes // alignment) * alignment for i in intervals]
    order = sorted(range(len(intervals)), key=lambda k: (intervals[k].start, -sizes[k]))
    offsets = [0] * len(intervals)
    ends: list[tuple[int, int]] = []  # (last step, interval) of what is alive, soonest last
    holes = _Holes()
    for k in order:
        while ends and -ends[-1][0] < intervals[k].start:
            over = ends.pop()[1]
            holes.give(offsets[over], sizes[over])
        offsets[k] = holes.take(sizes[k])
        insort(ends, (-intervals[k].end, k))
    return offsets, holes.high


class _Holes:
    """Free blocks below the high-water mark, by offset; everything above it is free too."""

    def __init__(self) -> None:
        self.blocks: list[tuple[int, int]] = []  # (offset, size)
        self.high = 0

    def take(self, size: int) -> int:
        if size == 0:
            return 0
        best = min(
            (k for k, block in enumerate(self.blocks) if block[1] >= size),
            key=lambda k: self.blocks[k][1],
            default=None,
        )
        if best is not None:
            offset, free = self.blocks[best]
            self.blocks[best : best + 1] = [(offset + size, free - size)] if free > size else []
            return offset
        # A hole that touches the end is grown instead of left behind.
        offset = self.high
        if self.blocks and sum(self.blocks[-1]) == self.high:
            offset = self.blocks.pop()[0]
        self.high = offset + size
        return offset

    def give(self, offset: int, size: int) -> None:
        if size == 0:
            return
        insort(self.blocks, (offset, size))
        k = self.blocks.index((offset, size))
        if k + 1 < len(self.blocks) and offset + size == self.blocks[k + 1][0]:
            size += self.blocks.pop(k + 1)[1]
        if k > 0 and sum(self.blocks[k - 1]) == offset:
            k -= 1
            offset, size = self.blocks[k][0], self.blocks.pop(k)[1] + size
        self.blocks[k] = (offset, size)


def live_bytes(intervals: Sequence[Interval], n_steps: int) -> list[int]:
    """Bytes alive in each step: what no packing can go below."""
    change = [0] * (n_steps + 1)
    for interval in intervals:
        change[interval.start] += interval.nbytes
        change[interval.end + 1] -= interval.nbytes
    total, live = 0, []
    for delta in change[:n_steps]:
        total += delta
        live.append(total)
    return live

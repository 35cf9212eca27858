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

    Best fit in order of time; where that wastes memory and the problem is not huge, largest first
    is tried too. About linear in the number of intervals.
    """
    sizes = [-(-i.nbytes // alignment) * alignment for i in intervals]
    found = _in_time_order(intervals, sizes)
    n_steps = max((i.end for i in intervals), default=-1) + 1
    rounded = [Interval(i.start, i.end, size) for i, size in zip(intervals, sizes)]
    least = max(live_bytes(rounded, n_steps), default=0)
    if found[1] > least and sum(i.end - i.start + 1 for i in intervals) <= LARGEST_FIRST:
        found = min(found, _largest_first(intervals, sizes, n_steps), key=lambda made: made[1])
    return found


#: Steps of all lifetimes together, above which packing in order of time must do.
LARGEST_FIRST = 100_000


def _in_time_order(intervals: Sequence[Interval], sizes: Sequence[int]) -> tuple[list[int], int]:
    """In order of starts (larger first), each takes the smallest hole that fits, else the end."""
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


def _largest_first(
    intervals: Sequence[Interval], sizes: Sequence[int], n_steps: int
) -> tuple[list[int], int]:
    """Each, largest first, at the lowest offset that is free through its whole life."""
    offsets = [0] * len(intervals)
    placed: list[list[int]] = [[] for _ in range(n_steps)]  # what stands in each step
    for k in sorted(range(len(intervals)), key=lambda k: (-sizes[k], intervals[k].start)):
        life = range(intervals[k].start, intervals[k].end + 1)
        offset = 0
        for other in sorted({o for step in life for o in placed[step]}, key=offsets.__getitem__):
            if offset + sizes[k] <= offsets[other]:
                break
            offset = max(offset, offsets[other] + sizes[other])
        offsets[k] = offset
        if sizes[k]:
            for step in life:
                placed[step].append(k)
    return offsets, max((o + s for o, s in zip(offsets, sizes)), default=0)


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

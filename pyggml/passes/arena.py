"""Packs intervals into an arena: offsets from lifetimes and sizes, without tensors or devices."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Interval:
    """A block of memory that is needed from step `start` through step `end`."""

    start: int
    end: int
    nbytes: int


#: Largest sum of all lifetimes, in steps, for which the slower order is tried.
LARGEST_FIRST = 100_000


def pack(intervals: Sequence[Interval], alignment: int) -> tuple[list[int], int]:
    """The offset of each interval and the size of the arena. Intervals that are alive in the same
    step do not overlap.

    Takes the best fit in the order of time. If that wastes memory and the problem is not too large,
    tries the largest intervals first too. The time is about linear in the number of intervals.
    """
    sizes = [-(-i.nbytes // alignment) * alignment for i in intervals]
    packing = _in_time_order(intervals, sizes)
    n_steps = max((i.end for i in intervals), default=-1) + 1
    rounded = [Interval(i.start, i.end, size) for i, size in zip(intervals, sizes)]
    least = max(live_bytes(rounded, n_steps), default=0)
    if packing[1] > least and sum(i.end - i.start + 1 for i in intervals) <= LARGEST_FIRST:
        packing = min(packing, _largest_first(intervals, sizes, n_steps), key=lambda p: p[1])
    return packing


def _in_time_order(intervals: Sequence[Interval], sizes: Sequence[int]) -> tuple[list[int], int]:
    """By start, larger ones first, each in the smallest hole that fits, else at the end."""
    order = sorted(range(len(intervals)), key=lambda k: (intervals[k].start, -sizes[k]))
    offsets = [0] * len(intervals)
    ends: list[tuple[int, int]] = []  # (-last step, interval) of live intervals, soonest last
    holes = _Holes()
    for k in order:
        while ends and -ends[-1][0] < intervals[k].start:
            ended = ends.pop()[1]
            holes.give(offsets[ended], sizes[ended])
        offsets[k] = holes.take(sizes[k])
        insort(ends, (-intervals[k].end, k))
    return offsets, holes.high


def _largest_first(
    intervals: Sequence[Interval], sizes: Sequence[int], n_steps: int
) -> tuple[list[int], int]:
    """Largest first, each at the lowest offset that is free for its whole life."""
    offsets = [0] * len(intervals)
    placed: list[list[int]] = [[] for _ in range(n_steps)]  # step -> intervals alive in it
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
    """The free blocks below `high`, by offset. Everything above it is free too."""

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
        # If the last hole touches the end, use it and grow the arena by the difference.
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
    """The bytes alive in each step; no packing needs less than their maximum."""
    change = [0] * (n_steps + 1)
    for interval in intervals:
        change[interval.start] += interval.nbytes
        change[interval.end + 1] -= interval.nbytes
    total, live = 0, []
    for delta in change[:n_steps]:
        total += delta
        live.append(total)
    return live

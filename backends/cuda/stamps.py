"""The times of steps inside a CUDA graph, from time stamps at different places in copies of it.

A stamp is an event record in the captured graph. It costs about 1 us, and the kernel after it
cannot start before its predecessor has ended, so a stamp between all steps of 1 to 3 us would
measure the stamps. Here stamps are few, and their cost cancels. A graph has a stamp before every
PERIOD-th step and one more in each period: in graph number i, i steps after the first of the
period. Between the two are the first i steps, plus the same cost in every graph:

    step kP + i  =  (first i + 1 steps of period k)  -  (first i steps of period k)

The first step of a period is the difference of two graphs whose periods begin P / 2 steps earlier.
Of the very first step the cost of a stamp is subtracted. So PERIOD + 3 graphs see every step,
however long the plan is. Each is a complete run: its weights are as cold in L2, and its ids and
states as valid, as in any run. The graphs run in turn, so that a change of clocks touches them
alike. Each interval is the mean of the shorter half of its samples, because events may tick in
steps of 0.5 us.

The design that lost: graphs in which one step occurs k times more. Its weights are then in L2, so
a product of one column looks faster than it is; steps that work in place compute on their own
results, and states get values that no run gives them. It also takes a graph for each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

from pyggml.backends.cuda.device.context import Context
from pyggml.backends.cuda.device.driver import checked, guarded, imported

Action = Callable[[], None]
#: Captures all steps as graphs, with actions before some of them, by number.
Capture = Callable[[Mapping[int, Sequence[Action]]], Sequence[Action]]

PERIOD = 16


class Stamps:
    """Event records in a stream's capture; they are read after each run."""

    def __init__(self, context: Context) -> None:
        self._context, self._cu = context, imported("cuda.bindings.driver")
        self._events: list[Any] = []

    def __del__(self) -> None:
        with suppress(Exception), self._context:
            for event in self._events:
                self._cu.cuEventDestroy(event)

    def reserve(self, count: int) -> None:
        """Create the events of `count` stamps; not during a capture."""
        flags = self._cu.CUevent_flags.CU_EVENT_DEFAULT.value
        while len(self._events) < count:
            event = checked(self._cu, "creating an event", self._cu.cuEventCreate(flags))
            self._events.append(event)

    def record(self, number: int) -> None:
        """Add stamp `number` to the graph that is being captured."""
        cu = self._cu
        external = cu.CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL.value
        stream = cu.CUstream(self._context.stream.handle)
        status = cu.cuEventRecordWithFlags(self._events[number], stream, external)
        checked(cu, "recording a time stamp", status)

    def seconds(self, start: int, end: int) -> float:
        """The time between two stamps of the last run."""
        cu, events = self._cu, self._events
        status = cu.cuEventElapsedTime(events[start], events[end])
        milliseconds: float = checked(cu, "reading a time stamp", status)
        return milliseconds / 1e3


def places(count: int, period: int = PERIOD) -> Iterator[list[int]]:
    """Where each graph of `count` steps has its stamps: before these steps.

    The first has two at the start and one at the end, then come those for the steps inside periods,
    then two for the first steps of periods.
    """
    yield [0, 0, count]
    for length in range(1, period + 1):
        yield sorted({*_cuts(0, 0, count, period), *_cuts(0, length, count, period)})
    lead = period // 2
    for length in (lead, lead + 1):
        starts, ends = (_cuts(-lead, n, count, period) for n in (0, length))
        yield sorted({*starts, *ends})


def _cuts(start: int, length: int, count: int, period: int) -> list[int]:
    """The steps `length` after the start of each period, at most `count`."""
    return [min(at + length, count) for at in range(start, count, period) if at >= 0]


class GraphStopwatch:
    """Times the steps of a runner's graphs."""

    def __init__(self, context: Context, count: int, capture: Capture) -> None:
        self._context, self._count, self._capture = context, count, capture
        self._stamps = Stamps(context)
        self._places = list(places(count))
        self._graphs: dict[int, Sequence[Action]] = {}
        self._turn = 0
        #: (turn, number of the first stamp) -> seconds to the next stamp, a sample for each run
        self._samples: dict[tuple[int, int], list[float]] = {}
        self.turns = len(self._places)

    def run(self, turn: int) -> None:
        """Queue a run with the stamps of one turn, which is captured the first time."""
        self._turn = turn
        with self._context, guarded("replaying a graph"):
            if turn not in self._graphs:
                self._stamps.reserve(len(self._places[turn]))
                self._graphs[turn] = self._capture(self._stamped(self._places[turn]))
            for action in self._graphs[turn]:
                action()

    def _stamped(self, steps: Sequence[int]) -> dict[int, list[Action]]:
        """Step -> the stamps before it."""
        before: dict[int, list[Action]] = {}
        for number, step in enumerate(steps):
            before.setdefault(step, []).append(partial(self._stamps.record, number))
        return before

    def read(self) -> None:
        with self._context:
            for number in range(len(self._places[self._turn]) - 1):
                seconds = self._stamps.seconds(number, number + 1)
                self._samples.setdefault((self._turn, number), []).append(seconds)

    def seconds(self) -> list[float]:
        spans = [self._spans(turn) for turn in range(self.turns)]
        lead, cost = PERIOD // 2, self._mean(0, 0)
        times = []
        for step in range(self._count):
            start = step - step % PERIOD
            if step == 0:
                time = spans[1][0, 1] - cost
            elif step == start:
                early, late = spans[-2], spans[-1]
                time = late[step - lead, step + 1] - early[step - lead, step]
            else:
                length = step - start
                time = spans[length + 1][start, step + 1] - spans[length][start, step]
            times.append(max(time, 0.0))
        return times

    def whole(self) -> float:
        return max(self._mean(0, 1) - self._mean(0, 0), 0.0) if self._count else 0.0

    def _spans(self, turn: int) -> dict[tuple[int, int], float]:
        """(first step, step after the last) of each interval of a turn -> its seconds."""
        pairs = enumerate(pairwise(self._places[turn]))
        return {pair: self._mean(turn, number) for number, pair in pairs}

    def _mean(self, turn: int, number: int) -> float:
        """Of the shorter half of an interval's samples."""
        samples = sorted(self._samples[turn, number])
        half = samples[: (len(samples) + 1) // 2]
        return sum(half) / len(half)

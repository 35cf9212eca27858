"""What each step of a run costs: the interface between runners and `Plan.profile`.

A step of a small model takes 1 to 3 us on a GPU and not much more on a CPU, so it cannot be waited
for one by one: the wait takes longer than the step. A runner that can time its steps inside a run
offers a `Stopwatch`. Its runs are complete runs, so that states, ids and copies between devices
are those of any run. Runners without one are timed step by step, with a wait after each.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from statistics import fmean
from time import perf_counter
from typing import Protocol, runtime_checkable

from pyggml.backends.base import Kernels, Runner


class Stopwatch(Protocol):
    """Times the steps of one runner.

    turns  how many runs it takes to see every step once; each sees other steps
    """

    turns: int

    def run(self, turn: int) -> None:
        """As `Runner.run`, and take the times of this turn."""

    def read(self) -> None:
        """Keep the times of the last run. The device has finished it."""

    def seconds(self) -> list[float]:
        """The seconds of each step, from all runs so far."""

    def whole(self) -> float:
        """The seconds of all steps together, from a run that is not divided into steps; 0 if
        there was none."""


@runtime_checkable
class Timeable(Protocol):
    """A runner that times its steps inside a run, and names their kernels."""

    def stopwatch(self) -> Stopwatch:
        """A new stopwatch for the steps. The runner has run before."""

    def kernels(self, index: int) -> Kernels:
        """The kernels of one step; for a loop, those of all pieces."""


class Fastest:
    """A stopwatch whose runs time every step. The times are those of the fastest quarter of the
    runs, at least one; their mean.

    The design that lost: the shortest time of each step. Where several threads share a step, the
    one with the clock can be held up until the others have finished the next step. That one then
    seems to take no time, and in some run this happens to each of them.

    take  runs all steps once, and returns a function that gives the seconds of each once the device
          has finished
    """

    turns = 1

    def __init__(self, take: Callable[[], Callable[[], list[float]]]) -> None:
        self._take = take
        self._times: list[list[float]] = []
        self._pending: Callable[[], list[float]] | None = None

    def run(self, turn: int) -> None:
        self._pending = self._take()

    def read(self) -> None:
        assert self._pending is not None
        self._times.append(self._pending())

    def seconds(self) -> list[float]:
        runs = sorted(self._times, key=sum)
        fastest = runs[: max(len(runs) // 4, 1)]
        return [fmean(step) for step in zip(*fastest)]

    def whole(self) -> float:
        return 0.0


def step_by_step(runner: Runner, count: int, wait: Callable[[], None]) -> Fastest:
    """A stopwatch for any runner of `count` steps: it calls `wait` before and after each step."""

    def take() -> Callable[[], list[float]]:
        times = []
        wait()
        for index in range(count):
            start = perf_counter()
            runner.run_step(index)
            wait()
            times.append(perf_counter() - start)
        return lambda: times

    return Fastest(take)


def differences(marks: list[int]) -> list[float]:
    """The seconds between marks in nanoseconds that follow one another."""
    return [(end - start) / 1e9 for start, end in pairwise(marks)]

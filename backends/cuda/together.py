"""Splits of several GPUs of one process whose joint steps meet.

One thread queues the work of all. NCCL's calls for one joint step must stand in one group, or the
first would wait for the others, which come later. So all GPUs queue what comes before a turn, then
the turn itself in a group, then what is behind it in the same step, and so on: a call in a group is
queued when the group ends. The streams of all are captured at the same time in the same
way, each to a graph of its own.

If only some GPUs had got their work, these would wait for ever. An interrupt of the first run, or
an error, therefore ends what waits. Replays are started by one call, which Python cannot interrupt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from operator import call
from typing import Any

from pyggml.backends.cuda.device.driver import guarded
from pyggml.backends.cuda.device.nccl import Group
from pyggml.backends.cuda.runner import CudaRunner
from pyggml.joint import rounds


class Together:
    """The runner of these splits; the first run starts every launch, later ones replay graphs."""

    def __init__(self, runners: Sequence[CudaRunner]) -> None:
        self._runners = tuple(runners)
        self._rounds = list(rounds([[step.joint for step in r.steps] for r in self._runners]))
        self._graphs: list[Callable[[], object]] | None = None
        self._warm = False

    def run(self) -> None:
        for runner in self._runners:
            for end in runner.ends:
                end.check_usable()
        try:
            self._run()
        except BaseException:
            for runner in self._runners:
                runner.context.leave()
            raise

    def _run(self) -> None:
        if not self._warm or not all(r.in_graphs and not r.debugging for r in self._runners):
            self._walk()
            self._warm = True
            return
        if self._graphs is None:
            self._graphs = self._captured()
        calls = iter(self._graphs)
        try:
            with guarded("replaying a graph"):
                deque(map(call, calls), maxlen=0)
        except BaseException:
            if len(list(calls)) % 3 == 1:  # a launch failed, before the pop of its context
                self._runners[0].context.driver.Context.pop()
            raise

    def run_step(self, index: int) -> None:
        raise AssertionError("steps of several GPUs have no common numbers")

    def _walk(self) -> None:
        """Queue all steps."""
        done = [0] * len(self._runners)

        def go(number: int, end: int) -> None:
            for index in range(done[number], end):
                self._runners[number].run_step(index)
            done[number] = end

        for turn in self._rounds:
            for number, index in turn.items():
                go(number, index)
            with guarded("a collective"), Group():
                for number, index in turn.items():
                    self._runners[number].run_joint(index)
            for number, index in turn.items():
                self._runners[number].run_rest(index)
                done[number] = index + 1
        for number, runner in enumerate(self._runners):
            go(number, len(runner.steps))

    def _captured(self) -> list[Callable[[], object]]:
        """The calls that launch the graphs of all GPUs: push a context, launch, pop it."""
        streams: list[tuple[CudaRunner, Any]] = [(r, r.context.external) for r in self._runners]
        graphs = []
        with guarded("capturing a graph"), ExitStack() as stack:
            for runner, stream in streams:
                with runner.context:
                    stream.begin_capture()
                stack.callback(_end, runner, stream)  # even an interrupt must end the capture
            self._walk()
            for runner, stream in streams:
                with runner.context:
                    graphs.append((runner, stream, stream.end_capture()))
            stack.pop_all()
            for runner, stream, graph in graphs:
                with runner.context:
                    graph.upload(stream)
        return [
            each
            for runner, stream, graph in graphs
            for each in (
                runner.context.primary.push,
                partial(graph.launch, stream),
                runner.context.driver.Context.pop,
            )
        ]


def _end(runner: CudaRunner, stream: Any) -> None:
    with suppress(Exception), runner.context:
        stream.end_capture()

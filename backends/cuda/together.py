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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from operator import call
from typing import Any

from pyggml.backends.cuda.device.driver import guarded
from pyggml.backends.cuda.device.nccl import Group
from pyggml.backends.cuda.device.pinned import Staging
from pyggml.backends.cuda.runner import CudaRunner
from pyggml.joint import rounds

Action = Callable[[], object]

#: Other actions for some steps of a runner, by their numbers.
Instead = Mapping[int, Sequence[Action]]


class Together:
    """The runner of these splits; the first run starts every launch, later ones replay graphs."""

    def __init__(self, runners: Sequence[CudaRunner]) -> None:
        self.runners = tuple(runners)
        self._rounds = list(rounds([[step.joint for step in r.steps] for r in self.runners]))
        self._graphs: list[Action] | None = None
        self._warm = False

    def run(self) -> None:
        with self._ending_waits():
            if self.replays:
                if self._graphs is None:
                    self._graphs = self._captured()
                self._launch(self._graphs)
            else:
                self._walk()
                self._warm = True

    @property
    def stagings(self) -> list[Staging]:
        """That of each GPU."""
        return [runner.staging for runner in self.runners]

    @property
    def replays(self) -> bool:
        """Whether the next run consists of graphs."""
        return self._warm and all(r.in_graphs and not r.debugging for r in self.runners)

    def replay(self, graphs: Sequence[Action]) -> None:
        """Launch graphs of all GPUs that `writing` has made."""
        with self._ending_waits():
            self._launch(graphs)

    def writing(
        self, firsts: Sequence[Sequence[Action]], instead: Sequence[Instead]
    ) -> list[Action]:
        """The calls that launch graphs with other actions for some steps.

        firsts, instead  of each runner: actions before all steps, and those in place of steps. A
                         joint step that all of them replace takes no turn
        """
        with self._ending_waits():
            return self._captured(firsts, instead)

    @contextmanager
    def _ending_waits(self) -> Iterator[None]:
        """After an error, or an interrupt, GPUs that have got their work would wait for others."""
        for runner in self.runners:
            for end in runner.ends:
                end.check_usable()
        try:
            yield
        except BaseException:
            for runner in self.runners:
                runner.context.leave()
            raise

    def _launch(self, graphs: Sequence[Action]) -> None:
        calls = iter(graphs)
        try:
            with guarded("replaying a graph"):
                deque(map(call, calls), maxlen=0)
        except BaseException:
            if len(list(calls)) % 3 == 1:  # a launch failed, before the pop of its context
                self.runners[0].context.driver.Context.pop()
            raise

    def run_step(self, index: int) -> None:
        raise AssertionError("steps of several GPUs have no common numbers")

    def _walk(self, instead: Sequence[Instead] = ()) -> None:
        """Queue all steps."""
        done = [0] * len(self.runners)
        others: Sequence[Instead] = instead or [{}] * len(self.runners)

        def go(number: int, end: int) -> None:
            for index in range(done[number], end):
                self.runners[number].run_step(index, others[number].get(index))
            done[number] = end

        for turn in self._rounds:
            if all(index in others[number] for number, index in turn.items()):
                continue
            for number, index in turn.items():
                go(number, index)
            with guarded("a collective"), Group():
                for number, index in turn.items():
                    self.runners[number].run_joint(index)
            for number, index in turn.items():
                self.runners[number].run_rest(index)
                done[number] = index + 1
        for number, runner in enumerate(self.runners):
            go(number, len(runner.steps))

    def _captured(
        self, firsts: Sequence[Sequence[Action]] = (), instead: Sequence[Instead] = ()
    ) -> list[Action]:
        """The calls that launch the graphs of all GPUs: push a context, launch, pop it."""
        streams: list[tuple[CudaRunner, Any]] = [(r, r.context.external) for r in self.runners]
        graphs = []
        with guarded("capturing a graph"), ExitStack() as stack:
            for runner, stream in streams:
                with runner.context:
                    stream.begin_capture()
                stack.callback(_end, runner, stream)  # even an interrupt must end the capture
            for (runner, _), actions in zip(streams, firsts):
                with runner.context, guarded("starting a kernel"):
                    for action in actions:
                        action()
            self._walk(instead)
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

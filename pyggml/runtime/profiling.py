"""Measuring a profile.

The times are those of complete runs (`backends/timing.py`). `measure` runs the stopwatches of all
splits in the same runs. The split whose stopwatch needs most runs decides how many there are. In
several processes, each measures the splits of its device, and all get the times of all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from pyggml.backends.base import Backend, Event, Kernels, in_host_memory
from pyggml.backends.step import Step, own_nodes
from pyggml.backends.timing import Stopwatch, Timeable, step_by_step
from pyggml.errors import DeviceError
from pyggml.node import Node, labels, line_of
from pyggml.operation import cost_of
from pyggml.passes.work import Work
from pyggml.runtime.execution import Copy, Execution
from pyggml.runtime.kernels import kernels_of
from pyggml.runtime.layers import layers_of, layers_of_steps
from pyggml.runtime.profile import Phases, Profile, Timing
from pyggml.runtime.ranks import Ranks
from pyggml.runtime.report import expansions, main_op, name_of, text_of
from pyggml.transfer import origin, transfer


class _Undivided:
    """A run as any other. It keeps the shortest time of each split on the host, where issuing a
    split runs it."""

    carries = True

    def __init__(self, execution: Execution) -> None:
        self.runners = execution.runners
        self.on_host = [in_host_memory(split.backend) for split in execution.splits]
        self.whole: dict[int, float] = {}

    def copy(self, number: int, call: Copy, ends: Collection[Backend]) -> Event | None:
        return call()

    def compute(self, split: int) -> None:
        start = perf_counter()
        self.runners[split].run()
        time = perf_counter() - start
        if self.on_host[split]:
            self.whole[split] = min(time, self.whole.get(split, time))


class _Run:
    """A run under stopwatches; it sees the steps of one turn."""

    carries = False

    def __init__(
        self, watches: Mapping[int, Stopwatch], turn: int, copies: dict[int, float]
    ) -> None:
        self.watches, self.turn, self.copies = watches, turn, copies

    def copy(self, number: int, call: Copy, ends: Collection[Backend]) -> None:
        """Make a copy alone, with nothing else in the queues."""
        for end in ends:
            end.synchronize()
        start = perf_counter()
        event = call()
        if event is not None:
            event.wait()
        for end in ends:
            end.synchronize()
        time = perf_counter() - start
        self.copies[number] = min(time, self.copies.get(number, time))

    def compute(self, split: int) -> None:
        self.watches[split].run(self.turn % self.watches[split].turns)


def measure(execution: Execution, give: Callable[[], None], runs: int) -> Profile:
    """Profile an execution: each of its steps in `runs` runs."""
    work, exchange = execution.work, execution.exchange
    if execution.together:
        raise DeviceError(
            "a profile times the steps of each device alone, but these devices take some together; "
            "profile in a process for each device: mpiexec -n N, or --nproc N"
        )
    ranks = None if exchange is None else exchange.ranks
    owns = (lambda _: True) if exchange is None else exchange.owns
    execution.run(give)
    undivided = _Undivided(execution)
    phases = [Phases(*execution.phases(give, undivided)) for _ in range(runs + 1)]
    watches = {
        i: runner.stopwatch()
        if isinstance(runner, Timeable)
        else step_by_step(runner, len(split.steps), split.backend.synchronize)
        for i, (runner, split) in enumerate(zip(execution.runners, work.splits))
        if owns(split.backend)
    }
    turns = max((watch.turns for watch in watches.values()), default=0)
    if ranks is not None:
        turns = max(map(int, ranks.gather(str(turns))))
    copies: dict[int, float] = {}
    for _ in range(runs):
        for turn in range(turns):
            execution.watched(_Run(watches, turn, copies))
            for watch in watches.values():
                watch.read()
    whole = {i: undivided.whole.get(i, watch.whole()) for i, watch in watches.items()}
    times = _Times({i: list(watch.seconds()) for i, watch in watches.items()}, copies, whole)
    if ranks is not None:
        times = times.of_all(ranks)
    rows = tuple(_rows(work, execution, times))
    return Profile(
        rows,
        min(phases, key=lambda each: each.seconds),
        tuple(times.whole[i] for i in range(len(work.splits))),
        tuple(split.waits for split in work.splits),
        tuple(expansions(work)),
        elsewhere=frozenset(s.backend.place for s in work.splits if not owns(s.backend)),
    )


@dataclass(frozen=True, slots=True)
class _Times:
    """Seconds of the steps of each split, of copies by the number of their step, and of splits."""

    steps: dict[int, list[float]]
    copies: dict[int, float]
    whole: dict[int, float]

    def of_all(self, ranks: Ranks) -> _Times:
        """Those of all ranks."""
        parts = map(json.loads, ranks.gather(json.dumps([self.steps, self.copies, self.whole])))
        joined: tuple[dict[int, Any], ...] = {}, {}, {}
        for part in parts:
            for target, values in zip(joined, part):
                target |= {int(number): value for number, value in values.items()}
        return _Times(*joined)


def _rows(work: Work, execution: Execution, times: _Times) -> Iterator[Timing]:
    nodes = (*work.order, *own_nodes(work.order, work.steps))
    layers = layers_of_steps([step.node for step in work.steps], layers_of(nodes))
    runners = execution.runners if execution.exchange is None else ()
    about = zip(layers, kernels_of(work, runners))
    number = 0
    for i, split in enumerate(work.splits):
        place = split.backend.place
        for step in split.copies:
            yield _timing(step, i, place, *next(about), times.copies[number])
            number += 1
        for step, seconds in zip(split.steps, times.steps[i]):
            yield _timing(step, i, place, *next(about), seconds)
            number += 1


def _timing(
    step: Step, split: int, place: str, layer: int | None, kernels: Kernels, seconds: float
) -> Timing:
    node = step.node
    costs = [cost_of(inner) for inner in step.nodes]
    flops, nbytes = sum(c.flops for c in costs), sum(c.nbytes for c in costs)
    if node.op is transfer:
        flops, nbytes = 0.0, float(step.nbytes)
    return Timing(
        text=text_of(step), op=main_op(step), label=_label(step), layer=layer, spec=str(node.spec),
        place=place, split=split, line=line_of(origin(node)), kernels=kernels, seconds=seconds,
        flops=flops, nbytes=nbytes,
    )  # fmt: skip


def _label(step: Step) -> str:
    """The newest label of a step's result, else its op and the name of what it reads."""
    node = step.node
    if node.op is transfer:
        return f"copy({name_of(origin(node))})"
    names = labels(node)
    if names:
        return names[-1]
    weights = [name_of(source) for source in _named(step.reads)]
    return f"{node.op.name}({weights[0]})" if weights else node.op.name


def _named(nodes: Iterable[Node]) -> Iterator[Node]:
    """The weights and states among nodes."""
    return (origin(node.root) for node in nodes if origin(node.root).op.leaf)

"""Steps bound to device addresses: recorded once (recording.py), replayed, captured as CUDA graphs.

Addresses never change after binding, so a run of steps is captured as one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial

from pyggml.backends.base import Crossing, Event, Kernels
from pyggml.backends.cuda.ahead import Ahead
from pyggml.backends.cuda.checks import check_ids, debugging
from pyggml.backends.cuda.device.context import Context
from pyggml.backends.cuda.device.cublas import Cublas
from pyggml.backends.cuda.device.driver import guarded
from pyggml.backends.cuda.device.memory import Buffer
from pyggml.backends.cuda.device.nccl import Communicator
from pyggml.backends.cuda.device.pinned import Staging
from pyggml.backends.cuda.launch import Collective, Gemm, Launch, Record
from pyggml.backends.cuda.naming import kernels_of
from pyggml.backends.cuda.peers import Boxes
from pyggml.backends.cuda.recording import check_early, record_step, released_soon
from pyggml.backends.cuda.relay import Relay, relay
from pyggml.backends.cuda.rounds import with_own_sums
from pyggml.backends.cuda.stamps import GraphStopwatch
from pyggml.backends.cuda.weights.borrowing import Borrowing
from pyggml.backends.step import Address, PlannedBuffer, Step, kernel_error
from pyggml.backends.timing import Stopwatch, step_by_step
from pyggml.node import Node

Action = Callable[[], None]
_REPLAYING = guarded("replaying a graph")


class CudaRunner:
    """A plan's steps on a GPU. The first run starts every launch; later runs replay CUDA graphs.

    debugging  whether steps run one by one, with checks; read once, when the plan is bound
    loads      how steps that read a weight of the host in every run get it
    """

    def __init__(
        self,
        context: Context,
        steps: Sequence[Step],
        at: Mapping[Node, Address],
        scratch: Buffer,
        scratch_at: Sequence[int],
        loads: Mapping[Node, Borrowing],
        cublas: Callable[[], Cublas],
        staging: Staging,
    ) -> None:
        self.steps, self.context, self.staging = tuple(steps), context, staging
        self.at, self._scratch = at, scratch  # keeps the recorded addresses alive
        self._scratch_at = scratch_at
        #: What it meets other devices by.
        self.ends: set[Communicator] = set()
        self.debugging = debugging()
        self._loads = loads
        aside = not self.debugging and self.in_graphs
        self._ahead = Ahead(context, self.steps) if aside else None
        own = [self._recorded(index, at) for index in range(len(self.steps))]
        by_step = released_soon(self._with_sums(own))
        records = [record for step_records in by_step for record in step_records]
        check_early(records)
        context.load([record for record in records if isinstance(record, Launch)])
        has_gemm = any(isinstance(record, Gemm) for record in records)
        product = cublas().ready() if has_gemm else None
        self.actions = [
            self._load(step)
            if step.node in loads
            else [as_action(context, record, product) for record in step_records]
            for step, step_records in zip(self.steps, by_step)
        ]
        if self._ahead is not None:
            self.actions = [
                [*self._ahead.before(step), *actions]
                for step, actions in zip(self.steps, self.actions)
            ]
        self.records = by_step
        self._runs: list[Action] | None = None
        self._warm = False
        self._relay: Relay | None = None

    def _recorded(self, index: int, at: Mapping[Node, Address]) -> list[Record]:
        """The records of a step whose tensors are at these addresses."""
        step = self.steps[index]
        memory = (self._scratch.ptr + self._scratch_at[index], step.scratch)
        own = [] if step.node in self._loads else record_step(step, at, memory, self.context.about)
        return own if self._ahead is None else self._ahead.complete(step, own)

    def _load(self, step: Step) -> list[Action]:
        """What queues a weight."""
        actions = self._loads[step.node].actions
        if self._ahead is not None and step.node in self._ahead.events:
            return self._ahead.load(step, actions)
        return [partial(action, self.context.stream) for action in actions]

    def carry(self, arrivals: Sequence[Crossing], departures: Sequence[Crossing]) -> Event | None:
        with self.context:
            self._relay = relay(self.context, self.staging, arrivals, departures)
        return self._relay

    def _with_sums(self, by_step: Sequence[Sequence[Record]]) -> list[list[Record]]:
        """The records of all steps, with sums by our own kernels if the devices that meet have
        some."""
        ends = self.context.communicators
        for record in (record for records in by_step for record in records):
            if isinstance(record, Collective):
                self.ends.add(ends[record.places])

        def boxes_of(places: tuple[str, ...]) -> Boxes | None:
            box = ends[places].box
            return None if box is None else box.boxes

        return with_own_sums(self.steps, by_step, boxes_of, self.context.about.overlaps)

    def run(self) -> None:
        with self.context:
            self.queue()

    def queue(self) -> None:
        """Queue every step: kernel by kernel the first time, then as graphs. The context is
        current."""
        for end in self.ends:
            end.check_usable()
        relay = self._relay
        if relay is not None:
            relay.fill()
        if self.replays:
            if self._runs is None:
                self._runs = list(self._captured(self._around()))
            self.replay(self._runs)
        else:
            self._start_all()
        if relay is not None:
            relay.record()

    @property
    def replays(self) -> bool:
        """Whether the next run consists of graphs."""
        return self._warm and not self.debugging

    def replay(self, runs: Sequence[Action]) -> None:
        """Queue graphs. The context is current."""
        with _REPLAYING:
            for run in runs:
                run()

    def writing(self, index: int, ptr: int, first: Sequence[Action]) -> list[Action]:
        """Graphs of all steps, of which step `index`, whose kernels are ours, writes its result to
        another address. For a plan of one device; the context is current.

        first  actions before all steps
        """
        return list(self._captured({0: first}, {index: self.rewritten(index, ptr)}))

    def rewritten(self, index: int, ptr: int) -> list[Action]:
        """The actions of a step whose kernels are ours, with its result at another address. The
        context is current."""
        step, context = self.steps[index], self.context
        there = Address(PlannedBuffer(ptr), 0, self.at[step.node].nb)
        records = self._recorded(index, {**self.at, step.node: there})
        launches = [record for record in records if isinstance(record, Launch)]
        context.load(launches)
        actions: list[Action] = [] if self._ahead is None else self._ahead.before(step)
        return actions + [partial(context.start, launch) for launch in launches]

    def _start_all(self) -> None:
        around = self._around()
        for index in range(len(self.steps) + 1):
            with guarded("copying from or to the host"):
                for action in around.get(index, ()):
                    action()
            if index < len(self.steps):
                self._start(index)
        self._warm = True

    def _around(self) -> dict[int, Sequence[Action]]:
        """The copies from the host before the first step, and to the host after the last one."""
        relay = self._relay
        return {} if relay is None else {0: relay.before, len(self.steps): relay.after}

    @property
    def in_graphs(self) -> bool:
        """Whether all steps can be in one graph."""
        return all(load.in_graphs for load in self._loads.values())

    def run_step(self, index: int, instead: Sequence[Callable[[], object]] | None = None) -> None:
        """Queue one step, or other actions in its place."""
        with self.context:
            if instead is None:
                self._start(index)
            else:
                for action in instead:
                    action()

    def run_joint(self, index: int) -> None:
        """Queue a joint step up to its collective, which waits for the end of a group."""
        with self.context:
            self._start(index, last=self._joined(index))

    def run_rest(self, index: int) -> None:
        """Queue what is behind the collective of a joint step."""
        with self.context:
            self._start(index, first=self._joined(index))

    def _joined(self, index: int) -> int:
        """The number of actions of a step up to its collective; all, if it has none."""
        behind = 0
        for i, record in enumerate(reversed(self.records[index])):
            behind = i if isinstance(record, Collective) else behind
        return len(self.actions[index]) - behind

    def _start(self, index: int, first: int = 0, last: int | None = None) -> None:
        step = self.steps[index]
        try:
            if self.debugging:
                check_ids(self.staging, step, self.at)
            with guarded("starting a kernel"):
                for action in self.actions[index][first:last]:
                    action()
                # A joint step ends only when others have come to it, and is part of the next wait.
                if self.debugging and step.joint is None:
                    self.context.wait(self.context.stream)
        except Exception as error:
            raise kernel_error(error, step.node) from None

    def _captured(
        self,
        before: Mapping[int, Sequence[Action]] | None = None,
        instead: Mapping[int, Sequence[Action]] | None = None,
    ) -> Iterator[Action]:
        """Capture each sequence of steps as one graph; some loads cannot be part of one.

        before   further actions before these steps, which must be in a graph
        instead  other actions for these steps
        """
        further, least, others = before or {}, 1 if before else 2, instead or {}
        pending: list[Action] = []
        for index, (step, own) in enumerate(zip(self.steps, self.actions)):
            pending += further.get(index, ())
            actions = others.get(index, own)
            load = self._loads.get(step.node)
            if load is not None and not load.in_graphs:
                yield from self._graph(pending, least)
                pending = []
                yield from actions
            else:
                pending += actions
        pending += further.get(len(self.steps), ())
        yield from self._graph(pending, least)

    def _graph(self, actions: Sequence[Action], least: int) -> Sequence[Action]:
        """The actions as a graph if there are at least `least`."""
        if len(actions) < least:
            return actions
        stream = self.context.external
        with guarded("capturing a graph"):
            try:
                stream.begin_capture()
                for action in actions:
                    action()
                graph = stream.end_capture()
            except BaseException:  # even an interrupt must not leave the stream capturing
                with suppress(Exception):  # the capture may not have started or may have ended
                    stream.end_capture()
                raise
            graph.upload(stream)
        return [partial(graph.launch, stream)]

    # -- times --------------------------------------------------------------------------------

    def stopwatch(self) -> Stopwatch:
        """Time stamps in the graphs; one by one with PYGGML_CUDA_DEBUG."""
        if self.debugging:
            return step_by_step(self, len(self.steps), self._wait)

        def capture(before: Mapping[int, Sequence[Action]]) -> Sequence[Action]:
            return [*self._captured(before)]

        return GraphStopwatch(self.context, len(self.steps), capture)

    def _wait(self) -> None:
        with self.context:
            self.context.wait(self.context.stream)

    def kernels(self, index: int) -> Kernels:
        """What is launched for a step, and why not the fast kernel for its node."""
        step = self.steps[index]
        if step.node in self._loads:
            load = self._loads[step.node]
            why = "" if load.in_graphs else "the weight's pages could not be registered"
            return Kernels(("load",) * len(load.actions), why)
        return kernels_of(step, self.records[index])


def as_action(context: Context, record: Record, product: Callable[[Gemm], None] | None) -> Action:
    """A function that queues the record."""
    if isinstance(record, Launch):
        return partial(context.start, record)
    if isinstance(record, Gemm):
        assert product is not None
        return partial(product, record)
    if isinstance(record, Collective):
        return partial(context.communicators[record.places].call, record)
    copy = context.driver.memcpy_dtod_async
    return partial(copy, record.target, record.source, record.nbytes, context.stream)

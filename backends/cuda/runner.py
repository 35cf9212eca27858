"""Steps bound to device addresses: recorded once, replayed, captured as CUDA graphs.

Recording needs no GPU: `record_step` gives what a step launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from pyggml.backends.base import Address, Step, attributes, looked_at, named, pieces_of
from pyggml.backends.cuda.checks import check_ids, debugging
from pyggml.backends.cuda.device.cublas import Cublas
from pyggml.backends.cuda.device.driver import Context, guarded
from pyggml.backends.cuda.device.memory import Buffer, operand_at
from pyggml.backends.cuda.device.pinned import Staging
from pyggml.backends.cuda.fusion import CudaStep
from pyggml.backends.cuda.launch import H200, Call, Device, Gemm, Launch, Record
from pyggml.errors import PyggmlError
from pyggml.node import Node

Action = Callable[[], None]


def record_step(
    step: Step,
    at: Mapping[Node, Address],
    scratch: tuple[int, int],
    device: Device = H200,
) -> list[Record]:
    """What a step launches; `scratch`: address and bytes of what it declared."""
    if step.loop is not None:
        return list(_loop_records(step, at, scratch, device))
    return _recorded(step, at, step.node.attrs, device, scratch)


def _recorded(
    step: Step,
    at: Mapping[Node, Address],
    attrs: Mapping[str, Any],
    device: Device,
    scratch: tuple[int, int],
) -> list[Record]:
    assert isinstance(step, CudaStep)
    node = step.node
    tensors = {**step.operands, **step.results}
    operands = {name: operand_at(at[n], n.spec) for name, n in tensors.items()}
    call = Call(node, operand_at(at[node], node.spec), operands, attrs, device, scratch)
    try:
        step.record(call)
        if not step.workspace and any(isinstance(one, Gemm) for one in call.records):
            raise PyggmlError("the kernel calls cuBLAS, and its row in the table does not say so")
    except Exception as error:
        raise named(error, node) from None
    return call.records


def _loop_records(
    step: Step, at: Mapping[Node, Address], scratch: tuple[int, int], device: Device
) -> Iterator[Record]:
    """The launches of every piece, one after another."""
    plans = {plan.body: plan for plan in step.bodies}
    memory = _Memory(scratch[0])
    for body, starts, places in pieces_of(step, at):
        plan = plans[body]
        for node, spot in plan.spots.items():
            if spot.base is None:
                places[node] = Address(memory, spot.offset, spot.nb)
            elif spot.base is not node:
                places[node] = looked_at(node, places)
        for inner, offset in zip(plan.steps, plan.scratch_at):
            attrs = attributes(body, inner.node, starts)
            own = scratch[0] + offset, inner.scratch
            yield from _recorded(inner, places, attrs, device, own)


class _Memory:
    """A loop's scratch, as a buffer."""

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


class CudaRunner:
    """A plan's steps on a GPU. The first run starts each launch, later ones replay graphs.

    loads  steps that bring a constant from the host each time, which no graph can hold
    """

    def __init__(
        self,
        context: Context,
        steps: Sequence[Step],
        at: Mapping[Node, Address],
        scratch: Buffer,
        scratch_at: Sequence[int],
        loads: Mapping[Node, Action],
        cublas: Callable[[], Cublas],
        staging: Staging,
    ) -> None:
        self.steps, self.context, self._staging = tuple(steps), context, staging
        self._at, self._scratch = at, scratch  # kept: what is recorded lies in their memory
        recorded: list[list[Record]] = []
        for step, offset in zip(self.steps, scratch_at):
            memory = (scratch.ptr + offset, step.scratch)
            load = step.node in loads
            recorded.append([] if load else record_step(step, at, memory, context.about))
        everything = [one for records in recorded for one in records]
        context.load([one for one in everything if isinstance(one, Launch)])
        uses = any(isinstance(one, Gemm) for one in everything)
        product = cublas().ready() if uses else None
        self.actions = [
            [loads[step.node]]
            if step.node in loads
            else [as_action(context, one, product) for one in records]
            for step, records in zip(self.steps, recorded)
        ]
        self._runs: list[Action] | None = None
        self._warm = False
        self._loads = frozenset(i for i, s in enumerate(self.steps) if s.node in loads)

    def run(self) -> None:
        """Put every step into the stream: kernel by kernel the first time, then as graphs."""
        with self.context:
            if not self._warm or debugging():
                for index in range(len(self.steps)):
                    self._start(index)
                self._warm = True
                return
            if self._runs is None:
                self._runs = list(self._captured())
            with guarded("replaying a graph"):
                for run in self._runs:
                    run()

    def run_step(self, index: int) -> None:
        """Put one step into the stream."""
        with self.context:
            self._start(index)

    def _start(self, index: int) -> None:
        step = self.steps[index]
        try:
            if debugging():
                check_ids(self._staging, step, self._at)
            with guarded("starting a kernel"):
                for action in self.actions[index]:
                    action()
                if debugging():
                    self.context.stream.synchronize()
        except Exception as error:
            raise named(error, step.node) from None

    def _captured(self) -> Iterator[Action]:
        """Each run of steps between loads as one graph."""
        pending: list[Action] = []
        for index, actions in enumerate(self.actions):
            if index in self._loads:
                yield from self._graph(pending)
                pending = []
                yield from actions
            else:
                pending += actions
        yield from self._graph(pending)

    def _graph(self, actions: Sequence[Action]) -> Sequence[Action]:
        if len(actions) < 2:
            return actions
        stream = self.context.external
        with guarded("capturing a graph"):
            try:
                stream.begin_capture()
                for action in actions:
                    action()
                graph = stream.end_capture()
            except BaseException:  # an interrupt, too, must not leave the stream capturing
                with suppress(Exception):  # there may be no capture yet, or no longer
                    stream.end_capture()
                raise
            graph.upload(stream)
        return [partial(graph.launch, stream)]


def as_action(context: Context, one: Record, product: Callable[[Gemm], None] | None) -> Action:
    """A record as something to call."""
    if isinstance(one, Launch):
        return partial(context.start, one)
    if isinstance(one, Gemm):
        assert product is not None
        return partial(product, one)
    copy = context.driver.memcpy_dtod_async
    return partial(copy, one.target, one.source, one.nbytes, context.stream)

"""Steps bound to device addresses: recorded once, replayed, captured as CUDA graphs.

Recording needs no GPU: `record_step` gives what a step launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from pyggml.backends.base import Address, BodyPlan, Step
from pyggml.backends.cuda.checks import check_ids, debugging
from pyggml.backends.cuda.cublas import Cublas
from pyggml.backends.cuda.driver import Context, guarded
from pyggml.backends.cuda.fusion import fused_of
from pyggml.backends.cuda.launch import H200, Call, Device, Gemm, Launch, Memset, Record
from pyggml.backends.cuda.memory import Buffer, operand_at
from pyggml.backends.cuda.table import KERNELS
from pyggml.errors import PyggmlError
from pyggml.graph import Node, label_of, line_of
from pyggml.loop import Chain
from pyggml.transfer import origin

Action = Callable[[], None]


def record_step(
    step: Step,
    at: Mapping[Node, Address],
    scratch: tuple[int, int],
    device: Device = H200,
) -> list[Record]:
    """What a step launches; `scratch`: address and bytes of what it declared."""
    if step.loop is not None:
        return list(_Loop(step, at, scratch, device).records())
    return _recorded(step, at, step.node.attrs, device, scratch)


def _recorded(
    step: Step,
    at: Mapping[Node, Address],
    attrs: Mapping[str, Any],
    device: Device,
    scratch: tuple[int, int],
) -> list[Record]:
    node, fused = step.node, fused_of(step)
    reads = node.src if fused is None else fused.reads
    record = KERNELS[node.op].record if fused is None else fused.record
    src = [None if n is None else operand_at(at[n], n.spec) for n in reads]
    call = Call(node, operand_at(at[node], node.spec), src, attrs, device, scratch)
    try:
        record(call)
    except Exception as error:
        raise named(error, node) from None
    return call.records


def named(error: Exception, node: Node) -> Exception:
    """A kernel's complaint with the node and the line that built it; others get them as a note."""
    sources = ", ".join(label_of(origin(s)) for s in node.src if s is not None)
    what, where = f"{node.op.name}({sources})", f"at {line_of(node)}"
    if isinstance(error, PyggmlError):
        error.args = (f"{what}: {error}; {where}", *error.args[1:])
    else:
        error.add_note(f"in the kernel of {what}, {where}")
    return error


class _Loop:
    """A loop node: the launches of every piece, one after another."""

    def __init__(
        self, step: Step, at: Mapping[Node, Address], scratch: tuple[int, int], device: Device
    ) -> None:
        assert step.loop is not None
        self.loop, self.node, self.at, self.device = step.loop, step.node, at, device
        self.plans = {plan.body: plan for plan in step.bodies}
        self.scratch = scratch

    def records(self) -> Iterator[Record]:
        for body, starts in self.loop.pieces():
            axes = enumerate(self.loop.fill)
            chains = [Chain(dim, axis, ()) for dim, axis in axes if isinstance(axis, int)]
            out = _part(self.at[self.node], self.node, chains, starts)
            places = {body.out: out}
            if body.carry is not None:
                places[body.carry] = out
            for take in body.takes:
                source = self.node.src[take.source]
                assert source is not None
                places[take.piece] = _part(self.at[source], source, take.chains, starts)
            yield from self._body(self.plans[body], places, starts)

    def _body(
        self, plan: BodyPlan, places: dict[Node, Address], starts: Sequence[int]
    ) -> Iterator[Record]:
        memory = _Memory(self.scratch[0])
        for node, place in plan.places.items():
            if place.base is None:
                places[node] = Address(memory, place.offset, place.nb)
            elif place.base is not node:
                source = node.src[0]
                assert source is not None and node.op.view is not None
                seen = places[source]
                looked = node.op.view(node, seen.nb)
                assert looked is not None
                places[node] = Address(seen.buffer, seen.offset + looked[0], looked[1])
        for step, offset in zip(plan.steps, plan.scratch_at):
            attrs = dict(step.node.attrs)
            for shift in plan.body.shifts:
                if shift.node is step.node:
                    attrs[shift.attr] += shift.per * shift.chain.at(starts[shift.chain.dim])
            scratch = (self.scratch[0] + offset, step.scratch)
            yield from _recorded(step, places, attrs, self.device, scratch)


class _Memory:
    """A loop's scratch, as a buffer."""

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


def _part(at: Address, node: Node, chains: Sequence[Chain], starts: Sequence[int]) -> Address:
    """The address of the piece that begins where `chains` lead from `starts`."""
    offset = at.offset
    for chain in chains:
        first = chain.at(starts[chain.dim])
        offset += (first // node.dtype.block if chain.axis == 0 else first) * at.nb[chain.axis]
    return Address(at.buffer, offset, at.nb)


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
    ) -> None:
        self.steps, self.context = tuple(steps), context
        self._at, self._scratch = at, scratch  # kept: what is recorded lies in their memory
        recorded: list[list[Record]] = []
        for step, offset in zip(self.steps, scratch_at):
            memory = (scratch.ptr + offset, step.scratch)
            load = step.node in loads
            recorded.append([] if load else record_step(step, at, memory, context.about))
        everything = [one for records in recorded for one in records]
        context.load([one for one in everything if isinstance(one, Launch)])
        gemms = [one for one in everything if isinstance(one, Gemm)]
        if gemms:
            cublas().prepare(gemms)
        product = cublas().start if gemms else None
        self._actions = [
            [loads[step.node]]
            if step.node in loads
            else [_action(context, one, product) for one in records]
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
                check_ids(self.context, step, self._at)
            with guarded("starting a kernel"):
                for action in self._actions[index]:
                    action()
                if debugging():
                    self.context.stream.synchronize()
        except Exception as error:
            raise named(error, step.node) from None

    def _captured(self) -> Iterator[Action]:
        """Each run of steps between loads as one graph."""
        pending: list[Action] = []
        for index, actions in enumerate(self._actions):
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
            stream.begin_capture()
            try:
                for action in actions:
                    action()
            finally:
                graph = stream.end_capture()
            graph.upload(stream)
        return [partial(graph.launch, stream)]


def _action(context: Context, one: Record, product: Callable[[Gemm], None] | None) -> Action:
    """A record as something to call."""
    found, stream = context.driver, context.stream
    if isinstance(one, Launch):
        return partial(context.start, one)
    if isinstance(one, Gemm):
        assert product is not None
        return partial(product, one)
    if isinstance(one, Memset):
        return partial(found.memset_d8_async, one.ptr, one.byte, one.nbytes, stream)
    return partial(found.memcpy_dtod_async, one.target, one.source, one.nbytes, stream)

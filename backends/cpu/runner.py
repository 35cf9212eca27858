"""Steps bound to memory: native steps that follow one another as one program, others by NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import copy_context
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.base import Kernels
from pyggml.backends.cpu.native.pool import StoppedError, can_time, pool
from pyggml.backends.cpu.native.program import Program
from pyggml.backends.cpu.reasons import numpys, reason
from pyggml.backends.cpu.table import KERNELS, Call, CpuStep
from pyggml.backends.host_memory import address_of, array_at
from pyggml.backends.host_runner import kernel_call, kernel_settings
from pyggml.backends.pieces import piece_attributes, pieces_of, view_address
from pyggml.backends.step import (
    Address,
    Addresses,
    BodyPlan,
    Buffer,
    LoopStep,
    Step,
    check_id,
    check_position,
    kernel_error,
)
from pyggml.backends.table import Kernel, KernelTable
from pyggml.backends.timing import Fastest, Stopwatch, step_by_step
from pyggml.errors import IdError
from pyggml.node import Node
from pyggml.ops import causal_mask


class CpuRunner:
    """A plan's steps. Native steps that follow one another are one program.

    parts  in order: a program, or the call of a NumPy kernel
    more   whether the run goes on here after other devices' steps, so that threads wait awake
    """

    more = False

    def __init__(
        self,
        others: KernelTable[Kernel],
        steps: Sequence[Step],
        at: Addresses,
        scratch: NDArray[np.uint8],
        scratch_at: Sequence[int],
    ) -> None:
        self.steps, self.at, self.scratch = tuple(steps), at, scratch
        self._others = others
        self._parts: list[Program | Callable[[], None]] = []
        self._nodes: list[list[Node]] = []  # of each part: the node of each call
        self._spans: list[list[tuple[int, int, int]]] = []  # of each step: part, first call, end
        self._keep: list[Any] = []  # memory that arguments point to
        for step, offset in zip(self.steps, scratch_at):
            before = self._mark()
            memory = scratch[offset : offset + step.scratch]
            if isinstance(step, LoopStep):
                self._bind_loop(step, memory)
            else:
                self._bind(step, at, memory, step.node.attrs)
            self._spans.append(list(self._span(before)))
        for part in self._parts:
            if isinstance(part, Program):
                part.pack()
        self._all = [(part, 0, len(nodes)) for part, nodes in enumerate(self._nodes)]
        self._is_native = all(isinstance(part, Program) for part in self._parts)

    # -- binding ------------------------------------------------------------------------------

    def _bind(
        self,
        step: Step,
        at: Addresses,
        memory: NDArray[np.uint8],
        attrs: Mapping[str, Any],
    ) -> None:
        node = step.node
        if not isinstance(step, CpuStep):
            operands = [None if n is None else array_at(at[n], n.spec) for n in (node, *node.src)]
            self._parts.append(kernel_call(self._others, step, operands, memory, attrs))
            self._nodes.append([node])
            return
        if not self._parts or not isinstance(self._parts[-1], Program):
            self._parts.append(Program())
            self._nodes.append([])
        program = self._parts[-1]
        assert isinstance(program, Program)
        call = Call(program, node, at, address_of(memory), attrs)
        KERNELS[node.op].run(call)
        self._keep += call.keep
        self._nodes[-1] += [node] * (len(program) - len(self._nodes[-1]))

    def _bind_loop(self, step: LoopStep, memory: NDArray[np.uint8]) -> None:
        """Every step of every piece, in order."""
        bodies = {plan.body: plan for plan in step.bodies}
        for body, starts, places in pieces_of(step, self.at):
            plan = bodies[body]
            at = places_in(plan, places, memory)
            for inner, offset in zip(plan.steps, plan.scratch_at):
                attrs = piece_attributes(body, inner.node, starts)
                self._bind(inner, at, memory[offset : offset + inner.scratch], attrs)

    def _mark(self) -> tuple[int, int]:
        """The number of parts, and of calls in the last one."""
        return len(self._parts), len(self._nodes[-1]) if self._nodes else 0

    def _span(self, before: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
        """The calls added since the mark: part, first call, end."""
        parts, calls = before
        for part in range(max(parts - 1, 0), len(self._parts)):
            first = calls if part == parts - 1 else 0
            if first < len(self._nodes[part]):
                yield part, first, len(self._nodes[part])

    # -- running ------------------------------------------------------------------------------

    def run(self) -> None:
        """Execute every step in order."""
        self._run(self._all)

    def run_step(self, index: int) -> None:
        """Execute one step."""
        self._run(self._spans[index])

    def _run(
        self,
        spans: Sequence[tuple[int, int, int]],
        times: Sequence[NDArray[np.int64]] | None = None,
    ) -> None:
        """Run calls of parts; `times` receives those of each span."""
        if self._is_native:
            self._run_parts(spans, times)
        else:
            copy_context().run(self._run_with_numpy, spans, times)

    def _run_with_numpy(
        self, spans: Sequence[tuple[int, int, int]], times: Sequence[NDArray[np.int64]] | None
    ) -> None:
        kernel_settings()
        self._run_parts(spans, times)

    def _run_parts(
        self, spans: Sequence[tuple[int, int, int]], times: Sequence[NDArray[np.int64]] | None
    ) -> None:
        for span, (number, first, end) in enumerate(spans):
            part, nodes = self._parts[number], self._nodes[number]
            own = None if times is None else times[span]
            if isinstance(part, Program):
                more = self.more and span == len(spans) - 1
                try:
                    pool().run(part, first, end - first, own, more=more)
                except StoppedError as stop:
                    raise _id_error(stop.id, nodes[stop.call]) from None
            else:
                start = perf_counter_ns()
                try:
                    part()
                except Exception as error:
                    raise kernel_error(error, nodes[0]) from None
                if own is not None:
                    own[:, 1] = start, perf_counter_ns()

    # -- times --------------------------------------------------------------------------------

    def stopwatch(self) -> Stopwatch:
        """Thread 0 of a program takes the time between kernels, Python that between parts."""
        if not can_time():
            return step_by_step(self, len(self.steps), lambda: None)
        spans = self._all
        clocks = [np.zeros((count + 1, 2), np.int64) for _, _, count in spans]

        def take() -> Callable[[], list[float]]:
            self._run(spans, clocks)
            return lambda: self._seconds(clocks)

        return Fastest(take)

    def _seconds(self, clocks: Sequence[NDArray[np.int64]]) -> list[float]:
        """The seconds of each step from the times around the calls of each part."""
        marks = [clock[:, 0] * 10**9 + clock[:, 1] for clock in clocks]
        return [
            sum(int(marks[part][end] - marks[part][first]) for part, first, end in spans) / 1e9
            for spans in self._spans
        ]

    def kernels(self, index: int) -> Kernels:
        names: list[str] = []
        for number, first, end in self._spans[index]:
            part = self._parts[number]
            if isinstance(part, Program):
                names += part.names[first:end]
            else:
                names += [numpys(self._others, node) for node in self._nodes[number]]
        return Kernels(tuple(names), reason(self.steps[index]))


def places_in(
    plan: BodyPlan, pieces: Mapping[Node, Address], memory: Buffer
) -> dict[Node, Address]:
    """The address of every node of a body for one piece."""
    at = dict(pieces)
    for node, spot in plan.spots.items():
        if spot.base is None:
            at[node] = Address(memory, spot.offset, spot.nb)
        elif spot.base is not node and node not in at:
            at[node] = view_address(node, at)
    return at


def _id_error(id_: int, node: Node) -> Exception:
    """The error of a node that got an id past the end."""
    try:
        if node.op is causal_mask:
            check_position(id_, node.attrs["n_kv"], node.attrs["stride"])
        else:
            choice = node.op.ids
            assert choice is not None
            check_id(id_, node[choice.of].ne[choice.axis])
    except IdError as error:
        return kernel_error(error, node)
    raise AssertionError(id_)

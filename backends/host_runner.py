"""Steps bound to host memory: arrays built once, kernels called in order, loops piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import copy_context
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.base import Kernels
from pyggml.backends.host_memory import Array, Scratch, array_at
from pyggml.backends.pieces import piece_attributes, pieces_of, view_address
from pyggml.backends.step import (
    Address,
    Addresses,
    BodyPlan,
    LoopStep,
    Step,
    check_id,
    innermost,
    kernel_error,
)
from pyggml.backends.table import Kernel, KernelTable
from pyggml.backends.timing import Fastest, Stopwatch, differences
from pyggml.errors import PyggmlError
from pyggml.node import Node

Call = Callable[[], None]


def kernels_of(backend: str, kernels: KernelTable[Kernel], step: Step) -> Kernels:
    """The Python functions that compute a step; of a loop, those of each body."""
    return Kernels(tuple(f"{backend}.{kernels[s.node.op].name}" for s in innermost(step)))


class HostRunner:
    """A plan's steps with their arrays. `run` calls the kernels in order."""

    def __init__(
        self,
        backend: str,
        kernels: KernelTable[Kernel],
        steps: Sequence[Step],
        at: Addresses,
        scratch: NDArray[np.uint8],
        scratch_at: Sequence[int],
    ) -> None:
        self._backend, self._kernels = backend, kernels
        self.steps = tuple(steps)
        self.at = at
        self._calls: list[Call] = []
        for step, offset in zip(self.steps, scratch_at):
            memory = scratch[offset : offset + step.scratch]
            if isinstance(step, LoopStep):
                self._calls.append(_LoopCall(kernels, step, at, memory))
            else:
                arrays = [None if n is None else array_at(at[n], n.spec) for n in _operands(step)]
                self._calls.append(kernel_call(kernels, step, arrays, memory, step.node.attrs))

    def run(self) -> None:
        """Execute every step in order."""
        copy_context().run(self._run, range(len(self.steps)))

    def run_step(self, index: int) -> None:
        """Execute one step."""
        copy_context().run(self._run, (index,))

    def kernels(self, index: int) -> Kernels:
        return kernels_of(self._backend, self._kernels, self.steps[index])

    def stopwatch(self) -> Stopwatch:
        """The clock is read between steps."""

        def take() -> Callable[[], list[float]]:
            marks: list[int] = []
            copy_context().run(self._run, self._marked(marks))
            return lambda: differences(marks)

        return Fastest(take)

    def _marked(self, marks: list[int]) -> Iterator[int]:
        """The numbers of all steps; the time goes into `marks` before each, and at the end."""
        for index in range(len(self.steps)):
            marks.append(perf_counter_ns())
            yield index
        marks.append(perf_counter_ns())

    def _run(self, indices: Iterable[int]) -> None:
        kernel_settings()
        index = 0
        try:
            for index in indices:
                self._calls[index]()
        except Exception as error:
            raise kernel_error(error, self.steps[index].node) from None


def kernel_settings() -> None:
    """Make the NumPy settings that kernels expect: no floating-point warnings, and small ufunc
    buffers (strided operands take three).

    NumPy keeps these settings in the context. Call this in a copy of the context, so that they end
    with it, even after an error.
    """
    np.seterr(all="ignore")
    np.setbufsize(2048)


def _operands(step: Step) -> tuple[Node | None, ...]:
    return (step.node, *step.node.src)


def kernel_call(
    kernels: KernelTable[Kernel],
    step: Step,
    arrays: Sequence[Array | None],
    memory: NDArray[np.uint8],
    attrs: Mapping[str, Any],
) -> Call:
    """A function that runs the kernel of a step on arrays: the result, then the sources."""
    row = kernels[step.node.op]
    out = arrays[0]

    def call() -> None:
        _check_ids(step.node, arrays)
        if row.scratch is None:
            returned = row.run(*arrays, **attrs)
        else:
            returned = row.run(*arrays, scratch=Scratch(memory), **attrs)
        _require_filled(out, returned)

    return call


def _check_ids(node: Node, arrays: Sequence[Array | None]) -> None:
    """IdError if an id is past the end, so that kernels need not check theirs."""
    choice = node.op.ids
    if choice is not None:
        ids = arrays[1 + node.op.index(choice.operand)]
        if ids is None:  # an optional operand
            return
        assert isinstance(ids, np.ndarray)
        check_id(int(ids.max()), node[choice.of].ne[choice.axis])


def _require_filled(out: Array | None, returned: Any) -> None:
    """Raise if a kernel returned its result instead of writing it: `out` still has its old
    values."""
    if returned is not None and returned is not out:
        raise PyggmlError(
            f"the kernel returned a {type(returned).__name__}; it must write the result into `out` "
            "(out[...] = result) and return nothing"
        )


class _LoopCall:
    """A loop node: arrays fixed across pieces are built once, those of pieces when they run."""

    def __init__(
        self,
        kernels: KernelTable[Kernel],
        step: LoopStep,
        at: Addresses,
        memory: NDArray[np.uint8],
    ) -> None:
        self.step, self.at = step, at
        self.bodies = {plan.body: _BoundBody(kernels, plan, memory) for plan in step.bodies}

    def __call__(self) -> None:
        for body, starts, places in pieces_of(self.step, self.at):
            self.bodies[body].run(places, starts)


class _BoundBody:
    def __init__(
        self, kernels: KernelTable[Kernel], plan: BodyPlan, memory: NDArray[np.uint8]
    ) -> None:
        self.kernels, self.plan = kernels, plan
        self.fixed: dict[Node, Array] = {}
        self.moving: list[Node] = []  # views of pieces, sources first
        for node, spot in plan.spots.items():
            if spot.base is None:
                at = Address(memory, spot.offset, spot.nb)
                self.fixed[node] = array_at(at, node.spec)
            elif spot.base is not node:
                self.moving.append(node)
        self.scratch = [
            memory[offset : offset + step.scratch]
            for step, offset in zip(plan.steps, plan.scratch_at)
        ]

    def run(self, pieces: dict[Node, Address], starts: Sequence[int]) -> None:
        for node in self.moving:
            pieces[node] = view_address(node, pieces)
        arrays = dict(self.fixed)
        for node, at in pieces.items():
            arrays[node] = array_at(at, node.spec)
        for step, memory in zip(self.plan.steps, self.scratch):
            attrs = piece_attributes(self.plan.body, step.node, starts)
            operands = [None if n is None else arrays[n] for n in _operands(step)]
            kernel_call(self.kernels, step, operands, memory, attrs)()

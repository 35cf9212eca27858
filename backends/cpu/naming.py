"""The names of the native kernels that a step runs, without compiling them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.native.program import Program
from pyggml.backends.cpu.reasons import numpys
from pyggml.backends.cpu.runner import places_in
from pyggml.backends.cpu.table import KERNELS, Call, CpuStep
from pyggml.backends.pieces import piece_attributes, pieces_of
from pyggml.backends.step import Addresses, LoopStep, PlannedBuffer, Step
from pyggml.backends.table import Kernel, KernelTable


class _Names(Program):
    """A program that only notes the names of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def add(self, kernel: Native, *values: int | float, **named: Any) -> None:
        self.names.append(kernel.name)


def names_of(step: Step, at: Addresses, scratch: int, others: KernelTable[Kernel]) -> list[str]:
    """The calls of a step by name; see `NamesKernels`.

    others  the table of the nodes without a native kernel
    """
    if isinstance(step, LoopStep):
        return list(_loop(step, at, scratch, others))
    return _names(step, at, scratch, step.node.attrs, others)


def _names(
    step: Step,
    at: Addresses,
    scratch: int,
    attrs: Mapping[str, Any],
    others: KernelTable[Kernel],
) -> list[str]:
    if not isinstance(step, CpuStep):
        return [numpys(others, step.node)]
    program = _Names()
    KERNELS[step.node.op].run(Call(program, step.node, at, scratch, attrs))
    return program.names


def _loop(
    step: LoopStep, at: Addresses, scratch: int, others: KernelTable[Kernel]
) -> Iterator[str]:
    """Those of the first piece of each body."""
    plans = {plan.body: plan for plan in step.bodies}
    memory = PlannedBuffer(scratch)
    for body, starts, places in pieces_of(step, at):
        plan = plans.pop(body, None)
        if plan is None:
            continue
        inside = places_in(plan, places, memory)
        for inner, offset in zip(plan.steps, plan.scratch_at):
            attrs = piece_attributes(body, inner.node, starts)
            yield from _names(inner, inside, scratch + offset, attrs, others)

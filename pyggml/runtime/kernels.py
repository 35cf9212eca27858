"""The kernels of each step, and why not the fast ones: for profiles, traces and pages.

A plan that is bound names those that its runners start. Before that, its backends name those that
they would start, at planned addresses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count

from pyggml.backends.base import Backend, Kernels, NamesKernels, Runner
from pyggml.backends.step import Address, Addresses, PlannedBuffer, Step
from pyggml.backends.timing import Timeable
from pyggml.node import Node
from pyggml.passes.work import Split, Work
from pyggml.runtime.execution import addresses

#: Planned blocks of memory are this far apart, so that none overlap; aligned for every device.
_APART = 1 << 44


def kernels_of(work: Work, runners: Sequence[Runner] = ()) -> list[Kernels]:
    """The kernels of all steps, in their order. Those of backends that cannot tell have no names.

    runners  of each split, if the plan is bound. Otherwise no device is needed, and a loop has the
             kernels of the first piece of each body
    """
    if runners:
        named = [list(_bound(split, runner)) for split, runner in zip(work.splits, runners)]
    else:
        named = list(_planned(work))
    kernels: list[Kernels] = []
    for split, own in zip(work.splits, named):
        kernels += [Kernels(("copy",))] * len(split.copies)
        for step, each in zip(split.steps, own):
            kernels.append(replace(each, why=each.why or _elsewhere(work, step, split.backend)))
    return kernels


def _bound(split: Split, runner: Runner) -> Iterator[Kernels]:
    for index in range(len(split.steps)):
        yield runner.kernels(index) if isinstance(runner, Timeable) else Kernels()


def _planned(work: Work) -> Iterator[list[Kernels]]:
    """Of the steps of each split."""
    at, arenas = planned_memory(work)
    number = 0
    for split in work.splits:
        number += len(split.copies)
        backend, own = split.backend, []
        for step in split.steps:
            scratch = arenas[backend.device].ptr + work.placed.scratch_at[number]
            own.append(
                backend.kernels_of(step, at, scratch)
                if isinstance(backend, NamesKernels)
                else Kernels()
            )
            number += 1
        yield own


def planned_memory(work: Work) -> tuple[Addresses, dict[str, PlannedBuffer]]:
    """The addresses of all tensors, and the arenas, in memory that nobody has allocated."""
    blocks = (PlannedBuffer(_APART * i) for i in count(1))
    leaves: dict[Node, Address] = {}
    for node in work.leaves:
        layout = work.layouts.get(node)
        name = "plain" if layout is None else layout.name
        leaves[node] = Address(next(blocks), 0, node.nb, name)
    arenas = {device: next(blocks) for device in work.placed.arenas}
    return addresses(work, leaves, arenas), arenas


def _elsewhere(work: Work, step: Step, backend: Backend) -> str:
    """Why the first backend does not run a step that runs on a later one; empty if it could."""
    first = work.backends[0]
    why = None if backend is first else first.supports(step.node)
    return f"not on {first.place}: {why}" if why else ""

"""The launches of a step, recorded when it is bound. Needs no GPU.

The tests record every case of the parity grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from pyggml.backends.cuda.device.memory import operand_at
from pyggml.backends.cuda.fusion import CudaStep
from pyggml.backends.cuda.gpu import H200, Device
from pyggml.backends.cuda.launch import Call, Collective, Gemm, Launch, Record
from pyggml.backends.pieces import piece_attributes, pieces_of, view_address
from pyggml.backends.step import Address, LoopStep, PlannedBuffer, Step, kernel_error
from pyggml.errors import PyggmlError
from pyggml.node import Node


def record_step(
    step: Step,
    at: Mapping[Node, Address],
    scratch: tuple[int, int],
    device: Device = H200,
    *,
    names_only: bool = False,
) -> list[Record]:
    """The launches of a step.

    scratch     address and size in bytes of the declared scratch
    names_only  record what can be recorded without a driver: tensor maps are empty, and of a loop
                there is only the first piece of each body
    """
    if isinstance(step, LoopStep):
        return list(_loop_records(step, at, scratch, device, names_only))
    return _record(step, at, step.node.attrs, device, scratch, names_only)


def check_early(records: Sequence[Record]) -> None:
    """PyggmlError if a launch that reads before it waits comes right behind one of a library.

    Our kernels wait for their predecessors before they let a successor start, so what was written
    before them is complete (overlap.cuh). One of cuBLAS or NCCL need not wait.
    """
    for before, record in pairwise(records):
        if isinstance(record, Launch) and record.early and isinstance(before, (Gemm, Collective)):
            library = "cuBLAS" if isinstance(before, Gemm) else "NCCL"
            raise PyggmlError(
                f"{record.name} reads before it waits, right behind a launch of {library}; record "
                "it with early=False, or a launch between them"
            )


def released_soon(by_step: Sequence[Sequence[Record]]) -> list[list[Record]]:
    """The records of all steps, with launches that let a patient successor start before they wait.

    Then two earlier launches may still run when that one starts, which reads none of their results
    before it waits, and has seen their end when it lets its own successor start (overlap.cuh).
    """
    after = [record for records in by_step for record in records][1:]
    nexts = iter([*after, None])

    def chosen(record: Record) -> Record:
        behind = next(nexts)
        if not isinstance(record, Launch) or not isinstance(behind, Launch):
            return record
        soon = record.soon if behind.patient and behind.overlap else ""
        return replace(record, name=soon) if soon else record

    return [[chosen(record) for record in records] for records in by_step]


def _record(
    step: Step,
    at: Mapping[Node, Address],
    attrs: Mapping[str, Any],
    device: Device,
    scratch: tuple[int, int],
    names_only: bool,
) -> list[Record]:
    assert isinstance(step, CudaStep)
    node = step.node
    tensors = {**step.operands, **step.results}
    operands = {name: operand_at(at[n], n.spec) for name, n in tensors.items()}
    call = Call(node, operand_at(at[node], node.spec), operands, attrs, device, scratch)
    call.names_only, call.late, call.awaited = names_only, step.late, step.awaited()
    call.unread = step.unread
    try:
        step.record(call)
        if not step.workspace and any(isinstance(record, Gemm) for record in call.records):
            raise PyggmlError(
                "the kernel calls cuBLAS but does not declare it; register it with `cublas=`"
            )
    except Exception as error:
        raise kernel_error(error, node) from None
    return call.records


def _loop_records(
    step: LoopStep,
    at: Mapping[Node, Address],
    scratch: tuple[int, int],
    device: Device,
    names_only: bool,
) -> Iterator[Record]:
    """The launches of the pieces, one after another."""
    plans = {plan.body: plan for plan in step.bodies}
    memory = PlannedBuffer(scratch[0])
    for body, starts, places in pieces_of(step, at):
        plan = plans.pop(body, None) if names_only else plans[body]
        if plan is None:
            continue
        for node, spot in plan.spots.items():
            if spot.base is None:
                places[node] = Address(memory, spot.offset, spot.nb)
            elif spot.base is not node:
                places[node] = view_address(node, places)
        for inner, offset in zip(plan.steps, plan.scratch_at):
            attrs = piece_attributes(body, inner.node, starts)
            memory_of_step = scratch[0] + offset, inner.scratch
            yield from _record(inner, places, attrs, device, memory_of_step, names_only)

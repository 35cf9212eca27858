"""What `lower` makes: steps that know how they are recorded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from pyggml.backends.base import Step
from pyggml.backends.cuda import table
from pyggml.backends.cuda.fusion import Fused, fused
from pyggml.backends.cuda.launch import WORKSPACE, Call
from pyggml.backends.cuda.linear.fixed_point import shared
from pyggml.node import Node


def _nothing(call: Call) -> None:
    raise NotImplementedError


@dataclass(eq=False, slots=True)
class CudaStep(Step):
    """A step of our kernels.

    operands  what becomes `call.src`: `reads`, and None for an absent source
    also      what becomes `call.also`
    record    called when a plan is bound
    """

    operands: tuple[Node | None, ...] = ()
    also: tuple[Node, ...] = ()
    record: Callable[[Call], None] = _nothing


def lower(nodes: Sequence[Node], keep: Collection[Node], fuse: bool = True) -> list[Step]:
    """Patterns as one step, what several products read prepared once, and a step for each other
    node; without `fuse` a step for each node."""
    return [_step(part) for part in (shared(fused(nodes, keep)) if fuse else nodes)]


def _step(part: Node | Fused) -> CudaStep:
    if isinstance(part, Fused):
        return CudaStep(
            part.nodes[-1],
            part.nodes,
            part.reads,
            scratch=part.scratch,
            inplace=part.inplace,
            operands=part.reads,
            also=part.also,
            record=part.record,
        )
    row = table.KERNELS[part.op]
    workspace = WORKSPACE if row.cublas(part) else 0
    return table.KERNELS.step(
        part, CudaStep, workspace=workspace, operands=part.src, record=row.run
    )

"""Lowering: from nodes to steps that can record their launches."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from pyggml import ops
from pyggml.backends.cuda import table
from pyggml.backends.cuda.attention.absorb import with_rows
from pyggml.backends.cuda.fusion import NO_LAYOUTS, CudaStep, Fused, covered
from pyggml.backends.cuda.launch import WORKSPACE
from pyggml.backends.cuda.linear.behind_norm import with_norms
from pyggml.backends.cuda.linear.joined import join
from pyggml.backends.cuda.linear.preparation import left_unread, prepare_once
from pyggml.backends.cuda.linear.routes import FEW_PAIRS
from pyggml.backends.cuda.patterns import PATTERNS
from pyggml.backends.cuda.small import gather
from pyggml.backends.cuda.token_rows import together
from pyggml.backends.step import Layouts, Step
from pyggml.node import Node
from pyggml.ops.leaf import state_op

#: Ops whose steps may launch nothing, or copy without a kernel.
SILENT = (ops.cast, ops.concat, ops.cont, ops.cpy, ops.repeat)
#: How many steps behind a product by expert may move ahead of it.
AHEAD = 4


def lower(
    nodes: Sequence[Node], keep: Collection[Node], fuse: bool = True, layouts: Layouts = NO_LAYOUTS
) -> list[Step]:
    """The steps that compute `nodes`: one step per pattern match and per remaining node, one for
    everything prepared for several products, and one for products or small ops that share a
    launch.
    fuse=False: one step per node."""
    if not fuse:
        return [step_of(node) for node in nodes]
    parts = covered(nodes, keep, PATTERNS, layouts)
    steps = [*prepare_once([p if isinstance(p, Fused) else step_of(p) for p in parts])]
    steps = [*with_norms([*join(steps)], keep, layouts, step_of)]
    steps = [*together(spaced([*gather([*with_rows(steps)], keep)]))]
    return [*timely([*left_unread(steps, keep)])]


def spaced(steps: list[CudaStep]) -> list[CudaStep]:
    """The steps, with products that need no ids moved between a routing and a few products by
    expert: shared experts, in a model. Their weights are on their way while the routing runs, and
    those of the experts then need not wait for ids."""
    for i in range(1, len(steps)):
        ids = _ids(steps[i])
        if ids is None or ids not in steps[i - 1].nodes or ids.spec.elements > FEW_PAIRS:
            continue
        waits, moved, others = set(steps[i].nodes), list[CudaStep](), [steps[i]]
        for step in steps[i + 1 : i + 1 + AHEAD]:
            free = not any(read.base in waits or read.root.op is state_op for read in step.reads)
            if free and len(step.nodes) == 1 and step.node.op.weights:
                moved.append(step)
            else:
                waits.update(step.nodes)
                others.append(step)
        steps[i : i + 1 + AHEAD] = moved + others
    return steps


def timely(steps: list[CudaStep]) -> list[CudaStep]:
    """The steps, each knowing what the launch right before computes, and whether its ids may be
    incomplete when it may start: that launch computes them, or it is one of cuBLAS or NCCL, which
    need not wait for those before it."""
    before: tuple[Node, ...] | None = None  # what that launch computes; unknown for the first
    for step in steps:
        ids = _ids(step)
        step.late = ids is not None and (before is None or ids in before)
        step.before = before
        if step.workspace or step.joint is not None:
            before = None
        elif step.node.op not in SILENT:
            before = step.nodes
        elif before is not None:
            before = (*before, *step.nodes)
    return steps


def _ids(step: CudaStep) -> Node | None:
    """The ids of a product by expert."""
    op = step.node.op
    if op.ids is None or not op.weights or len(step.nodes) > 1:
        return None
    return step.node[op.ids.operand].base


def step_of(node: Node) -> CudaStep:
    """The step of one node, from the kernel table."""
    row = table.KERNELS[node.op]
    operands = {name: s for name in node.op.operands if (s := node.get(name)) is not None}
    workspace = WORKSPACE if row.cublas(node) else 0

    def make(_: Node, nodes: tuple[Node, ...], reads: object, **fields: Any) -> CudaStep:
        return CudaStep(nodes, operands, row.run, **fields)

    step = table.KERNELS.step(node, make, workspace=workspace)
    step.strided = not node.op.joint  # a library fills memory without gaps
    return step

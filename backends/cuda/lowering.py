"""Lowering: from nodes to steps that can record their launches."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from pyggml.backends.cuda import table
from pyggml.backends.cuda.fusion import CudaStep, Fused, covered
from pyggml.backends.cuda.launch import WORKSPACE
from pyggml.backends.cuda.linear.preparation import prepare_once
from pyggml.backends.cuda.patterns import PATTERNS
from pyggml.backends.step import Step
from pyggml.node import Node


def lower(nodes: Sequence[Node], keep: Collection[Node], fuse: bool = True) -> list[Step]:
    """The steps that compute `nodes`: one step per pattern match and per remaining node, and one
    for everything prepared for several products. fuse=False: one step per node."""
    if not fuse:
        return [step_of(node) for node in nodes]
    parts = covered(nodes, keep, PATTERNS)
    return list(prepare_once([p if isinstance(p, Fused) else step_of(p) for p in parts]))


def step_of(node: Node) -> CudaStep:
    """The step of one node, from the kernel table."""
    row = table.KERNELS[node.op]
    operands = {name: s for name in node.op.operands if (s := node.get(name)) is not None}
    workspace = WORKSPACE if row.cublas(node) else 0

    def make(_: Node, nodes: tuple[Node, ...], reads: object, **fields: Any) -> CudaStep:
        return CudaStep(nodes, operands, row.run, **fields)

    return table.KERNELS.step(node, make, workspace=workspace)

"""Why NumPy's kernels run a step: for profiles and pages, so that no path is slow in silence."""

from __future__ import annotations

from pyggml.backends.cpu.table import KERNELS, CpuStep
from pyggml.backends.step import Step, innermost
from pyggml.backends.table import Kernel, KernelTable
from pyggml.node import Node


def numpys(others: KernelTable[Kernel], node: Node) -> str:
    """The name of NumPy's kernel for a node, from NumPy's table."""
    return f"numpy.{others[node.op].name}"


def reason(step: Step) -> str:
    """Why a step, or a part of a loop, has no native kernel; empty if all of it has."""
    phrases = (
        KERNELS.refusal(each.node) or "the layout of its weights is that of NumPy's kernel"
        for each in innermost(step)
        if not isinstance(each, CpuStep)
    )
    return "; ".join(dict.fromkeys(phrases))

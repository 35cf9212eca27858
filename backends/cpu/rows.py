"""Loops over rows: how kernels of elementwise ops and norms find the rows of strided tensors."""

from __future__ import annotations

from pyggml.node import Node

#: Types of rows that native kernels read and write. (Weights in tiles are another matter.)
READABLE = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")
WRITABLE = tuple(name for name in READABLE if name != "iq4_nl")  # whose encoder is a search


def adjacent(*nodes: Node | None) -> bool:
    """Whether the elements of each row are next to each other in memory."""
    return all(n is None or n.ne[0] == 1 or n.nb[0] == n.dtype.nbytes for n in nodes)


def row_refusal(node: Node) -> str | None:
    """Why a kernel that reads rows cannot run the node; None if it can."""
    if adjacent(node, *node.src):
        return None
    return f"{node.op.name} needs rows whose elements are adjacent"

"""The transfer node: a copy of a tensor in another device's memory.

A copy between devices is a node. Interning makes each copy happen once, every pass and report
sees it, its memory is planned like any other, and kernels need not know about it. The design that
lost keeps an address for each (tensor, device): placement, binding, views and reports would all
have to ask which device is meant.

If two devices read a weight or an input, the store gives it to both. Other tensors are copied, and
only the rows that are read.
"""

from __future__ import annotations

from pyggml.node import Node
from pyggml.operation import Op
from pyggml.spec import Spec
from pyggml.traits import Cost


def _rule(a: Node, *, to: str, resident: bool) -> Spec:
    """A copy of `a` on the device of the place `to`.

    resident  `a` is a leaf, and the store keeps its copy: runs do not copy it
    """
    return a.spec


def _cost(node: Node) -> Cost:
    return Cost(0.0, 2.0 * node.spec.nbytes, sent=float(node.spec.nbytes))


transfer = Op(_rule, name="transfer", cost=_cost)


def is_resident(node: Node) -> bool:
    """Whether the store owns the node's memory: true for leaves and resident transfers."""
    return node.op.leaf or (node.op is transfer and bool(node.attrs["resident"]))


def origin(node: Node) -> Node:
    """The tensor that a transfer copies; any other node itself."""
    return node["a"] if node.op is transfer else node

"""The transfer node: a copy of a tensor in another device's memory.

A copy between devices is a node and not an entry in a side table: hash-consing makes it happen
once, it has one lifetime, every pass and every report sees it, and kernels need not know about
it. The other design, addresses by (tensor, device), would make placement, binding, views and
reports each ask which device is meant. Weights and inputs that two devices read are given to both
by the store; everything else is copied, and only the rows that are read.
"""

from __future__ import annotations

from pyggml.node import Node
from pyggml.operation import Op
from pyggml.spec import Spec
from pyggml.traits import Cost


def _rule(a: Node, *, to: str, resident: bool) -> Spec:
    """A copy of `a` on the place `to`.

    resident  the store keeps the copy of the leaf `a` on this device; runs do not copy it
    """
    return a.spec


def _cost(node: Node) -> Cost:
    return Cost(0.0, 2.0 * node.spec.nbytes)


transfer = Op(_rule, name="transfer", cost=_cost)


def is_resident(node: Node) -> bool:
    """Whether the node's memory is in the store: leaves and resident transfers."""
    return node.op.leaf or (node.op is transfer and bool(node.attrs["resident"]))


def origin(node: Node) -> Node:
    """The source of a transfer; any other node itself."""
    return node["a"] if node.op is transfer else node

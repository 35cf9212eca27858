"""The transfer node: a tensor of one device in the memory of another."""

from __future__ import annotations

from pyggml.node import Cost, Node, Op, Spec


def _rule(a: Node, *, to: str, resident: bool) -> Spec:
    """`a` on the place `to`.

    resident  a leaf that is given to this device as well, once: no copy during a run
    """
    return a.spec


def _cost(node: Node) -> Cost:
    return Cost(0.0, 2.0 * node.spec.nbytes)


transfer = Op(_rule, name="transfer", cost=_cost)


def is_resident(node: Node) -> bool:
    """Whether the store holds the node's memory: leaves, and what is given to a second device."""
    return node.op.leaf or (node.op is transfer and bool(node.attrs["resident"]))


def origin(node: Node) -> Node:
    """The node itself, or what a transfer brings."""
    return node["a"] if node.op is transfer else node

"""Arithmetic operators on nodes: `x + y`, `x * 2.0`, `-x`. What each one builds is up to ops/."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, Union

if TYPE_CHECKING:
    from pyggml.node import Node

#: A node, or a number of Python's or NumPy's.
Operand: TypeAlias = Union["Node", float]


class Arithmetic:
    """The operators of Python, and a table of the builders that they call.

    `==` and `!=` are not among them: two nodes are equal where they are one object.
    """

    __slots__ = ()
    # NumPy's numbers and arrays leave `number * node` to the node.
    __array_ufunc__: ClassVar[None] = None
    #: Symbol -> builder of both operands, one of them a node. Filled by ops/operators.py.
    operators: ClassVar[dict[str, Callable[[Any, Any], Node]]] = {}

    def __add__(self, other: Operand) -> Node:
        return self.operators["+"](self, other)

    def __radd__(self, other: Operand) -> Node:
        return self.operators["+"](other, self)

    def __sub__(self, other: Operand) -> Node:
        return self.operators["-"](self, other)

    def __rsub__(self, other: Operand) -> Node:
        return self.operators["-"](other, self)

    def __mul__(self, other: Operand) -> Node:
        return self.operators["*"](self, other)

    def __rmul__(self, other: Operand) -> Node:
        return self.operators["*"](other, self)

    def __truediv__(self, other: Operand) -> Node:
        return self.operators["/"](self, other)

    def __rtruediv__(self, other: Operand) -> Node:
        return self.operators["/"](other, self)

    def __neg__(self) -> Node:
        return self.operators["*"](self, -1.0)

    def __matmul__(self, other: object) -> Node:
        return self.operators["@"](self, other)

    def __rmatmul__(self, other: object) -> Node:
        return self.operators["@"](other, self)

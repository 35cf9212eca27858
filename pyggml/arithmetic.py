"""Arithmetic operators on nodes: `x + y`, `x * 2.0`, `-x`. ops/ defines what they build."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, Union

if TYPE_CHECKING:
    from pyggml.node import Node

#: A node, or a Python or NumPy number.
Operand: TypeAlias = Union["Node", float]


class Arithmetic:
    """Python's arithmetic operators, which call the builders in `operators`.

    `==` and `!=` stay comparisons of identity.
    """

    __slots__ = ()
    # Makes NumPy leave `array * node` to the node.
    __array_ufunc__: ClassVar[None] = None
    #: Symbol -> builder from two operands, one of them a node. Filled by ops/operators.py.
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

    def __pow__(self, other: object) -> Node:
        return self.operators["**"](self, other)

    def __rpow__(self, other: object) -> Node:
        return self.operators["**"](other, self)

    def __lt__(self, other: object) -> Node:
        return self.operators["<"](self, other)

    def __le__(self, other: object) -> Node:
        return self.operators["<="](self, other)

    def __gt__(self, other: object) -> Node:
        return self.operators[">"](self, other)

    def __ge__(self, other: object) -> Node:
        return self.operators[">="](self, other)

    def __matmul__(self, other: object) -> Node:
        return self.operators["@"](self, other)

    def __rmatmul__(self, other: object) -> Node:
        return self.operators["@"](other, self)

"""The nodes that Python's operators build: `add`, `sub`, `mul`, `div`, or `scale` for a number.

x + y, x - y, x * y, x / y    y repeats into x, or x into y
x * 2.0, x / 2.0, -x          scale(x, s=2.0), scale(x, s=0.5), scale(x, s=-1.0)
x + 1.0, x - 1.0, 1.0 - x     scale(x, s=1.0, b=1.0), ..., scale(x, s=-1.0, b=1.0)
1.0 / x                       div(fill(x, value=1.0), x)
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, NoReturn

import numpy as np

from pyggml.arguments import located
from pyggml.errors import DTypeError, ShapeError
from pyggml.node import Node
from pyggml.operation import Op
from pyggml.ops.copy import repeat
from pyggml.ops.elementwise import add, div, fill, mul, scale, sub
from pyggml.ops.rules import repeats_into


def _number(value: object) -> float | None:
    """`value` as a float if it is a number, else None. A bool is not a number here."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    is_number = isinstance(value, Real) and not isinstance(value, (bool, np.bool_))
    return float(value) if is_number else None  # type: ignore[arg-type]


def _apply(op: Op[Any], a: Any, b: Any) -> Node:
    """op(a, b), the smaller operand repeated into the other."""
    nodes = isinstance(a, Node) and isinstance(b, Node)
    if nodes and a.ne != b.ne and repeats_into(a.ne, b.ne):
        if op in (add, mul):
            return op(b, a)
        a = repeat(a, ne=b.ne[: max(a.spec.rank, b.spec.rank)])
    return op(a, b)


def _plus(a: Any, b: Any) -> Node:
    left, right = _number(a), _number(b)
    if right is not None:
        return scale(a, s=1.0, b=right)
    if left is not None:
        return scale(b, s=1.0, b=left)
    return _apply(add, a, b)


def _minus(a: Any, b: Any) -> Node:
    left, right = _number(a), _number(b)
    if right is not None:
        return scale(a, s=1.0, b=-right)
    if left is not None:
        return scale(b, s=-1.0, b=left)
    return _apply(sub, a, b)


def _times(a: Any, b: Any) -> Node:
    left, right = _number(a), _number(b)
    if right is not None:
        return scale(a, s=right)
    if left is not None:
        return scale(b, s=left)
    return _apply(mul, a, b)


def _by(a: Any, b: Any) -> Node:
    left, right = _number(a), _number(b)
    if right == 0:
        raise ShapeError(f"{a!r} / {b!r}: division by zero")
    if right is not None:
        return scale(a, s=1.0 / right)
    if left is not None:
        return div(fill(b, value=left), b)
    return _apply(div, a, b)


def _at(a: Any, b: Any) -> NoReturn:
    raise DTypeError(
        f"{_text(a)} @ {_text(b)}: nodes have no @; use mul_mat. In NumPy shapes mul_mat(a, b) is "
        "b @ a.T: its inner dimension is ne[0] of both operands, NumPy's last axis, where `@` "
        "uses the last axis of the left operand and the second last of the right"
    )


def _power(a: Any, b: Any) -> NoReturn:
    raise DTypeError(
        f"{_text(a)} ** {_text(b)}: nodes have no powers; use sqr(x) for x ** 2, sqrt(x) for "
        "x ** 0.5, or multiply"
    )


def _compared(symbol: str) -> Callable[[Any, Any], NoReturn]:
    def refuse(a: Any, b: Any) -> NoReturn:
        raise DTypeError(
            f"{_text(a)} {symbol} {_text(b)}: nodes have no order and no op compares elements; "
            "relu(a - b) is a - b where a > b, else 0"
        )

    return refuse


def _text(operand: object) -> str:
    return repr(operand) if isinstance(operand, Node) else type(operand).__name__


_BUILDERS: dict[str, Callable[[Any, Any], Node]] = {
    "+": _plus,
    "-": _minus,
    "*": _times,
    "/": _by,
    "@": _at,
    "**": _power,
    **{symbol: _compared(symbol) for symbol in ("<", "<=", ">", ">=")},
}
Node.operators.update({symbol: located(build) for symbol, build in _BUILDERS.items()})

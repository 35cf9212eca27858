"""Elementwise ops: arithmetic, activations, gated linear units."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from pyggml.arguments import located
from pyggml.errors import DTypeError, ShapeError
from pyggml.node import Node
from pyggml.operation import Op, op
from pyggml.ops.rules import (
    FLOATS,
    choose,
    elementwise_slices,
    outer_slices,
    want_finite,
    want_ne,
    want_repeats,
    want_type,
)
from pyggml.spec import Spec
from pyggml.traits import Axis, Cut, Ids, Slice

__all__ = [
    "add",
    "add_id",
    "add_mask",
    "clamp",
    "div",
    "exp",
    "fill",
    "gelu",
    "glu",
    "log",
    "mul",
    "relu",
    "scale",
    "sigmoid",
    "silu",
    "softplus",
    "sqr",
    "sqrt",
    "sub",
    "swiglu",
    "tanh",
]

Activation: TypeAlias = Literal["silu", "gelu", "relu"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)


def _pair(a: Node, b: Node, types: tuple[str, ...]) -> Spec:
    want_type("a", a, types)
    if b.dtype != a.dtype:
        raise DTypeError(f"a has type {a.dtype} and b has type {b.dtype}; cast one of them")
    want_repeats("b", b, a)
    return a.spec


@op(slices=elementwise_slices, linear=("a", "b"))
def add(a: Node, b: Node) -> Spec:
    """y = a + b, b repeated into a.

    a, y  f32, f16, i32, i64 [ne0, ne1, ne2, ne3]
    b     a's type           each size divides a's
    """
    return _pair(a, b, (*FLOATS, "i32", "i64"))


@op(slices=elementwise_slices, linear=("a", "b"))
def sub(a: Node, b: Node) -> Spec:
    """y = a - b, b repeated into a. Types and sizes as `add`, floats only."""
    return _pair(a, b, FLOATS)


@op(slices=elementwise_slices, linear=("a",))
def mul(a: Node, b: Node) -> Spec:
    """y = a * b, b repeated into a. Types and sizes as `add`, floats only."""
    return _pair(a, b, FLOATS)


@op(slices=elementwise_slices, linear=("a",))
def div(a: Node, b: Node) -> Spec:
    """y = a / b, b repeated into a. Types and sizes as `add`, floats only."""
    return _pair(a, b, FLOATS)


@op(slices=elementwise_slices)
def add_mask(a: Node, b: Node) -> Spec:
    """y = a + b, but -inf where b is -inf, whatever a holds there. b repeats into a.

    A plain sum would keep a NaN of a row that was never written: NaN + -inf is NaN.
    Types and sizes as `add`, floats only.
    """
    return _pair(a, b, FLOATS)


BINARY: tuple[Op[[Node, Node]], ...] = (add, sub, mul, div, add_mask)


@op(slices=elementwise_slices)
def scale(a: Node, *, s: float, b: float = 0.0) -> Spec:
    """y = s * a + b.   a, y  f32 or f16, any size."""
    want_type("a", a, FLOATS)
    want_finite(s=s, b=b)
    return a.spec


@op(slices=elementwise_slices)
def clamp(a: Node, *, min: float, max: float) -> Spec:
    """y = a limited to [min, max]; a limit may be infinite.   a, y  f32 or f16."""
    want_type("a", a, FLOATS)
    if min > max:
        raise ShapeError(f"min={min} must not be above max={max}")
    return a.spec


@op(slices=elementwise_slices)
def fill(a: Node, *, value: float) -> Spec:
    """y = value everywhere. Only a's size and type matter.   a, y  f32 or f16."""
    want_type("a", a, FLOATS)
    return a.spec


def _unary(name: str, formula: str) -> Op[[Node]]:
    def rule(a: Node) -> Spec:
        want_type("a", a, FLOATS)
        return a.spec

    rule.__doc__ = f"y = {formula}.   a, y  f32 or f16, any size."
    return Op(rule, name=name, slices=elementwise_slices)


exp = _unary("exp", "e^a")
log = _unary("log", "ln a; -inf at 0, NaN below")
sqr = _unary("sqr", "a^2")
sqrt = _unary("sqrt", "a^(1/2); NaN below 0")
tanh = _unary("tanh", "tanh a")
relu = _unary("relu", "max(a, 0)")
sigmoid = _unary("sigmoid", "1 / (1 + e^-a)")
silu = _unary("silu", "a / (1 + e^-a)")
gelu = _unary("gelu", "a/2 (1 + tanh(sqrt(2/pi) (a + 0.044715 a^3))), ggml's tanh form of GELU")

softplus = _unary("softplus", "ln(1 + e^a), also where that is close to a or e^a")

UNARY: tuple[Op[[Node]], ...] = (
    exp, log, sqr, sqrt, tanh, relu, sigmoid, silu, gelu, softplus,
)  # fmt: skip
_BY_NAME = {unary.name: unary for unary in UNARY}


def activation(act: str, a: Node) -> Node:
    """Apply the activation named `act`, "silu", "gelu" or "relu", to `a`."""
    return _BY_NAME[choose("act", act, ACTIVATIONS)](a)


def want_limit(limit: float | None) -> None:
    """ShapeError unless `limit`, of a gated unit, is None or above 0."""
    if limit is not None and not 0 < limit < float("inf"):
        raise ShapeError(f"limit={limit} must be above 0 and finite; None means no limit")


def gated(act: str, x: Node, g: Node, limit: float | None) -> Node:
    """act(x) * g, or act(min(x, limit)) * clamp(g, -limit, limit)."""
    if limit is not None:
        x, g = clamp(x, min=float("-inf"), max=limit), clamp(g, min=-limit, max=limit)
    return mul(activation(act, x), g)


@op(slices=outer_slices)
def glu(
    a: Node,
    b: Node | None = None,
    *,
    act: Activation = "silu",
    swapped: bool = False,
    limit: float | None = None,
) -> Spec:
    """Gated linear unit: y = act(x) * g, or act(min(x, limit)) * clamp(g, -limit, limit).

    with b     x = a, g = b                    a, b, y  f32 [n, ne1, ne2, ne3]
    without    x, g = the halves of a's rows   a        f32 [2n, ne1, ne2, ne3]
    act        silu (SwiGLU), gelu (GEGLU) or relu (ReGLU)
    swapped    x is the second half, g the first
    limit      above 0; None: no limit. x is limited from above only, and before the activation
    Sources: ggml's ggml_glu; the limit is that of DeepSeek V4 (ggml's swiglu_clamp).
    """
    want_type("a", a, FLOATS)
    want_limit(limit)
    if b is not None:
        want_type("b", b, (a.dtype.name,))
        want_ne("b", b, a.ne, "a's size")
        if swapped:
            raise ShapeError("swapped=True is only for the form without b")
        return a.spec
    if a.ne[0] % 2:
        raise ShapeError(f"without b, a.ne[0]={a.ne[0]} must be even: a row is two halves")
    return Spec.of(a.dtype, (a.ne[0] // 2, *a.ne[1:]), a.spec.rank)


@glu.means
def _(
    a: Node,
    b: Node | None = None,
    *,
    act: Activation = "silu",
    swapped: bool = False,
    limit: float | None = None,
) -> Node:
    from pyggml.ops.views import view

    if b is None:
        n = a.ne[0] // 2
        halves = [view(a, ne=(n, *a.ne[1 : a.spec.rank]), start=(i * n,)) for i in (0, 1)]
        a, b = reversed(halves) if swapped else halves
    return gated(act, a, b, limit)


@located
def swiglu(a: Node, b: Node | None = None) -> Node:
    """y = silu(a) * b, or silu(first half) * second half of a's rows without b: `glu`."""
    return glu(a, b, act="silu")


@op(ids=Ids("ids", of="b", axis=1))
def add_id(a: Node, b: Node, ids: Node) -> Spec:
    """y[:, e, t] = a[:, e, t] + b[:, ids[e, t]]: a bias for each chosen expert.

    a, y  f32 [n, n_used, n_tokens]
    b     f32 [n, n_expert]
    ids   i32 [n_used, n_tokens]      a negative id adds nothing
    """
    want_type("a", a, ("f32",))
    want_type("b", b, ("f32",))
    want_type("ids", ids, ("i32",))
    want_ne("b", b, (a.ne[0], b.ne[1], 1, 1), "a row as long as a's for each expert")
    want_ne("ids", ids, (a.ne[1], a.ne[2], 1, 1), "an id for each row of a")
    if a.ne[3] != 1:
        raise ShapeError(f"a must have three dimensions, but its ne3 is {a.ne[3]}")
    return a.spec


@add_id.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    if axis not in (1, 2):
        return None
    assert isinstance(axis, int)
    return Slice((Cut(axis), None, Cut(axis - 1)))

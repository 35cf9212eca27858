"""Normalization of rows."""

from __future__ import annotations

from pyggml.errors import ShapeError
from pyggml.node import Node
from pyggml.operation import op
from pyggml.ops.rules import outer_slices, want_finite, want_type
from pyggml.spec import Spec
from pyggml.traits import Cost

__all__ = ["norm", "rms_norm"]


def _normalized(a: Node, eps: float) -> Spec:
    want_type("a", a, ("f32",))
    want_finite(eps=eps)
    if eps < 0:
        raise ShapeError(f"eps={eps} must not be negative")
    return a.spec


@op(slices=outer_slices)
def norm(a: Node, *, eps: float) -> Spec:
    """y = (a - mean) / sqrt(var + eps): LayerNorm without its weights.   a, y  f32 [n, ne1, ..]

    mean, var  of the row; var is the mean of (a - mean)^2 (divided by n, not n - 1)
    A constant row gives 0, also with eps = 0, where ggml gives NaN. eps >= 0.
    Apply the norm's weight with `mul` and its bias with `add`. Source: ggml's ggml_norm.
    """
    return _normalized(a, eps)


@op(slices=outer_slices)
def rms_norm(a: Node, *, eps: float) -> Spec:
    """y = a / sqrt(mean(a^2 over the row) + eps).   a, y  f32 [n, ne1, ne2, ne3]

    eps >= 0. Apply the norm's weight with `mul`.
    """
    return _normalized(a, eps)


@norm.cost
def _(node: Node) -> Cost:
    return Cost(6.0 * node.spec.elements, 2.0 * node.spec.nbytes)


@rms_norm.cost
def _(node: Node) -> Cost:
    return Cost(3.0 * node.spec.elements, 2.0 * node.spec.nbytes)

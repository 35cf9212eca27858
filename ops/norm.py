"""Normalization of rows."""

from __future__ import annotations

from pyggml.errors import ShapeError
from pyggml.node import Node
from pyggml.operation import op
from pyggml.ops.rules import outer_slices, want_finite, want_type
from pyggml.spec import Spec
from pyggml.traits import Cost

__all__ = ["rms_norm"]


@op(slices=outer_slices)
def rms_norm(a: Node, *, eps: float) -> Spec:
    """y = a / sqrt(mean(a^2 over the row) + eps).   a, y  f32 [n, ne1, ne2, ne3]

    eps >= 0. Apply the norm's weight with `mul`.
    """
    want_type("a", a, ("f32",))
    want_finite(eps=eps)
    if eps < 0:
        raise ShapeError(f"eps={eps} must not be negative")
    return a.spec


@rms_norm.cost
def _(node: Node) -> Cost:
    return Cost(3.0 * node.spec.elements, 2.0 * node.spec.nbytes)

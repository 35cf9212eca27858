"""A case on a backend, against its float64 statement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite, sqrt

import numpy as np

from pyggml.backends.base import Backend
from pyggml.graph import Graph
from pyggml.node import Node
from pyggml.parity import guarded, oracle, tolerance
from pyggml.parity.case import MOVES, Built, Case, build
from pyggml.parity.meant import evaluated, meaning_of
from pyggml.parity.values import Array, decoded
from pyggml.runtime import places

#: Ops whose errors do not come from sums: their bounds stand as they are.
_EXACT = {*MOVES, "cast", "cpy", "set_rows", "rope_ext"}


#: Ops whose result is a difference from 1 in a tail (1 + tanh(x) far below 0), times x or another
#: product; and the error of an f32 near 1.
_SATURATED = {"gelu", "silu", "sigmoid", "tanh", "glu", "moe_up_gate", "fused_up_gate"}
_EPSILON = 2.0**-23


def check(case: Case, backend: str = "numpy") -> tolerance.Comparison:
    """Run a case on a backend in every way of `guarded.results`; the first that is wrong, else the
    worst within the bound.
    """
    built, device = build(case), places.parse(backend).backend
    want = _wanted(case, built)
    computed = [n for n in Graph({"y": built.node}).nodes if not n.op.leaf and n.op.view is None]
    bound = case.bound(built.node, *(numeric_class(device, node) for node in computed))
    found: list[tolerance.Comparison] = []
    try:
        for how, got in guarded.results(device, built.node, {**built.inputs, **built.states}):
            values = decoded(built.node.dtype, got).reshape(want.shape)
            result = tolerance.within(values, want, bound)
            if not result and isfinite(result.error) and case.op not in _EXACT:
                bound = max(bound, _cancelling(case, built, want, bound))
                result = tolerance.within(values, want, bound)
            found.append(replace(result, why=", ".join(filter(None, (result.why, how)))))
            if not result:
                return found[-1]
    except guarded.Violation as broken:
        return tolerance.Comparison(False, float("inf"), bound, why=str(broken))
    return max(found, key=lambda result: result.error)


def _cancelling(case: Case, built: Built, want: Array, bound: float) -> float:
    """The NMSE that the result has when its sources are off by the bound's relative error.

    Where the terms of a sum cancel, a correct kernel's rounding is large relative to what is left.
    A result of few elements may also be unlucky: by three standard deviations of a mean of squares,
    1 + 3 sqrt(2 / n). Results of many elements get next to nothing more than their bound.
    """
    rng = np.random.default_rng(0)
    moved = 0.0
    for _ in range(3):
        sources = [
            x
            if x is None or x.dtype.kind == "i"
            else x * (1 + sqrt(bound) * rng.uniform(-1, 1, x.shape))
            for x in built.values
        ]
        with np.errstate(all="ignore"):
            off = _stated(case, built, sources)
        finite = np.isfinite(want) & np.isfinite(off)
        moved = max(moved, tolerance.nmse(off[finite], want[finite]))
    if case.op in _SATURATED:
        tail = want + _EPSILON * _magnitude(case, built)
        finite = np.isfinite(want) & np.isfinite(tail)
        moved = max(moved, tolerance.nmse(tail[finite], want[finite]))
    return moved * (1 + 3 * sqrt(2 / want.size)) if isfinite(moved) else 0.0


def _magnitude(case: Case, built: Built) -> Array:
    """What a tail of a `_SATURATED` op is multiplied with: |x|, of a gated op |x y|, or 1."""
    x = built.values[0]
    assert x is not None
    if case.op in ("sigmoid", "tanh"):
        return np.ones_like(x)
    if case.op in ("gelu", "silu"):
        return np.abs(x)
    relu = replace(case, attrs={**case.attrs, "act": "relu"}, means=False)

    def opened(sign: int) -> Array:
        values = [
            v if v is None or v.dtype.kind == "i" or (at != 2 and case.op != "glu") else sign * v
            for at, v in enumerate(built.values)
        ]
        return np.abs(oracle.run(relu.op, values, **relu.attrs))

    return opened(1) + opened(-1)  # relu(x) y and relu(-x) y: one of them is 0


def _stated(case: Case, built: Built, values: Sequence[Array | None]) -> Array:
    """The case in float64, of sources with these values."""
    if case.op in oracle.ORACLE:
        return oracle.run(case.op, values, **case.attrs)
    node = built.node if case.means else meaning_of(built.node)
    return evaluated(node, {s: v for s, v in zip(built.sources, values) if s and v is not None})


def _wanted(case: Case, built: Built) -> Array:
    """The oracle's result. Of a write it knows the values; the state's type rounds them."""
    want, kind = _stated(case, built, built.values), built.node.dtype.name
    if case.op in ("cpy", "set_rows"):
        return oracle.run("cast", [want], dtype=kind)
    if kind == "f16":  # beyond its largest number and half a step is infinity
        return np.where(np.abs(want) >= 65520, np.copysign(np.inf, want), want)
    return want


def numeric_class(device: Backend, node: Node) -> str:
    """What the backend says of its numbers in a node: a class of `tolerance.CLASSES`."""
    return "f32" if node.attrs.get("prec") == "f32" else device.numeric(node)

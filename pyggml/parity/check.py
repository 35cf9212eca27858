"""Run a case on a backend and compare with its float64 value."""

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

#: Ops whose bounds are never widened: those without sums, whose terms cannot cancel, and `norm`,
#: whose rows may be far from 0 (a constant row must give 0).
_EXACT = {*MOVES, "cast", "cpy", "set_rows", "rope_ext", "norm"}
#: Ops with a tail where f32 may cancel (1 + tanh(x) far below 0), and the error of an f32 near 1.
_SATURATED = {"gelu", "silu", "sigmoid", "tanh", "glu", "moe_up_gate", "fused_up_gate"}
_EPSILON = 2.0**-23


def check(case: Case, backend: str = "numpy") -> tolerance.Comparison:
    """Run a case on a backend in every way of `guarded.results`.

    Returns the first comparison that fails, or the one with the largest error if all pass.
    """
    built, device = build(case), places.parse(backend).backend
    want = expected(case, built)
    computed = [n for n in Graph({"y": built.node}).nodes if not n.op.leaf and n.op.view is None]
    bound = case.bound(built.node, *(numeric_class(device, node) for node in computed))
    comparisons: list[tolerance.Comparison] = []
    try:
        for how, got in guarded.results(device, built.node, {**built.inputs, **built.states}):
            values = decoded(built.node.dtype, got).reshape(want.shape)
            result = tolerance.within(values, want, bound)
            if not result and isfinite(result.error) and case.op not in _EXACT:
                bound = max(bound, _cancelling(case, built, want, bound))
                result = tolerance.within(values, want, bound)
            comparisons.append(replace(result, why=", ".join(filter(None, (result.why, how)))))
            if not result:
                return comparisons[-1]
    except guarded.Violation as violation:
        return tolerance.Comparison(False, float("inf"), bound, why=str(violation))
    return max(comparisons, key=lambda result: result.error)


def _cancelling(case: Case, built: Built, want: Array, bound: float) -> float:
    """The NMSE of the result when its sources are off by the bound's relative error.

    Where the terms of a sum cancel, a correct kernel's rounding is large relative to the result.
    The error of n elements also varies: the NMSE may exceed its mean by three standard deviations,
    a factor of 1 + 3 sqrt(2 / n). A large result without cancellation gets hardly any more than its
    bound.
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
            off = _reference(case, built, sources)
        finite = np.isfinite(want) & np.isfinite(off)
        moved = max(moved, tolerance.nmse(off[finite], want[finite]))
    if case.op in _SATURATED:
        tail = want + _EPSILON * _magnitude(case, built)
        finite = np.isfinite(want) & np.isfinite(tail)
        moved = max(moved, tolerance.nmse(tail[finite], want[finite]))
    return moved * (1 + 3 * sqrt(2 / want.size)) if isfinite(moved) else 0.0


def _magnitude(case: Case, built: Built) -> Array:
    """The factor of a tail in a `_SATURATED` op: |x|, |x y| in a gated op, or 1."""
    x = built.values[0]
    assert x is not None
    if case.op in ("sigmoid", "tanh"):
        return np.ones_like(x)
    if case.op in ("gelu", "silu"):
        return np.abs(x)
    attrs = {**case.attrs, "act": "relu"}
    activations = (0, 1) if case.op == "glu" else (2,)
    flipped = [
        -v if at in activations and v is not None else v for at, v in enumerate(built.values)
    ]
    # |x y| = |relu(x) y| + |relu(-x) y|: one of the two is 0.
    halves = [np.abs(oracle.run(case.op, values, **attrs)) for values in (built.values, flipped)]
    return np.asarray(halves[0] + halves[1])


def _reference(case: Case, built: Built, values: Sequence[Array | None]) -> Array:
    """The case in float64, for sources with these values."""
    if case.op in oracle.ORACLE:
        return oracle.run(case.op, values, **case.attrs)
    node = built.node if case.means else meaning_of(built.node)
    return evaluated(node, {s: v for s, v in zip(built.sources, values) if s and v is not None})


def expected(case: Case, built: Built) -> Array:
    """The oracle's result. The values of a write are rounded to the state's type."""
    want, dtype = _reference(case, built, built.values), built.node.dtype.name
    if case.op in ("cpy", "set_rows"):
        return oracle.run("cast", [want], dtype=dtype)
    if dtype == "f16":  # its largest number and half a step round to infinity
        return np.where(np.abs(want) >= 65520, np.copysign(np.inf, want), want)
    return want


def numeric_class(device: Backend, node: Node) -> str:
    """The class (of `tolerance.CLASSES`) that the backend declares for a node."""
    return "f32" if node.attrs.get("prec") == "f32" else device.numeric(node)

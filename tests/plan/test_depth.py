"""Chains of thousands of nodes: no pass recurses over them, and none is slow."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import viz
from pyggml.node import Node

DEEP = 5000
MIB = 2**20

Build = Callable[[int], dict[str, Node]]


def _x() -> Node:
    return gg.input("x", "f32", ne=(4, 2))


def _added(x: Node, n: int) -> Node:
    one = gg.input("one", "f32", ne=(1,))
    for _ in range(n):
        x = gg.add(x, one)
    return x


def _turned(x: Node, n: int) -> Node:
    for _ in range(n // 2):
        x = gg.permute(gg.permute(x, axes=(1, 0, 2, 3)), axes=(1, 0, 2, 3))
    return x


def sums(n: int) -> dict[str, Node]:
    return {"y": _added(_x(), n)}


def sums_before_a_softmax(n: int) -> dict[str, Node]:
    kq = gg.mul_mat(gg.input("k", "f32", ne=(4, 8)), _x())
    v = gg.input("v", "f32", ne=(8, 4))
    return {"y": gg.mul_mat(v, gg.soft_max_ext(_added(kq, n)))}


def sums_of_two_before_a_softmax(n: int) -> dict[str, Node]:
    """Each sum adds the last one to itself, so 2 ** n paths lead to the product."""
    kq = gg.mul_mat(gg.input("k", "f32", ne=(4, 8)), _x())
    for _ in range(n):
        kq = gg.add(kq, kq)
    v = gg.input("v", "f32", ne=(8, 4))
    return {"y": gg.mul_mat(v, gg.soft_max_ext(gg.scale(kq, s=0.0)))}


def sums_without_a_product_before_a_softmax(n: int) -> dict[str, Node]:
    v = gg.input("v", "f32", ne=(4, 4))
    return {"y": gg.mul_mat(v, gg.soft_max_ext(_added(_x(), n)))}


def copies_of_a_softmax(n: int) -> dict[str, Node]:
    kq = gg.mul_mat(gg.input("k", "f32", ne=(4, 8)), _x())
    soft = gg.soft_max_ext(kq)
    for _ in range(n // 2):
        soft = gg.cont(gg.permute(soft, axes=(1, 0, 2, 3)))
    return {"y": gg.mul_mat(gg.input("v", "f32", ne=(8, 4)), soft)}


def views_of_a_softmax(n: int) -> dict[str, Node]:
    kq = gg.mul_mat(gg.input("k", "f32", ne=(4, 8)), _x())
    soft = _turned(gg.soft_max_ext(kq), n)
    return {"y": gg.mul_mat(gg.input("v", "f32", ne=(8, 4)), soft)}


def views_of_an_input(n: int) -> dict[str, Node]:
    return {"y": gg.sqr(_turned(_x(), n))}


def views_of_a_result(n: int) -> dict[str, Node]:
    return {"y": gg.sqr(_turned(gg.sqr(_x()), n))}


def views_as_an_output(n: int) -> dict[str, Node]:
    return {"y": _turned(gg.sqr(_x()), n)}


def views_of_a_part(n: int) -> dict[str, Node]:
    """A node with a chain of views that could be written into a concat."""
    part, x = gg.sqr(_x()), gg.input("more", "f32", ne=(4, 2))
    return {"y": gg.concat(part, x, dim=1), "z": gg.sqr(_turned(part, n))}


def views_all_read(n: int) -> dict[str, Node]:
    x = gg.sqr(_x())
    y = None
    for _ in range(n // 3):
        x = gg.permute(x, axes=(1, 0, 2, 3))
        row = gg.reshape(gg.sqr(x), ne=(8,))
        y = row if y is None else gg.add(y, row)
    assert y is not None
    return {"y": y}


def expanded_keys(n: int) -> dict[str, Node]:
    """Keys computed from a state by many ops, read by flash attention."""
    k = _added(gg.state("k", "f32", ne=(4, 64)), n)
    return {"y": gg.flash_attn_ext(_x(), k, k, scale=0.5)}


def views_of_keys(n: int) -> dict[str, Node]:
    k = _added(gg.state("k", "f32", ne=(4, 64)), 4)
    k = gg.cont(_turned(k, n))
    return {"y": gg.flash_attn_ext(_x(), k, k, scale=0.5)}


def writes(n: int) -> dict[str, Node]:
    ids, row = gg.input("ids", "i32", ne=(1,)), gg.input("row", "f32", ne=(4, 1))
    cache = gg.state("cache", "f32", ne=(4, 8))
    for i in range(n):
        cache = gg.set_rows(cache, gg.scale(row, s=float(i)), ids)
    return {"y": gg.sqr(cache)}


def writes_into_parts(n: int) -> dict[str, Node]:
    cache, row = gg.state("cache", "f32", ne=(4, 8)), gg.input("row", "f32", ne=(4, 1))
    for i in range(n // 3):
        part = gg.view(cache, ne=(4, 1), start=(0, i % 8))
        cache = gg.state_of(gg.cpy(gg.scale(row, s=float(i)), part))
    return {"y": gg.sqr(cache)}


@gg.define.op
def deep(a: Node) -> gg.define.Spec:
    """a plus one, thousands of times."""
    return a.spec


@deep.means
def _(a: Node) -> Node:
    return _added(a, DEEP)


def a_deep_meaning(n: int) -> dict[str, Node]:
    return {"y": deep(_x())}


@gg.define.op
def squared(a: Node, *, times: int) -> gg.define.Spec:
    """a squared `times` times, defined by itself."""
    return a.spec


@squared.means
def _(a: Node, *, times: int) -> Node:
    return gg.sqr(squared(a, times=times - 1)) if times else gg.scale(a, s=0.5)


def nested_meanings(n: int) -> dict[str, Node]:
    return {"y": squared(_x(), times=n)}


def activations(n: int) -> dict[str, Node]:
    w = gg.constant(np.eye(4, dtype=np.float32), name="w")
    x = _x()
    for _ in range(n // 2):
        x = gg.silu(gg.mul_mat(w, x))
    return {"y": x}


SHAPES: list[Build] = [
    sums,
    sums_before_a_softmax,
    sums_of_two_before_a_softmax,
    sums_without_a_product_before_a_softmax,
    copies_of_a_softmax,
    views_of_a_softmax,
    views_of_an_input,
    views_of_a_result,
    views_as_an_output,
    views_of_a_part,
    views_all_read,
    expanded_keys,
    views_of_keys,
    writes,
    writes_into_parts,
    a_deep_meaning,
    nested_meanings,
    activations,
]
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two": {"backends": ["null:0", "null:1", "numpy"], "pins": {"^(x|k|cache)$": "null:1"}},
    "amb": {"amb": 100 / MIB},
}


def _compiled(outputs: dict[str, Node], way: str) -> gg.Plan:
    try:
        return gg.compile(outputs, **WAYS[way])
    except gg.BudgetError as error:
        return gg.compile(outputs, **{**WAYS[way], "amb": error.least})


def _arrays(outputs: dict[str, Node]) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    inputs = gg.compile(outputs).inputs.items()
    return {
        name: rng.standard_normal(spec.shape).astype("f4")
        if spec.dtype.name == "f32"
        else np.zeros(spec.shape, np.int32)
        for name, spec in inputs
    }


@pytest.mark.parametrize("way", ["two", "amb"])
@pytest.mark.parametrize("build", SHAPES, ids=lambda build: build.__name__)
def test_no_pass_recurses(build: Build, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = build(DEEP)
    arrays = _arrays(outputs)
    want = gg.compile(outputs).run(arrays)
    if way == "two":
        monkeypatch.setenv("PYGGML_VERIFY", "1")
    plan = _compiled(outputs, way)
    assert str(plan)
    assert str(plan.graph)
    assert viz.dot(plan)
    assert viz.dot(gg.Graph(outputs))
    got = plan.run(arrays)
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("build", [views_of_an_input, views_of_a_result, views_as_an_output])
def test_parity_does_not_recurse(build: Build) -> None:
    outputs = build(DEEP)
    assert gg.compare(outputs, "numpy", "null", _arrays(outputs)).ok


def test_parity_of_states_does_not_recurse() -> None:
    outputs = writes_into_parts(1500)
    assert gg.compare(outputs, "numpy", "null", _arrays(outputs)).ok


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", SHAPES, ids=lambda build: build.__name__)
def test_no_pass_is_quadratic(build: Build, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the nodes take about twice the calls; a quadratic pass takes four times as many."""
    monkeypatch.setenv("PYGGML_VERIFY", "0")  # the verifier compares all live blocks

    def calls(n: int) -> int:
        outputs, count = build(n), 0

        def counted(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        gc.collect()
        gc.disable()  # what earlier tests left would be freed, and count
        sys.setprofile(counted)
        try:
            _compiled(outputs, way)
        finally:
            sys.setprofile(None)
            gc.enable()
        return count

    if build is not a_deep_meaning:
        assert calls(600) < 2.5 * calls(300)

"""An op that a user defines outside the package: examples/own_op.py."""

from __future__ import annotations

import numpy as np
import pytest

import pyggml as gg
from examples.own_op import cumsum, main, swish_mean
from pyggml.backends.numpy.table import kernel
from pyggml.errors import DTypeError, PyggmlError, UnsupportedOpError
from pyggml.node import Node
from pyggml.operation import cost_of
from pyggml.spec import Spec


def test_with_a_kernel() -> None:
    x = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    node = gg.input("x", "f32", ne=(5, 3))
    got = gg.compile({"y": gg.relu(cumsum(gg.scale(node, s=2.0), reverse=True))}).run(x=x)["y"]
    want = np.maximum(np.cumsum(2 * x[:, ::-1], axis=1)[:, ::-1], 0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert cost_of(cumsum(node)).flops == 15


def test_with_a_meaning_only() -> None:
    x = np.random.default_rng(0).uniform(1, 2, (3, 5)).astype(np.float32)
    node = gg.label(swish_mean(gg.input("x", "f32", ne=(5, 3)), eps=0.5), "mine")
    plan = gg.compile({"y": node})
    assert [step.node.op.name for step in plan.steps] == ["silu", "sum_rows", "scale", "div"]
    assert gg.labels(plan.graph.outputs["y"]) == ("mine",)
    want = x / (1 + np.exp(-x)) / (x.mean(1, keepdims=True) + 0.5)
    np.testing.assert_allclose(plan.run(x=x)["y"], want, rtol=1e-5)


def test_its_errors_are_like_those_of_other_ops() -> None:
    with pytest.raises(DTypeError, match=r"cumsum\(h\): a has type f16.*test_own_op.py:\d+$"):
        cumsum(gg.input("h", "f16", ne=(5,)))


def test_with_neither() -> None:
    @gg.op
    def nothing(a: Node) -> Spec:
        return a.spec

    with pytest.raises(
        UnsupportedOpError, match="no kernel for nothing; nothing has no meaning"
    ) as e:
        gg.compile({"y": nothing(gg.input("x", "f32", ne=(5,)))})
    assert isinstance(e.value, NotImplementedError) and __file__ in str(e.value)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    shown = capsys.readouterr().out
    assert "cumsum" in shown and "[5., 4., 3., 2., 1.]" in shown
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "Defining your own op" in capsys.readouterr().out


def test_a_meaning_of_another_size_is_refused() -> None:
    @gg.op
    def crooked(a: gg.Node) -> gg.define.Spec:
        return a.spec

    @crooked.means
    def _(a: gg.Node) -> gg.Node:
        return gg.sum_rows(a)

    with pytest.raises(gg.GraphError, match=r"meaning of crooked gives f32 \[1\]"):
        gg.compile({"y": crooked(gg.input("x", ne=(4,)))})


def test_a_kernel_that_returns_its_result_is_refused() -> None:
    @gg.op
    def doubled(a: Node) -> Spec:
        return a.spec

    plan_of = lambda: gg.compile({"y": doubled(gg.input("x", "f32", ne=(3,)))}, backends=["numpy"])  # noqa: E731
    x = np.ones(3, np.float32)
    kernel(doubled)(lambda out, a: 2 * a)
    with pytest.raises(
        PyggmlError,
        match=r"doubled\(x\): the kernel returned a ndarray.*`out`.*test_own_op.py:\d+$",
    ):
        plan_of().run(x=x)
    kernel(doubled)(lambda out, a: np.multiply(a, 2, out=out))  # `out` itself may be returned
    np.testing.assert_array_equal(plan_of().run(x=x)["y"], 2 * x)


def test_a_meaning_that_returns_no_node_is_refused() -> None:
    @gg.op
    def crooked(a: gg.Node) -> Spec:
        return a.spec

    @crooked.means
    def _(a: gg.Node) -> gg.Node:
        gg.relu(a)
        return None  # type: ignore[return-value]

    with pytest.raises(gg.GraphError, match=r"meaning of crooked must return a node, not NoneType"):
        gg.compile({"y": crooked(gg.input("x", ne=(4,)))})


@pytest.mark.parametrize("place", ["numpy", "null", "cuda:0:1GiB"])
def test_an_op_named_like_one_of_the_library(place: str) -> None:
    @gg.op
    def silu(a: Node) -> Spec:
        return a.spec

    why = rf"no kernel for silu of {__name__}; .* another op, silu of pyggml\.ops\.elementwise"
    with pytest.raises(UnsupportedOpError, match=why):
        gg.compile({"y": silu(gg.input("x", "f32", ne=(5,)))}, backends=[place])


def test_a_meaning_with_other_arguments_is_refused() -> None:
    @gg.op
    def halved(a: gg.Node, *, times: int) -> gg.define.Spec:
        return a.spec

    message = r"op halved: its meaning must take .* \(a, \*, times\), not \(node\)"
    with pytest.raises(gg.DTypeError, match=message):

        @halved.means
        def _(node: gg.Node) -> gg.Node:
            return node

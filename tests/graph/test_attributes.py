"""Arguments of ops: attributes follow the annotations of the shape rule; errors and help."""

import inspect
import pydoc
from typing import Any, Literal

import numpy as np
import pytest

import pyggml as gg
from pyggml.dtypes import dtype
from pyggml.errors import DTypeError, ShapeError
from pyggml.node import Node
from pyggml.operation import Op
from pyggml.spec import Spec

# Without `from __future__ import annotations`, these annotations are classes; with it, strings.


@gg.op
def leaky(a: Node, *, slope: float = 0.01) -> Spec:
    return a.spec


@gg.op
def every(
    a: Node,
    *,
    n: int = 1,
    maybe: float | None = 2.0,
    flag: bool = False,
    way: Literal["up", "down"] = "up",
    sizes: tuple[int, ...] = (1,),
    kind: str | type(dtype("f32")) = "f32",  # type: ignore[valid-type]
    free: Any = None,
    bare=None,  # type: ignore[no-untyped-def]
) -> Spec:
    return a.spec


@gg.op
def scaled(a: "Node", b: "Node | None" = None, *, factor: "float", offset: "int" = 0) -> "Spec":
    return a.spec


x = gg.input("x", "f32", ne=(4,))
nan = float("nan")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: leaky(x, slope="abc"), DTypeError, "slope= takes float, not 'abc' (str)"),
        (lambda: leaky(x, slope=nan), ShapeError, "leaky: slope= is NaN"),
        (lambda: leaky(x, slope=np.float32("nan")), ShapeError, "slope= is NaN"),
        (lambda: leaky(x, slope=None), DTypeError, "slope= takes float, not None"),
        (lambda: leaky(x, slope=True), DTypeError, "slope= takes float, not True"),
        (lambda: leaky(x, slope=10**400), ShapeError, "slope= is too large"),
        (lambda: leaky(x, slop=1), DTypeError, "no argument 'slop'; did you mean slope?"),
        (lambda: every(x, n=1.0), DTypeError, "n= takes int, not 1.0"),
        (lambda: every(x, maybe="2"), DTypeError, "maybe= takes float | None, not '2'"),
        (lambda: every(x, flag=1), DTypeError, "flag= takes bool, not 1"),
        (lambda: every(x, way="left"), ShapeError, "way='left' must be one of up, down"),
        (lambda: every(x, way=0), DTypeError, "way= takes one of 'up', 'down', not 0 (int)"),
        (lambda: every(x, sizes="12"), DTypeError, "sizes= takes whole numbers"),
        (lambda: every(x, kind=4), DTypeError, "kind= takes str, not 4"),
        (lambda: every(x, free=[1]), DTypeError, "free= must be hashable"),
        (lambda: every(x, free=nan), ShapeError, "free= is NaN"),
        (lambda: every(x, bare=np.zeros(2)), DTypeError, "bare= must be hashable"),
        (lambda: scaled(x, facto=2.0), DTypeError, "no argument 'facto'; did you mean factor?"),
        (lambda: scaled(x), DTypeError, "the attribute factor= is required"),
        (lambda: scaled(x, factor="2"), DTypeError, "factor= takes float, not '2'"),
        (lambda: scaled(c=x, factor=1), DTypeError, "scaled has no argument 'c'"),
        (lambda: scaled(x, a=x, factor=1), DTypeError, "the tensor a is given twice"),
        (lambda: gg.rope_ext(x, x, n_dim=4), DTypeError, "'n_dim'; did you mean n_dims?"),
        (lambda: gg.rope_ext(x, x, n_dims=4, mode=0), DTypeError, "one of 'normal', 'neox', not 0"),
        (lambda: gg.argsort(x, order=True), DTypeError, "one of 'asc', 'desc', not True (bool)"),
        (lambda: gg.mul_mat(x, x, prec=None), DTypeError, "one of 'default', 'f32', not None"),
        (lambda: gg.input("x", "f32", (4,)), DTypeError, "input: too many positional arguments"),
        (lambda: gg.input("x", "f32", n=(4,)), DTypeError, "unexpected keyword argument 'n'"),
        (lambda: gg.input("x", shap=(4,)), DTypeError, "'shap'; did you mean shape?"),
        (lambda: gg.state(), DTypeError, "state: missing a required argument: 'name'"),
        (lambda: gg.constant(), DTypeError, "constant: missing a required argument: 'array'"),
    ],
)
def test_wrong_arguments(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    line = inspect.getsourcelines(call)[1]
    assert text in message and message.endswith(f"; at {__file__}:{line}")


def test_a_spec_by_the_name_of_its_type() -> None:
    assert Spec.of("f32", (4, 2)) == Spec.of(dtype("f32"), [4, 2])
    with pytest.raises(DTypeError, match="unknown type 'f33'"):
        Spec.of("f33", (4,))


def test_an_error_shows_how_to_call_the_builder() -> None:
    with pytest.raises(DTypeError, match=r"call it as input\(name, .*\*, ne=None, shape=None\)"):
        gg.input("x", "f32", (4,))  # type: ignore[call-arg]


def test_a_type_error_inside_a_builder_is_not_changed() -> None:
    class Odd:
        def __array__(self, *_: Any, **__: Any) -> Any:
            raise TypeError("an odd array")

    with pytest.raises(TypeError, match="an odd array"):
        gg.constant(Odd())


def test_attributes_become_plain_values() -> None:
    node = every(x, maybe=np.float32(0.5), n=np.int64(3), sizes=[1, 2], kind=dtype("f16"), way="up")
    assert node.attrs == {"n": 3, "maybe": 0.5, "flag": False, "way": "up", "sizes": (1, 2),
                          "kind": "f16", "free": None, "bare": None}  # fmt: skip
    assert type(node.attrs["n"]) is int and type(node.attrs["maybe"]) is float
    assert every(x, maybe=None).attrs["maybe"] is None
    assert type(leaky(x, slope=1).attrs["slope"]) is float


def test_nodes_are_equal_if_and_only_if_their_attributes_are() -> None:
    assert leaky(x, slope=0) is leaky(x, slope=0.0) is leaky(x, slope=np.float64(0))
    assert leaky(x, slope=-0.0) is leaky(x, slope=-0.0) is not leaky(x, slope=0.0)
    assert str(leaky(x, slope=-0.0).attrs["slope"]) == "-0.0"
    free = [every(x, free=value) for value in (1, 1.0, True, "1", 0, 0.0, -0.0, False, None)]
    assert len(set(map(id, free))) == len(free)
    assert every(x, free=1.0) is free[1]


def test_the_sign_of_a_zero_reaches_the_kernel() -> None:
    y = gg.compile({"minus": gg.fill(x, value=-0.0), "plus": gg.fill(x, value=0.0)}).run(x=[1] * 4)
    assert np.signbit(y["minus"]).all() and not np.signbit(y["plus"]).any()


def error_of(rule: Any) -> str:
    """The message of the error that making `rule` an op raises."""
    with pytest.raises(DTypeError) as caught:
        gg.op(rule)
    return str(caught.value)


def test_a_rule_may_take_any_number_of_further_tensors() -> None:
    @gg.op
    def sums(a: Node, *others: Node, scale: float = 1.0) -> Spec:
        if any(other.ne != a.ne for other in others):
            raise gg.ShapeError("sizes differ")
        return a.spec

    y = gg.input("y", ne=(4,))
    assert sums(x).src == (x,) and sums(x, y, x, scale=2.0).src == (x, y, x)
    assert sums(x, y)["a"] is x and sums(x, y) is sums(x, y) is not sums(y, x)
    with pytest.raises(DTypeError, match=r"others\[1\] must be a node, not int"):
        sums(x, y, 3)  # type: ignore[arg-type]
    with pytest.raises(gg.ShapeError, match=r"others\[1\]=f32 \[5\]"):
        sums(x, y, gg.input("z", ne=(5,)))
    with pytest.raises(DTypeError, match="the tensor a is missing"):
        sums(scale=2.0)


def test_rules_that_cannot_become_ops() -> None:
    def no_star(a: Node, slope: float = 0.01) -> Spec:
        return a.spec

    def many(*a: Node) -> Spec:
        return a[0].spec

    def unknown(a: Node, *, way: "Unknown") -> Spec:  # type: ignore[name-defined]  # noqa: F821
        return a.spec

    assert "put a * before it: no_star(a, *, slope=0.01)" in error_of(no_star)
    assert "op many: *a: " in error_of(many)
    assert "name 'Unknown' is not defined" in error_of(unknown)


@pytest.mark.parametrize(
    ("result", "hint"),
    [(x, "return node.spec"), (None, "not NoneType"), ((4,), "not tuple"), ((x, {}), "not tuple")],
)
def test_a_rule_that_returns_no_spec(result: Any, hint: str) -> None:
    def broken(a: Node) -> Spec:
        return result  # type: ignore[no-any-return]

    with pytest.raises(DTypeError, match=r"broken\(x\): its rule must return a Spec") as caught:
        gg.op(broken)(x)
    assert hint in str(caught.value) and __file__ in str(caught.value)


@pytest.mark.parametrize("name", ["rope_ext", "mul_mat", "flash_attn_ext", "relu", "soft_max_ext"])
def test_help_shows_the_call(name: str) -> None:
    op = getattr(gg, name)
    signature = inspect.signature(op)
    assert signature.return_annotation is Node
    text = pydoc.plain(pydoc.render_doc(op))
    head = next(line for line in text.splitlines() if line.startswith(f"{name}("))
    assert head.endswith("-> pyggml.node.Node")
    for parameter in signature.parameters.values():
        assert parameter.name in head
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty:
            assert f"{parameter.name}: " in head and f"= {parameter.default!r}" in head


def test_every_op_has_a_signature_for_help() -> None:
    ops = [value for value in map(gg.__dict__.get, gg.__all__) if isinstance(value, Op)]
    assert len(ops) > 40
    for op in ops:
        assert inspect.signature(op).return_annotation is Node
        assert inspect.isroutine(op), "otherwise pydoc shows a long repr"

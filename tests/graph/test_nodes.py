"""Nodes, labels, graphs, their text; views against NumPy."""

from __future__ import annotations

import gc
from typing import Any
from weakref import ref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyggml as gg
from pyggml import define, ops
from pyggml.errors import DTypeError, GraphError, ShapeError, UnknownNameError
from pyggml.node import line_of
from pyggml.operation import cost_of, slice_of

SIZES = st.tuples(*[st.integers(1, 5)] * 4)


def leaf(ne: tuple[int, ...] = (8, 4), name: str = "x") -> gg.Node:
    return gg.input(name, "f32", ne=ne)


# -- nodes ---------------------------------------------------------------------------------------


def test_equal_nodes_are_one_object() -> None:
    x, y = leaf(), leaf()
    assert gg.scale(x, s=2) is gg.scale(x, s=2.0) is gg.scale(x, s=np.float32(2))
    assert gg.scale(x, s=2) is not gg.scale(x, s=3)
    assert gg.scale(x, s=2) is not gg.scale(y, s=2)  # leaves are one a call
    assert gg.soft_max(x) is gg.soft_max_ext(x, n_head=1)
    assert gg.mul_mat(x, x) is gg.mul_mat(x, x, dtype="F32", prec="default")
    assert gg.view(x, ne=(8, 4)) is gg.view(x, ne=[8, 4], start=(0,), step=(1, 1))
    assert gg.fill(x, value=-0.0) is gg.fill(x, value=-0.0) is not gg.fill(x, value=0.0)
    assert gg.fill(x, value=1) is not gg.fill(x, value=2)


def test_nodes_go_when_nobody_holds_them() -> None:
    x = leaf()
    gone = ref(gg.relu(x))
    gc.collect()
    assert gone() is None


def test_nodes_are_frozen() -> None:
    with pytest.raises(AttributeError, match="nodes are frozen"):
        leaf().spec = None  # type: ignore[misc]
    with pytest.raises(TypeError):
        gg.scale(leaf(), s=2.0).attrs["s"] = 3.0  # type: ignore[index]


def test_sources_have_the_names_that_the_op_gives_them() -> None:
    x, mask = leaf(), gg.input("mask", "f16", ne=(8, 4))
    plain, masked = gg.soft_max_ext(x), gg.soft_max_ext(x, mask)
    assert plain["a"] is masked["a"] is x
    assert masked["mask"] is masked.get("mask") is mask
    assert plain.get("mask") is None
    with pytest.raises(UnknownNameError, match=r"soft_max_ext: .* has no mask"):
        plain["mask"]
    unknown = "soft_max_ext has no operand 'ids'; its operands are: a, mask, sinks"
    for look_up in (plain.get, plain.__getitem__):
        with pytest.raises(UnknownNameError, match=unknown):
            look_up("ids")
    with pytest.raises(UnknownNameError, match="input has no operand 'a'; its operands are: none"):
        x["a"]
    with pytest.raises(TypeError):
        list(plain)  # type: ignore[call-overload]


def test_an_op_says_what_it_is_in_one_place() -> None:
    def rule(table: gg.Node, rows: gg.Node, which: gg.Node, *, s: float = 1.0) -> define.Spec:
        return table.spec

    def cost(node: gg.Node) -> define.Cost:
        return define.Cost(1.0, 2.0)

    def cuts(node: gg.Node, axis: define.Axis, n: int) -> define.Slice | None:
        return None

    chosen = define.Ids("which", of="table", axis=1)
    build = define.op(name="put", writes="rows", ids=chosen, weights=("table",), cost=cost)(rule)
    assert build.name == build.__name__ == "put"
    assert (build.writes, build.ids, build.weights) == (1, chosen, ("table",))
    assert build.operands == {"table": 0, "rows": 1, "which": 2}
    x = leaf()
    assert cost_of(build(x, x, x)) == define.Cost(1.0, 2.0)
    assert define.op(slices=cuts)(rule).slice_rule is cuts
    for wrong in (
        {"writes": "nothing"},
        {"weights": ("table", "nothing")},
        {"ids": define.Ids("nothing", of="table", axis=0)},
        {"ids": define.Ids("which", of="nothing", axis=0)},
    ):
        with pytest.raises(UnknownNameError, match="rule has no operand 'nothing'"):
            define.op(**wrong)(rule)  # type: ignore[call-overload]


def test_ops_name_their_ids_and_their_weights() -> None:
    held = {name: op.ids.operand for name, op in ops.ALL.items() if op.ids is not None}
    assert held == {name: "ids" for name, op in ops.ALL.items() if "ids" in op.operands}, (
        "an op that takes ids says so, and a backend can check them"
    )
    products = ("mul_mat", "mul_mat_id", "fused_up_gate", "moe_up_gate")
    assert {name for name, op in ops.ALL.items() if op.weights} == set(products)


def test_labels_and_lines() -> None:
    x = leaf()
    y = gg.label(gg.relu(x), "first")
    assert gg.label(y, "second") is y
    gg.label(y, "first")
    assert gg.labels(y) == ("first", "second")
    assert gg.relu(x) is y, "labels are no part of what a node is"
    assert repr(y) == "<second: f32 [8, 4]>"
    assert line_of(y).startswith(f"{__file__}:")
    assert gg.labels(gg.silu(x)) == ()


def test_specs() -> None:
    x = gg.input("x", "q8_0", ne=(64, 3))
    assert (x.ne, x.shape, x.spec.nbytes, x.nb) == ((64, 3, 1, 1), (3, 64), 204, (34, 68, 204, 204))
    assert gg.input("y", "f16", shape=(2, 3, 5)).ne == (5, 3, 2, 1)
    assert gg.constant(np.zeros((3, 5))).dtype.name == "f32"
    assert gg.constant(3.0).ne == (1, 1, 1, 1)
    assert gg.input("z", "f32", ne=(1, 7, 1)).shape == (1, 7, 1), "the rank shown is the one built"


def test_two_leaves_of_one_name() -> None:
    with pytest.raises(GraphError, match="two leaves are named 'x'") as error:
        gg.compile({"y": gg.add(leaf(), leaf())})
    assert str(error.value).count(__file__) == 2
    with pytest.raises(GraphError, match="two leaves are named 'x'"):
        gg.compile({"y": gg.add(leaf(), gg.constant(np.zeros((4, 8)), name="x"))})
    unnamed = [gg.constant(np.zeros((4, 8))) for _ in "ab"]
    assert gg.compile({"y": gg.add(*unnamed)}).run()["y"].shape == (4, 8)


def test_text() -> None:
    x, w = leaf((8, 3)), gg.constant(np.zeros((4, 8), np.float16), name="w")
    y = gg.label(gg.scale(gg.mul_mat(w, x), s=0.5), "kq-0")
    cache = gg.state("cache", "f16", ne=(4, 9))
    h = gg.cpy(y, gg.view(cache, ne=(4, 3), start=(0, 2)))
    assert str(gg.Graph({"out": gg.permute(y, axes=(1, 0))}, [h])) == (
        '%0 = constant() f16 [8, 4]  "w"\n'
        '%1 = input() f32 [8, 3]  "x"\n'
        "%2 = mul_mat(%0, %1, prec=default, dtype=f32) f32 [4, 3]\n"
        '%3 = scale(%2, s=0.5, b=0) f32 [4, 3]  "kq-0"\n'
        "%4 = permute(%3, axes=(1,0,2,3)) f32 [3, 4]\n"
        '%5 = state() f16 [4, 9]  "cache"\n'
        "%6 = view(%5, ne=(4,3,1,1), start=(0,2,0,0), step=(1,1,1,1), rank=2) f16 [4, 3]\n"
        "%7 = cpy(%3, %6) f16 [4, 3]\n"
        "output 'out' = %4\n"
        "update 'cpy' = %7"
    )


def test_rewrites_carry_labels_and_lines() -> None:
    x = leaf()
    y = gg.label(gg.relu(x), "act")
    new = gg.Graph({"y": gg.sqr(y)}).rewrite(
        lambda node, src: (
            gg.silu(x) if node is y else node.op.make(src, dict(node.attrs), node.spec)
        )
    )
    made = new.outputs["y"].src[0]
    assert made is not None and made.op is gg.silu
    assert gg.labels(made) == ("act",) and line_of(made) == line_of(y)


def test_every_op_says_its_cost_and_slices() -> None:
    from pyggml.parity.case import build
    from pyggml.parity.cases import cases

    for op in {case.op: case for case in cases()}.values():
        node = build(op).node
        cost = cost_of(node)
        assert cost.flops >= 0 and cost.nbytes >= (0 if node.op.view else node.spec.nbytes)
        for axis in range(4):
            rule = slice_of(node, axis, 1)
            assert rule is None or len(rule.cuts) == len(node.src)


# -- views against NumPy -------------------------------------------------------------------------


def run_view(node: gg.Node, array: np.ndarray) -> np.ndarray:
    return gg.compile({"y": gg.cont(node), "view": node}).run(x=array)["y"]


def numbered(ne: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(ne), dtype=np.float32).reshape(ne[::-1])


@settings(max_examples=80)
@given(SIZES, st.data())
def test_views_are_slices(ne: tuple[int, ...], data: Any) -> None:
    start = [data.draw(st.integers(0, n - 1)) for n in ne]
    step = [data.draw(st.integers(1, 3)) for _ in ne]
    size = [data.draw(st.integers(1, 1 + (n - 1 - a) // b)) for n, a, b in zip(ne, start, step)]
    part = tuple(slice(a, a + n * b, b) for a, n, b in zip(start, size, step))[::-1]
    node = gg.view(leaf(ne), ne=size, start=start, step=step)
    got = run_view(node, numbered(ne))
    np.testing.assert_array_equal(got, numbered(ne)[part][tuple(slice(n) for n in size[::-1])])


@settings(max_examples=60)
@given(SIZES, st.permutations(range(4)), st.permutations(range(4)), st.data())
def test_permutes_and_reshapes(ne: Any, first: Any, second: Any, data: Any) -> None:
    node, array = leaf(ne), numbered(ne)
    for axes in (first, second):
        node = gg.permute(node, axes=axes)
        array = array.transpose([3 - list(axes).index(d) for d in (3, 2, 1, 0)])
        assert node.shape == array.shape
        assert node.contiguous == array.flags.c_contiguous
    count = array.size
    sizes = []
    for _ in range(3):
        divisors = [d for d in range(1, count + 1) if count % d == 0]
        sizes.append(data.draw(st.sampled_from(divisors)))
        count //= sizes[-1]
    sizes.append(count)
    # NumPy too can reshape without a copy or not; where it can, so can we, and nowhere else.
    try:
        shown = array.view()
        shown.shape = tuple(sizes[::-1])
    except AttributeError:
        with pytest.raises(ShapeError, match="use cont"):
            gg.reshape(node, ne=sizes)
        node, shown = gg.cont(node), array.reshape(sizes[::-1])
    np.testing.assert_array_equal(run_view(gg.reshape(node, ne=sizes), numbered(ne)), shown)


@settings(max_examples=80)
@given(SIZES, st.data())
def test_views_by_ggml_strides(ne: tuple[int, ...], data: Any) -> None:
    """Contiguous memory under nb and offset, as ggml_view_2d and _3d are called."""
    flat = numbered(ne).reshape(-1)
    cuts = [n for n in np.cumprod(ne) if n < flat.size]
    nb = sorted(data.draw(st.lists(st.sampled_from([1, *cuts]), max_size=2, unique=True)))
    size = [data.draw(st.integers(1, b // a)) for a, b in zip([1, *nb], [*nb, flat.size])]
    room = flat.size - 1 - sum((n - 1) * b for n, b in zip(size, [1, *nb]))
    offset = data.draw(st.integers(0, room))
    node = leaf(ne)
    try:
        seen = gg.view(node, ne=size, nb=[4 * b for b in nb], offset=4 * offset)
    except ShapeError:
        # Refused only where it is no slice: some row would run over the end of a larger one.
        edges = [*nb, flat.size]
        ends = [offset % b + (n - 1) * a >= b for n, a, b in zip(size, [1, *nb], edges)]
        assert any(ends) or any(b % a for a, b in zip([1, *nb], edges))
        return
    index = np.full((), offset)
    for n, b in zip(size[::-1], [1, *nb][::-1]):
        index = index[..., None] + b * np.arange(n)
    np.testing.assert_array_equal(run_view(seen, numbered(ne)), flat[index])


def test_views_of_block_types() -> None:
    q = gg.input("q", "q8_0", ne=(128, 4))
    part = gg.view(q, ne=(64, 2), start=(32, 1))
    assert part is gg.view(q, ne=(64, 2), nb=(136,), offset=34 + 136)
    for wrong in ({"start": (16,)}, {"step": (2,)}):
        with pytest.raises(ShapeError, match="must start at a multiple of 32"):
            gg.view(q, ne=(32, 2), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="past the start of an element or block"):
        gg.view(q, ne=(32, 2), nb=(136,), offset=17)
    with pytest.raises(ShapeError, match="must stay in place"):
        gg.permute(q, axes=(1, 0))


def test_whole_is_the_state_with_the_write_in_it() -> None:
    cache = gg.state("cache", "f32", ne=(4, 3, 2))
    part = gg.view(gg.permute(cache, axes=(0, 2, 1)), ne=(2, 2, 1), start=(1, 0, 2))
    full = gg.state_of(gg.cpy(leaf((2, 2, 1)), part))
    assert (full.ne, full.nb) == (cache.ne, cache.nb)
    want = np.zeros((2, 3, 4), np.float32)
    want[:, 2, 1:3] = numbered((2, 2))
    got = gg.compile({"y": full}).run(x=numbered((2, 2, 1)))["y"]
    np.testing.assert_array_equal(got, want)


def test_a_graph_must_compute_something() -> None:
    with pytest.raises(GraphError, match="nothing to compute"):
        gg.compile({})
    for wrong in (leaf(), [leaf()], {"x": 1}, {1: leaf()}):
        with pytest.raises(DTypeError, match="outputs are a dict of names to nodes"):
            gg.compile(wrong)  # type: ignore[arg-type]


def test_labels_stay_with_the_graph_that_was_compiled() -> None:
    x, up, gate = leaf((8, 2)), leaf((8, 4), "up"), leaf((8, 4), "gate")
    fused = gg.label(gg.fused_up_gate(up, gate, x), "fused")
    meant = gg.mul(gg.silu(gg.mul_mat(gate, x)), gg.mul_mat(up, x))  # another graph's
    null = gg.backends.get("null", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(null), "supports", lambda self, node: "no" if node is fused else None)
        plan = gg.compile({"y": fused}, backends=["null:0"], observe=["fused"])
    assert [step.node.op.name for step in plan.steps][-1] == "mul"
    assert gg.labels(meant) == ()

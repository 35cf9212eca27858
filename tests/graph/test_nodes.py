"""Nodes, ops, labels and graphs."""

from __future__ import annotations

import gc
from weakref import ref

import numpy as np
import pytest
from hypothesis import strategies as st

import pyggml as gg
from pyggml import define, ops
from pyggml.errors import DTypeError, GraphError, UnknownNameError
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
    assert gg.scale(x, s=2) is not gg.scale(y, s=2)  # each call makes a new leaf
    assert gg.soft_max(x) is gg.soft_max_ext(x, n_head=1)
    assert gg.mul_mat(x, x) is gg.mul_mat(x, x, dtype="F32", prec="default")
    assert gg.view(x, ne=(8, 4)) is gg.view(x, ne=[8, 4], start=(0,), step=(1, 1))
    assert gg.fill(x, value=-0.0) is gg.fill(x, value=-0.0) is not gg.fill(x, value=0.0)
    assert gg.fill(x, value=1) is not gg.fill(x, value=2)


def test_unused_nodes_are_freed() -> None:
    x = leaf()
    reference = ref(gg.relu(x))
    gc.collect()
    assert reference() is None


def test_nodes_are_frozen() -> None:
    with pytest.raises(AttributeError, match="nodes are frozen"):
        leaf().spec = None  # type: ignore[misc]
    with pytest.raises(TypeError):
        gg.scale(leaf(), s=2.0).attrs["s"] = 3.0  # type: ignore[index]


def test_sources_by_name() -> None:
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


def test_options_of_an_op() -> None:
    def rule(table: gg.Node, rows: gg.Node, which: gg.Node, *, s: float = 1.0) -> define.Spec:
        return table.spec

    def cost(node: gg.Node) -> define.Cost:
        return define.Cost(1.0, 2.0)

    def cuts(node: gg.Node, axis: define.Axis, n: int) -> define.Slice | None:
        return None

    ids = define.Ids("which", of="table", axis=1)
    build = define.op(name="put", writes="rows", ids=ids, weights=("table",), cost=cost)(rule)
    assert build.name == build.__name__ == "put"
    assert (build.writes, build.ids, build.weights) == (1, ids, ("table",))
    assert build.operands == {"table": 0, "rows": 1, "which": 2}
    x = leaf()
    assert cost_of(build(x, x, x)) == define.Cost(1.0, 2.0)
    assert define.op(slices=cuts)(rule).slice_rule is cuts
    for options in (
        {"writes": "nothing"},
        {"weights": ("table", "nothing")},
        {"ids": define.Ids("nothing", of="table", axis=0)},
        {"ids": define.Ids("which", of="nothing", axis=0)},
    ):
        with pytest.raises(UnknownNameError, match="rule has no operand 'nothing'"):
            define.op(**options)(rule)  # type: ignore[call-overload]


def test_ops_declare_their_ids_and_weights() -> None:
    declared = {name: op.ids.operand for name, op in ops.ALL.items() if op.ids is not None}
    assert declared == {name: "ids" for name, op in ops.ALL.items() if "ids" in op.operands}, (
        "without a declaration, backends do not check the ids"
    )
    products = ("mul_mat", "mul_mat_id", "fused_up_gate", "moe_up_gate")
    assert {name for name, op in ops.ALL.items() if op.weights} == set(products)


def test_labels_and_lines() -> None:
    x = leaf()
    y = gg.label(gg.relu(x), "first")
    assert gg.label(y, "second") is y
    gg.label(y, "first")
    assert gg.labels(y) == ("first", "second")
    assert gg.relu(x) is y, "nodes that differ only in labels are equal"
    assert repr(y) == "<second: f32 [8, 4]>"
    assert line_of(y).startswith(f"{__file__}:")
    assert gg.labels(gg.silu(x)) == ()


def test_specs() -> None:
    x = gg.input("x", "q8_0", ne=(64, 3))
    assert (x.ne, x.shape, x.spec.nbytes, x.nb) == ((64, 3, 1, 1), (3, 64), 204, (34, 68, 204, 204))
    assert gg.input("y", "f16", shape=(2, 3, 5)).ne == (5, 3, 2, 1)
    assert gg.constant(np.zeros((3, 5))).dtype.name == "f32"
    assert gg.constant(3.0).ne == (1, 1, 1, 1)
    assert gg.input("z", "f32", ne=(1, 7, 1)).shape == (1, 7, 1), "sizes of 1 count if given"


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
    silu = new.outputs["y"].src[0]
    assert silu is not None and silu.op is gg.silu
    assert gg.labels(silu) == ("act",) and line_of(silu) == line_of(y)


def test_every_op_has_a_cost_and_valid_slices() -> None:
    from pyggml.parity.case import build
    from pyggml.parity.cases import cases

    for case in {case.op: case for case in cases()}.values():
        node = build(case).node
        cost = cost_of(node)
        assert cost.flops >= 0 and cost.nbytes >= (0 if node.op.view else node.spec.nbytes)
        for axis in range(4):
            rule = slice_of(node, axis, 1)
            assert rule is None or len(rule.cuts) == len(node.src)


def test_a_graph_must_compute_something() -> None:
    with pytest.raises(GraphError, match="nothing to compute"):
        gg.compile({})
    for outputs in (leaf(), [leaf()], {"x": 1}, {1: leaf()}):
        with pytest.raises(DTypeError, match="outputs are a dict of names to nodes"):
            gg.compile(outputs)  # type: ignore[arg-type]


def test_compiling_a_graph_does_not_label_nodes_of_another() -> None:
    x, up, gate = leaf((8, 2)), leaf((8, 4), "up"), leaf((8, 4), "gate")
    fused = gg.label(gg.fused_up_gate(up, gate, x), "fused")
    other = gg.mul(gg.silu(gg.mul_mat(gate, x)), gg.mul_mat(up, x))  # what `fused` expands to
    null = gg.backends.get("null", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(null), "supports", lambda self, node: "no" if node is fused else None)
        plan = gg.compile({"y": fused}, backends=["null:0"], observe=["fused"])
    assert [step.node.op.name for step in plan.steps][-1] == "mul"
    assert gg.labels(other) == ()

"""compile(decode_weights=True): weights on NumPy as f32, with the same results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml.errors import DeviceError, DTypeError
from pyggml.node import Node
from pyggml.quants import ENCODABLE
from pyggml.runtime.plan import Plan

RNG = np.random.default_rng(0)
VALUES = RNG.standard_normal((3, 96, 64)).astype(np.float32)


def weight(dtype: str = "q4_0") -> Node:
    return gg.constant(VALUES, dtype=dtype, name="w")


def graphs(w: Node) -> dict[str, Node]:
    """Products of the weight and of its views, rows of it, and experts."""
    ids = gg.constant(np.array([[[2, 0]]], np.int32), name="ids")
    x = gg.input("x", ne=(64, 5, 3))
    flat = gg.reshape(w, ne=(64, 288))
    return {
        "product": gg.mul_mat(w, x),
        "view": gg.mul_mat(
            gg.view(w, ne=(32, 50, 2), start=(32, 7, 1)), gg.input("y", ne=(32, 4, 2))
        ),
        "permuted": gg.mul_mat(gg.permute(w, axes=(0, 2, 1, 3)), gg.input("z", ne=(64, 2, 96))),
        "rows": gg.get_rows(flat, gg.constant(np.array([287, 3], np.int32), name="rows")),
        "experts": gg.mul_mat_id(w, gg.input("t", ne=(64, 1, 1)), gg.reshape(ids, ne=(2, 1))),
    }


def arrays(plan: Plan) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(spec.shape) for name, spec in plan.inputs.items()}


def layouts(plan: Plan) -> set[str]:
    """The layouts of the weights of block types, f16 and bf16 in a bound plan."""
    plan.bind()
    return {
        at.layout
        for node, at in plan.addresses.items()
        if node.op.name == "constant" and node.dtype.name not in ("f32", "i32")
    }


@pytest.mark.parametrize("dtype", sorted({*ENCODABLE, "bf16"} - {"f32"}))
def test_results_are_the_same(dtype: str) -> None:
    outputs = graphs(weight(dtype))
    plain, decoded = gg.compile(outputs), gg.compile(outputs, decode_weights=True)
    assert layouts(plain) == {"plain"} and layouts(decoded) == {"f32"}
    a, b = plain.run(arrays(plain)), decoded.run(arrays(decoded))
    for name, array in a.items():
        assert np.array_equal(array, b[name]), name


def test_the_plan_counts_them() -> None:
    w = weight()
    plan = gg.compile({"y": gg.mul_mat(w, gg.input("x", ne=(64, 2, 3)))}, decode_weights=True)
    assert plan.memory.weights == 4 * w.spec.elements
    plan.bind()
    assert plan.addresses[w].buffer.nbytes == plan.memory.weights


def test_weights_of_f32_and_those_that_no_product_reads_stay_in_place() -> None:
    x = gg.input("x", ne=(64, 2, 3))
    ids = gg.input("ids", "i32", ne=(4, 3))
    for outputs in (
        {"y": gg.mul_mat(gg.constant(VALUES, name="w"), x)},
        {"y": gg.get_rows(weight(), ids)},
    ):
        plan, plain = gg.compile(outputs, decode_weights=True), gg.compile(outputs)
        assert plan.memory.weights == plain.memory.weights


@pytest.mark.parametrize("other", ["cont", "cast", "view", "whole"])
def test_other_readers_get_the_weight_as_in_the_file(other: str) -> None:
    w = weight("f16")
    half = gg.view(w, ne=(64, 48, 3))
    node = {"cont": gg.cont(half), "cast": gg.cast(half, dtype="f32"), "view": half, "whole": w}
    outputs = {"y": gg.mul_mat(half, gg.input("x", ne=(64, 2, 3))), "other": node[other]}
    # fuse=False: nothing is computed from the weight when the plan is bound
    plain = gg.compile(outputs, fuse=False)
    decoded = gg.compile(outputs, fuse=False, decode_weights=True)
    assert layouts(decoded) == ({"f32"} if other == "whole" else {"plain"})
    a, b = plain.run(arrays(plain)), decoded.run(arrays(decoded))
    assert np.array_equal(a["y"], b["y"]) and np.array_equal(a["other"], b["other"])


def test_weights_of_other_places_are_not_decoded() -> None:
    outputs = {
        "a": gg.mul_mat(weight(), gg.input("x", ne=(64, 2, 3))),
        "b": gg.mul_mat(gg.constant(VALUES[0], dtype="q8_0", name="v"), gg.input("y", ne=(64, 2))),
    }
    places = {"backends": ["null:0", "numpy"], "pins": {"^v$": "numpy"}}
    plain, plan = (gg.compile(outputs, decode_weights=on, **places) for on in (False, True))
    before, after = ({r.device: r.weights for r in p.memory.devices} for p in (plain, plan))
    assert before["null:0"] == after["null:0"]
    assert after["numpy"] == 4 * VALUES[0].size > before["numpy"]
    a, b = plain.run(arrays(plain)), plan.run(arrays(plan))
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_wrong_arguments() -> None:
    outputs = {"y": gg.mul_mat(weight(), gg.input("x", ne=(64, 2, 3)))}
    with pytest.raises(DeviceError, match="null:0 cannot keep weights decoded; numpy can"):
        gg.compile(outputs, backends=["null:0"], decode_weights=True)
    with pytest.raises(DTypeError, match="decode_weights= must be True or False, not 1"):
        gg.compile(outputs, decode_weights=1)  # type: ignore[arg-type]

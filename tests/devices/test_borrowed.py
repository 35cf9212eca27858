"""Weights on several devices: resident on one, resident on two, or borrowed from the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from stacks import copied, ops, places, row, same, weight, where

import pyggml as gg
from pyggml import backends
from pyggml.backends.step import LoadStep
from pyggml.node import Node
from pyggml.ops.leaf import data_of
from pyggml.runtime.plan import Plan

PINS = {"_w": "numpy"}
HEADER = 64  # of null's private layout


def borrowing(outputs: dict[str, Node], **options: Any) -> Plan:
    return gg.compile(outputs, backends=["null:0", "numpy"], pins=PINS, **options)


def values(**sizes: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in sizes.items()}


# -- the threshold ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens, streams, place",
    [(31, 1, "numpy"), (32, 1, "null:0"), (16, 2, "null:0"), (1, 1, "numpy")],
)
def test_a_product_borrows_its_weight_from_32_rows_on(
    tokens: int, streams: int, place: str
) -> None:
    w, x = weight("a_w", 16, 24), gg.input("x", "f32", ne=(16, tokens, streams))
    y = {"y": gg.mul_mat(w, x)}
    plan = borrowing(y)
    assert places(plan) == [place]
    feed = values(x=(streams, tokens, 16))
    same(plan.run(feed), gg.compile(y).run(feed))
    assert row(plan, "null:0").weights == 0
    assert row(plan, "numpy").weights == w.spec.nbytes


def expert_product(tokens: int, used: int, n_experts: int, fused: bool) -> dict[str, Node]:
    """Products of some of the experts with a pinned weight."""
    up, gate = (weight(f"{k}_w", 16, 8, n_experts) for k in ("up", "gate"))
    b, ids = gg.input("b", "f32", ne=(16, 1, tokens)), gg.input("ids", "i32", ne=(used, tokens))
    return {"y": gg.moe_up_gate(up, gate, b, ids) if fused else gg.mul_mat_id(up, b, ids)}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "tokens, used, n_experts, place",
    [(64, 2, 4, "null:0"), (63, 2, 4, "numpy"), (43, 3, 4, "null:0"), (42, 3, 4, "numpy")],
)
def test_experts_are_borrowed_from_32_rows_an_expert_on(
    tokens: int, used: int, n_experts: int, place: str, fused: bool
) -> None:
    y = expert_product(tokens, used, n_experts, fused)
    plan = borrowing(y)
    assert places(plan) == [place]
    ids = np.random.default_rng(1).integers(-1, n_experts, (tokens, used))
    feed = {**values(b=(tokens, 1, 16)), "ids": ids}
    same(plan.run(feed), gg.compile(y).run(feed))


def test_what_the_preferred_device_refuses_is_not_borrowed() -> None:
    device: Any = backends.get("null", 0)
    y = {"y": gg.mul_mat(weight("a_w", 16, 24), gg.input("x", "f32", ne=(16, 64)))}
    with device.denying("mul_mat"):
        assert places(borrowing(y)) == ["numpy"]


def test_a_weight_pinned_to_another_device_is_not_borrowed() -> None:
    y = {"y": gg.mul_mat(weight("a_w", 16, 24), gg.input("x", "f32", ne=(16, 64)))}
    assert places(gg.compile(y, backends=["null:0"], pins={"_w": "null:1"})) == ["null:1"]
    assert places(gg.compile(y, backends=["numpy", "null:0"], pins=PINS)) == ["numpy"]


def test_a_pinned_product_stays_where_it_is_pinned() -> None:
    y = gg.label(gg.mul_mat(weight("a_w", 16, 24), gg.input("x", "f32", ne=(16, 64))), "here")
    pins = {"^here$": "numpy", **PINS}
    assert places(gg.compile({"y": y}, backends=["null:0"], pins=pins)) == ["numpy"]


# -- the staging buffer -------------------------------------------------------------------------


def chain(layers: int, tokens: int = 64) -> dict[str, Node]:
    h = gg.input("x", "f32", ne=(128, tokens))
    for i in range(layers):
        h = gg.scale(gg.mul_mat(weight(f"blk.{i}_w", 128, 128), h), s=0.1)
    return {"y": h}


def test_borrowed_weights_stand_in_the_arena_one_after_another() -> None:
    two, six = (borrowing(chain(n), read_ahead=False) for n in (2, 6))
    nbytes = 128 * 128 * 4
    assert places(six) == ["null:0"]
    assert ops(six.splits[0]) == ["transfer", "mul_mat", "scale"] * 6
    loads = [step for step in six.steps if isinstance(step, LoadStep)]
    assert {step.nbytes for step in loads} == {nbytes + HEADER}
    assert row(six, "null:0").compute == row(two, "null:0").compute
    # The weight in its layout and plain, and its product's tensors; no room for a second weight.
    assert 2 * nbytes < row(six, "null:0").compute < 3 * nbytes + 2 * 128 * 64 * 4
    assert row(six, "null:0").weights == 0
    assert f"split 0 on null:0: 0 copies, {3 * 6} steps" in str(six)
    feed = values(x=(64, 128))
    for _ in range(2):
        same(six.run(feed), gg.compile(chain(6)).run(feed))


def test_two_products_with_one_borrowed_weight_load_it_once() -> None:
    w, x = weight("a_w", 16, 16), gg.input("x", "f32", ne=(16, 64))
    y = {"y": gg.mul_mat(w, gg.relu(gg.mul_mat(w, x)))}
    plan = borrowing(y)
    assert sum(isinstance(step, LoadStep) for step in plan.steps) == 1
    feed = values(x=(64, 16))
    same(plan.run(feed), gg.compile(y).run(feed))


def test_a_view_of_a_borrowed_weight_reads_it_plain() -> None:
    w, x = weight("a_w", 16, 16), gg.input("x", "f32", ne=(16, 64))
    part = gg.view(w, ne=(16, 8), start=(0, 8))
    y = {"y": gg.mul_mat(part, x), "z": gg.mul_mat(w, x)}
    plan = borrowing(y)
    feed = values(x=(64, 16))
    same(plan.run(feed), gg.compile(y).run(feed))


def test_one_store_borrows_for_a_prompt_and_not_for_a_token() -> None:
    store = gg.Store()
    prompt, token = (borrowing(chain(2, tokens), store=store) for tokens in (64, 1))
    assert (places(prompt), places(token)) == (["null:0"], ["numpy"])
    for plan, tokens in ((prompt, 64), (token, 1), (prompt, 64)):
        feed = values(x=(tokens, 128))
        same(plan.run(feed), gg.compile(chain(2, tokens)).run(feed))


# -- resident weights ---------------------------------------------------------------------------


def both(pins: dict[str, str]) -> Plan:
    """One weight in a product on each of two devices."""
    w, x = weight("w", 16, 16), gg.input("x", "f32", ne=(16, 4))
    a = gg.label(gg.mul_mat(w, gg.label(gg.relu(x), "left")), "left")
    b = gg.label(gg.mul_mat(w, gg.label(gg.tanh(x), "right")), "right")
    pins = {"^left$": "null:0", "^right$": "null:1", **pins}
    return gg.compile({"a": a, "b": b}, backends=["null:0"], pins=pins)


def test_an_unpinned_weight_is_resident_wherever_it_is_used() -> None:
    plan = both({})
    nbytes = 16 * 16 * 4 + HEADER
    assert [row(plan, p).weights for p in ("null:0", "null:1")] == [nbytes, nbytes]
    assert plan.memory.weights == 2 * nbytes
    assert not any(isinstance(step, LoadStep) for step in plan.steps)
    got, x = plan.run(values(x=(4, 16))), values(x=(4, 16))["x"]
    w = data_of(weight("w", 16, 16))
    np.testing.assert_allclose(got["a"], np.maximum(x, 0) @ w.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["b"], np.tanh(x) @ w.T, rtol=1e-4, atol=1e-5)


def test_a_pinned_weight_is_resident_only_there() -> None:
    plan = both({"^w$": "null:0"})
    nbytes = 16 * 16 * 4 + HEADER
    assert [row(plan, p).weights for p in ("null:0", "null:1")] == [nbytes, 0]
    (load,) = [step for step in plan.steps if isinstance(step, LoadStep)]
    assert plan.place_of(load.node) == "null:1" and load.nbytes == nbytes
    feed = values(x=(4, 16))
    same(plan.run(feed), both({}).run(feed))


def test_the_host_reads_weights_where_they_are() -> None:
    w, x = weight("w", 16, 16), gg.input("x", "f32", ne=(16, 4))
    far = gg.label(gg.mul_mat(w, gg.relu(x)), "far")
    near = gg.label(gg.mul_mat(w, gg.tanh(x)), "near")
    for pins in ({"^near$": "numpy"}, {"^near$": "numpy", "^w$": "null:0"}):
        plan = gg.compile({"a": far, "b": near}, backends=["null:0"], pins=pins).bind()
        assert not copied(plan) or all(nbytes == x.spec.nbytes for _, nbytes in copied(plan))
        own = data_of(w).ctypes.data
        on_host = [a for a in plan.addresses.values() if isinstance(a.buffer, np.ndarray)]
        assert own in {a.buffer.ctypes.data + a.offset for a in on_host}
        feed = values(x=(4, 16))
        same(plan.run(feed), gg.compile({"a": far, "b": near}).run(feed))


def test_an_unpinned_weight_follows_its_first_consumer() -> None:
    w, x = weight("w", 16, 16), gg.input("x", "f32", ne=(16, 4))
    y = gg.label(gg.mul_mat(w, x), "there")
    plan = gg.compile({"y": y}, backends=["null:0"], pins={"^there$": "null:1"})
    assert where(plan, "w") == "null:1"
    assert row(plan, "null:0").total == 0

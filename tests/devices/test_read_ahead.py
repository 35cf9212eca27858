"""Weights of the host that a device reads ahead, and experts that it leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
import pytest
from stacks import ops, places, row, same, weight

import pyggml as gg
from pyggml import backends
from pyggml.backends.step import LoadStep
from pyggml.errors import DTypeError, OutOfMemoryError
from pyggml.node import Node
from pyggml.runtime.plan import Plan
from tests.interrupts import everywhere

PINS = {"_w": "numpy"}
EXPERTS = 4


@pytest.fixture
def null() -> Iterator[Any]:
    device: Any = backends.get("null", 0)
    yield device
    device.queue.pace = device.loads.pace = device.limit = None


def planned(outputs: dict[str, Node], **options: Any) -> Plan:
    return gg.compile(outputs, **{"backends": ["null:0", "numpy"], "pins": PINS, **options})


def loads(plan: Plan) -> dict[str, LoadStep]:
    """Weight -> its load."""
    return {s.reads[0].attrs["name"]: s for s in plan.steps if isinstance(s, LoadStep)}


def ahead(plan: Plan) -> list[str]:
    return [name for name, step in loads(plan).items() if step.ahead]


def chain(layers: int, tokens: int = 64) -> dict[str, Node]:
    h = gg.input("x", "f32", ne=(128, tokens))
    for i in range(layers):
        h = gg.scale(gg.mul_mat(weight(f"blk.{i}_w", 128, 128), h), s=0.1)
    return {"y": h}


def experts(layers: int, tokens: int = 64, used: int = 2, routed: bool = True) -> dict[str, Node]:
    """Layers whose ids are computed in each, if `routed`."""
    h = gg.input("x", "f32", ne=(16, tokens))
    ids = gg.input("ids", "i32", ne=(used, tokens))
    for i in range(layers):
        up, gate = (weight(f"blk.{i}.{name}_w", 16, 8, EXPERTS) for name in ("up", "gate"))
        down = weight(f"blk.{i}.down_w", 8, 16, EXPERTS)
        if routed:
            ids = gg.argsort(gg.mul_mat(weight(f"router.{i}", 16, EXPERTS), h), order="desc")
            ids = gg.view(ids, ne=(used, tokens))
        y = gg.moe_up_gate(up, gate, gg.reshape(h, ne=(16, 1, tokens)), ids)
        h = gg.rms_norm(gg.add(h, gg.multi_add(gg.mul_mat_id(down, y, ids))), eps=1e-6)
    return {"y": h}


def feed(tokens: int = 64, k: int = 16, **more: Any) -> dict[str, Any]:
    x = np.random.default_rng(0).standard_normal((tokens, k)).astype(np.float32)
    return {"x": x, **more}


# -- the plan -----------------------------------------------------------------------------------


def test_the_weights_of_two_products_are_there_at_the_same_time() -> None:
    six, one = planned(chain(6)), planned(chain(6), read_ahead=False)
    each = ["transfer", "mul_mat", "scale"]
    assert ops(six.splits[0]) == ["transfer", *each * 5, "mul_mat", "scale"]
    assert ahead(six) == [f"blk.{i}_w" for i in range(1, 6)]
    assert row(six, "null:0").compute == row(planned(chain(12)), "null:0").compute
    nbytes = loads(six)["blk.0_w"].nbytes
    assert row(six, "null:0").ahead == nbytes and row(one, "null:0").ahead == 0
    assert 0.9 * nbytes < row(six, "null:0").compute - row(one, "null:0").compute < 1.1 * nbytes
    assert "are weights of the host, read ahead" in str(six.memory)
    assert "read ahead" in str(six) and ", ahead" in str(six)
    assert "ahead" not in str(one.memory) + str(one)
    assert six.read_ahead and not one.read_ahead


def test_the_first_weights_begin_with_the_split() -> None:
    h = gg.tanh(gg.silu(gg.input("x", "f32", ne=(128, 64))))
    plan = planned({"y": gg.mul_mat(weight("a_w", 128, 128), h)})
    assert ops(plan.splits[0]) == ["transfer", "silu", "tanh", "mul_mat"]
    assert ahead(plan) == ["a_w"]


def test_a_split_loads_only_what_it_reads() -> None:
    """The host computes between two products."""
    x = gg.input("x", "f32", ne=(128, 64))
    h = gg.label(gg.silu(gg.mul_mat(weight("a_w", 128, 128), x)), "host")
    plan = planned({"y": gg.mul_mat(weight("b_w", 128, 128), h)}, pins={"^host$": "numpy", **PINS})
    assert places(plan) == ["null:0", "numpy", "null:0"]
    assert [ops(split).count("transfer") for split in plan.splits] == [1, 0, 1]
    assert ahead(plan) == []


def test_experts_of_many_rows_are_read_before_their_ids_are_known() -> None:
    plan = planned(experts(3))
    of_chosen = [name for name, step in loads(plan).items() if step.ids is not None]
    assert ahead(plan) == list(loads(plan))  # the first ones beside the router
    assert of_chosen == [f"blk.{i}.down_w" for i in range(3)]


def test_experts_of_few_rows_wait_for_their_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up and gate wait. The ids of down are known while up and gate are computed."""
    monkeypatch.setattr(backends.get("numpy"), "lends_from", lambda node: 1, raising=False)
    plan = planned(experts(3, tokens=2))
    assert places(plan) == ["null:0"]
    assert ahead(plan) == [f"blk.{i}.down_w" for i in range(3)]
    assert all(step.ids is not None for step in loads(plan).values())


def test_experts_whose_ids_are_an_input_are_always_chosen() -> None:
    plan = planned(experts(2, routed=False))
    assert all(step.ids is not None for step in loads(plan).values())


def test_a_weight_that_something_else_reads_is_sent_whole() -> None:
    w, ids = weight("a_w", 16, 16, EXPERTS), gg.input("ids", "i32", ne=(2, 256))
    b = gg.input("x", "f32", ne=(16, 1, 256))
    part = gg.mul_mat(gg.view(w, ne=(16, 16)), gg.reshape(b, ne=(16, 256)))
    plan = planned({"y": gg.mul_mat_id(w, b, ids), "z": part})
    assert loads(plan)["a_w"].ids is None


@pytest.mark.parametrize("read_ahead", [True, False])
def test_experts_do_not_wait_for_ids_that_the_host_lends(read_ahead: bool) -> None:
    """Both are loaded before the product: one load does not read what the other brings."""
    b = gg.input("x", "f32", ne=(16, 1, 512))
    table = np.random.default_rng(0).integers(0, EXPERTS, (512, 2)).astype(np.int32)
    y = gg.mul_mat_id(weight("a_w", 16, 8, EXPERTS), b, gg.constant(table, name="ids_w"))
    plan = planned({"y": y}, read_ahead=read_ahead)
    assert {name: step.ids for name, step in loads(plan).items()} == {"a_w": None, "ids_w": None}
    x = {"x": feed(512)["x"][:, None]}
    same(plan.run(x), gg.compile({"y": y}).run(x))


@pytest.mark.parametrize("room", [-256, 0])
def test_a_device_without_room_does_not_read_ahead(room: int) -> None:
    """Its driver counts. What the user says, counts more."""
    device: Any = backends.get("cuda", 0)
    least = row(planned(chain(4, 256), backends=["cuda:0", "numpy"]), "cuda:0").total
    place = f"cuda:0:{(least + device.driver_bytes + room) / 1024}KiB"
    plan, forced = (
        planned(chain(4, 256), backends=[place, "numpy"], **options)
        for options in ({}, {"read_ahead": True})
    )
    assert plan.read_ahead == (room == 0) and forced.read_ahead


def test_the_argument() -> None:
    with pytest.raises(DTypeError, match="read_ahead= must be True, False or None, not 1"):
        planned(chain(1), read_ahead=1)


# -- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [chain(5), experts(3), experts(3, routed=False)])
@pytest.mark.parametrize("seed", range(6))
def test_results_are_the_same_whenever_a_load_runs(
    outputs: dict[str, Node], seed: int, null: Any
) -> None:
    """Loads may be early or late. In place of experts that no id chooses they leave NaN."""
    plan, want = planned(outputs), gg.compile(outputs)
    k = want.inputs["x"].ne[0]
    table = np.random.default_rng(seed).integers(-1, 3, (64, 2))
    ids = {"ids": table} if "ids" in want.inputs else {}
    null.queue.pace, null.loads.pace = Random(seed), Random(seed + 50) if seed % 2 else None
    for _ in range(3):
        same(plan.run(feed(k=k, **ids)), want.run(feed(k=k, **ids)))


def test_a_plan_stays_usable_after_interrupts(null: Any) -> None:
    plan, want = planned(chain(3)).bind(), gg.compile(chain(3)).run(feed(k=128))

    def begin() -> Any:
        return lambda: plan.run(feed(k=128))

    for where in everywhere(begin, 40):
        got = plan.run(feed(k=128))
        assert (got["y"] == want["y"]).all(), where


def test_without_memory_for_two_products_the_message_says_what_helps(null: Any) -> None:
    """And a plan that does without them runs."""
    two, one = planned(chain(3)), planned(chain(3), read_ahead=False)
    null.limit = null.allocated + row(two, "null:0").total - 1
    with pytest.raises(OutOfMemoryError, match="read_ahead=False"):
        two.bind()
    same(one.run(feed(k=128)), gg.compile(chain(3)).run(feed(k=128)))
    null.limit = None
    same(two.run(feed(k=128)), gg.compile(chain(3)).run(feed(k=128)))

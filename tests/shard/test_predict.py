"""Predicted times: each part of a step's time, and that each follows its own rate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import pyggml as gg
from pyggml.runtime.predict import PEERS, SMALL, Rates, busiest

RATES = Rates()
#: Rates at which nothing takes time, to look at one of them alone.
FREE = Rates(1e30, 1e30, 0.0, 1e30, 1e30, 0.0, 1e30, 0.0, 0.0)


def weight(name: str, *shape: int) -> gg.Node:
    return gg.constant(np.zeros(shape, "f4"), name=name)


def plan_of(y: gg.Node, devices: int = 1, **shard: int) -> gg.Plan:
    places = [f"cuda:{i}:8GiB" for i in range(devices)]
    return gg.compile({"y": y}, backends=places, shard=shard or None)


def rows_then_sum(devices: int, tokens: int) -> gg.Plan:
    """A pair of products over devices: one sum of [1024, tokens]."""
    hidden = gg.relu(gg.mul_mat(weight("a", 1024, 64), gg.input("x", ne=(64, tokens))))
    return plan_of(gg.mul_mat(weight("b", 1024, 1024), hidden), devices, rows=devices)


def experts(devices: int, tokens: int) -> gg.Plan:
    """Products by expert id that devices divide, and the sum of them."""
    b, ids = gg.input("b", ne=(64, 1, tokens)), gg.input("ids", "i32", ne=(4, tokens))
    y = gg.mul_mat_id(weight("e", 32, 256, 64), b, ids)
    return plan_of(y, devices, **({"experts": devices} if devices > 1 else {}))


def test_a_step_takes_a_launch_and_its_work() -> None:
    x = gg.input("x", ne=(4096, 1))
    seconds = plan_of(gg.mul_mat(weight("w", 4096, 4096), x)).predict().total
    nbytes = 4 * (4096 * 4096 + 2 * 4096)
    assert seconds == pytest.approx(RATES.launch + nbytes / RATES.nbytes)


def test_each_launch_of_a_step_takes_its_time() -> None:
    """Columns are prepared by a launch of their own."""
    blocks = gg.constant(np.zeros((4096, 4096), "f4"), dtype="q8_0", name="w")
    plan = plan_of(gg.mul_mat(blocks, gg.input("x", ne=(4096, 2048))))
    assert len(plan.steps) == 1
    assert plan.predict(replace(FREE, launch=1.0)).total == pytest.approx(2.0)


@pytest.mark.parametrize(("devices", "tokens"), [(2, 1), (4, 8), (8, 32)])
def test_a_small_sum_sends_to_all_others(devices: int, tokens: int) -> None:
    nbytes = 4 * 1024 * tokens
    assert nbytes <= SMALL
    seconds = rows_then_sum(devices, tokens).predict().between
    assert seconds == pytest.approx(RATES.small + (devices - 1) * nbytes / RATES.link)


@pytest.mark.parametrize(("devices", "tokens"), [(2, 64), (2 * PEERS, 1)])
def test_large_sums_and_those_of_many_devices_are_a_ring(devices: int, tokens: int) -> None:
    sent = 2 * (devices - 1) / devices * 4 * 1024 * tokens
    seconds = rows_then_sum(devices, tokens).predict().between
    assert seconds == pytest.approx(RATES.latency + sent / RATES.link)


def test_two_devices_send_rounded_parts_of_large_sums() -> None:
    """In half the bytes, and what follows takes place beside."""
    hidden = gg.relu(gg.mul_mat(weight("a", 1024, 64), gg.input("x", ne=(64, 2048))))
    down = gg.constant(np.zeros((1024, 1024), "f2"), name="b", dtype="f16")
    x = gg.add(gg.input("residual", ne=(1024, 2048)), gg.mul_mat(down, hidden))
    y = gg.mul(gg.rms_norm(x, eps=1e-5), weight("norm", 1024))
    plan = plan_of(y, 2, rows=2)
    seconds = RATES.small + 2 * 1024 * 2048 / RATES.link
    assert plan.predict().between == pytest.approx(seconds)
    assert plan.predict(replace(FREE, nbytes=1.0)).between >= 2 * 4 * 1024 * 2048


def test_a_device_takes_its_share_of_the_experts() -> None:
    """Many tokens: nearly half on each of two. Each expert leaves a part of a tile empty."""
    rates = replace(FREE, experts=1e12)
    one, two = (max(experts(n, 4096).predict(rates).busy.values()) for n in (1, 2))
    assert one == pytest.approx(2 * 64 * 256 * 4 * 4096 / 1e12)
    assert 0.5 < two / one < 0.51
    rates = replace(rates, tail=58.0)
    one, two = (max(experts(n, 4096).predict(rates).busy.values()) for n in (1, 2))
    assert one == pytest.approx(2 * 64 * 256 * (4 * 4096 + 32 * 58) / 1e12)
    assert 0.5 < two / one < 0.51


def test_a_token_waits_for_the_device_with_most_of_its_experts() -> None:
    """More than the mean of two of four experts, fewer than all."""
    rates = replace(FREE, nbytes=1e9)
    one, two = (max(experts(n, 1).predict(rates).busy.values()) for n in (1, 2))
    assert 0.6 < two / one < 0.9


@pytest.mark.parametrize(
    ("picks", "devices", "error"), [(6, 2, 0.03), (8, 8, 0.08), (8, 64, 0.3), (12288, 64, 0.01)]
)
def test_the_busiest_device(picks: int, devices: int, error: float) -> None:
    """As many as of random draws; few picks of many devices are the worst case."""
    draws = np.random.default_rng(0).multinomial(picks, [1 / devices] * devices, size=4000)
    assert busiest(picks, 1 / devices) == pytest.approx(draws.max(1).mean(), rel=error)
    assert busiest(picks, 1.0) == picks


def test_inner_results_of_a_fused_step_do_not_move() -> None:
    """rms_norm and mul in one kernel read x and the weight, and write y."""
    x = gg.input("x", ne=(4096, 512))
    y = gg.mul(gg.rms_norm(x, eps=1e-6), weight("w", 4096))
    plan = gg.compile({"y": y}, backends=["cuda:0:8GiB"])
    fused = [step for step in plan.steps if len(step.nodes) > 1]
    assert len(plan.steps) == len(fused) == 1
    nbytes = 4 * (2 * 4096 * 512 + 4096)
    assert plan.predict(replace(FREE, nbytes=1e9)).total == pytest.approx(nbytes / 1e9)


def test_a_causal_mask_leaves_half_of_the_scores() -> None:
    def seconds(mask: gg.Node | None) -> float:
        q, k, v = (gg.input(name, "f32", ne=(128, 512, 4)) for name in "qkv")
        y = gg.flash_attn_ext(q, gg.cast(k, dtype="f16"), gg.cast(v, dtype="f16"), mask, scale=1.0)
        plan = gg.compile({"y": y}, backends=["cuda:0:8GiB"])
        return plan.predict(replace(FREE, attention=1e12)).total

    pos = gg.input("pos", "i32", ne=(512,))
    ratio = seconds(gg.causal_mask(pos, n_kv=512)) / seconds(None)
    assert ratio == pytest.approx(1 - 511 / 1024)

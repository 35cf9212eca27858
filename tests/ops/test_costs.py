"""A cost counts the bytes and operations that an op needs, not the whole tensors around them."""

from __future__ import annotations

import pytest

import pyggml as gg
from pyggml.loop import loop_of
from pyggml.operation import cost_of


@pytest.mark.parametrize("dtype, row", [("f32", 256), ("q8_0", 68)])
def test_get_rows_reads_only_the_chosen_rows(dtype: str, row: int) -> None:
    table, ids = gg.input("table", dtype, ne=(64, 1000)), gg.input("ids", "i32", ne=(3,))
    assert cost_of(gg.get_rows(table, ids)).nbytes == 3 * row + 3 * 4 + 3 * 256
    small = gg.input("small", dtype, ne=(64, 2))
    many = gg.input("many", "i32", ne=(50,))
    assert cost_of(gg.get_rows(small, many)).nbytes == 2 * row + 50 * 4 + 50 * 256


@pytest.mark.parametrize("dtype, row", [("f16", 128), ("q8_0", 68)])
def test_set_rows_writes_only_the_chosen_rows(dtype: str, row: int) -> None:
    cache = gg.state("cache", dtype, ne=(64, 1000))
    b, ids = gg.input("b", "f32", ne=(64, 2)), gg.input("ids", "i64", ne=(2,))
    assert cost_of(gg.set_rows(cache, b, ids)).nbytes == 2 * row + 2 * 256 + 2 * 8


def test_cpy_writes_its_target_and_does_not_read_it() -> None:
    cache = gg.state("cache", "f16", ne=(64, 1000))
    part = gg.view(cache, ne=(64, 2), start=(0, 7))
    assert cost_of(gg.cpy(gg.input("a", "f32", ne=(64, 2)), part)).nbytes == 2 * 256 + 2 * 128


def test_only_the_chosen_experts_are_read() -> None:
    b, ids = gg.input("b", "f32", ne=(32, 1, 3)), gg.input("ids", "i32", ne=(2, 3))
    up, gate = (gg.input(n, "f32", ne=(32, 16, 64)) for n in ("up", "gate"))
    matrix, result = 32 * 16 * 4, 16 * 2 * 3 * 4
    others = b.spec.nbytes + ids.spec.nbytes + result
    assert cost_of(gg.mul_mat_id(up, b, ids)).nbytes == 6 * matrix + others
    assert cost_of(gg.moe_up_gate(up, gate, b, ids)).nbytes == 12 * matrix + others


def test_a_source_used_twice_is_read_once() -> None:
    x = gg.input("x", "f32", ne=(64,))
    assert cost_of(gg.mul(x, x)).nbytes == 2 * 256


def test_attention_reads_only_its_views_of_a_cache() -> None:
    cache = gg.state("cache", "f16", ne=(64, 1000))
    k = gg.view(cache, ne=(64, 10))
    q = gg.input("q", "f32", ne=(64, 2))
    assert cost_of(gg.flash_attn_ext(q, k, k, scale=1.0)).nbytes <= 2 * 2 * 256 + 2 * 10 * 128


def test_the_values_in_a_latent_cache_are_read_with_its_keys() -> None:
    cache, q = gg.state("cache", "f16", ne=(576, 100)), gg.input("q", "f32", ne=(576, 1, 2))
    values = gg.view(cache, ne=(512, 100), nb=(576 * 2,))
    y = gg.flash_attn_ext(q, cache, values, scale=1.0)
    assert cost_of(y).nbytes == cache.spec.nbytes + q.spec.nbytes + y.spec.nbytes


def test_a_loop_costs_as_much_as_the_nodes_it_replaces() -> None:
    k, v = gg.input("k", "f32", ne=(8, 61, 7)), gg.input("v", "f32", ne=(61, 8, 7))
    y = gg.mul_mat(v, gg.soft_max(gg.mul_mat(k, gg.input("q", "f32", ne=(8, 33, 7)))))
    whole = gg.compile({"y": y})
    flops = sum(cost_of(step.node).flops for step in whole.steps)
    plan = gg.compile({"y": y}, amb=whole.memory.score_peak / 2.5 / 2**20)
    (loop,) = (step.node for step in plan.steps if loop_of(step.node) is not None)
    assert len(loop_of(loop).bodies()) == 2  # type: ignore[union-attr]
    assert cost_of(loop).flops == flops
    nbytes = sum(cost_of(step.node).nbytes for step in plan.steps)
    leaves = (k, v, *(n for n in plan.graph.nodes if n.attrs.get("name") == "q"))
    assert nbytes == sum(n.spec.nbytes for n in leaves) + y.spec.nbytes

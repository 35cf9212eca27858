"""What single ops guarantee: unused experts are not read, scratch is small, meanings are equal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import pyggml as gg
from pyggml.backends.numpy.table import KERNELS
from pyggml.node import Node
from pyggml.parity.case import Case, build
from pyggml.parity.cases import cases

rng = np.random.default_rng(0)


def weights(*shape: int) -> Node:
    return gg.constant(rng.standard_normal(shape, np.float32))


@pytest.mark.parametrize("fused", [False, True])
def test_experts_that_no_token_chose_are_not_read(fused: bool) -> None:
    """Their matrices are NaN, so any product with them makes the result NaN."""
    array = rng.standard_normal((8, 5, 64)).astype(np.float32)
    array[[1, 4, 7]] = np.nan
    experts, b = gg.constant(array), gg.input("b", "f32", ne=(64, 1, 6))
    ids = gg.constant(rng.choice([0, 2, 3, 5, 6], (6, 2)).astype(np.int32))
    y = gg.moe_up_gate(experts, experts, b, ids) if fused else gg.mul_mat_id(experts, b, ids)
    assert np.isfinite(gg.compile({"y": y}).run(b=np.ones((6, 1, 64)))["y"]).all()


def test_flash_attention_does_not_store_all_scores() -> None:
    """16 heads, 512 queries, 16384 keys: the scores alone would be 512 MiB."""
    q = gg.input("q", "f32", ne=(192, 512, 16))
    k, v = (gg.input(n, "f16", ne=(d, 16384, 16)) for n, d in (("k", 192), ("v", 128)))
    node = gg.flash_attn_ext(q, k, v, scale=0.07)
    scratch = KERNELS[node.op].scratch
    assert scratch is not None and scratch(node) < 64 * 2**20


#: The first case of every op that has a meaning in simpler ops.
WITH_MEANING = {case.op: case for case in reversed(cases()) if case.means}


@pytest.mark.parametrize("case", WITH_MEANING.values(), ids=lambda case: case.op)
def test_a_fused_op_equals_its_meaning(case: Case) -> None:
    kernel, meaning = build(replace(case, means=False)), build(case)
    assert kernel.node.op.meaning is not None and meaning.node.op is not kernel.node.op
    plans = [gg.compile({"y": built.node}) for built in (kernel, meaning)]
    results = [plan.run(kernel.inputs)["y"] for plan in plans]
    np.testing.assert_allclose(*results, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("prec", ["default", "f32"])
def test_a_meaning_keeps_the_precision(prec: str) -> None:
    """Every product in the meaning has the op's `prec`, on whichever device it runs."""
    x, w = gg.input("x", "f32", ne=(64, 5)), weights(7, 64)
    experts, ids = weights(4, 7, 64), gg.input("ids", "i32", ne=(2, 5))
    for node in (
        gg.fused_up_gate(w, w, x, prec=prec),
        gg.moe_up_gate(experts, experts, gg.reshape(x, ne=(64, 1, 5)), ids, prec=prec),
    ):
        nodes = gg.Graph({"y": node.op.meaning(*node.src, **node.attrs)}).nodes
        products = [n for n in nodes if n.op in (gg.ops.mul_mat, gg.ops.mul_mat_id)]
        assert products and {n.attrs["prec"] for n in products} == {prec}

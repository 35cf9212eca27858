"""Why steps do not take the fast kernel: each reason, and none for the fast paths."""

from __future__ import annotations

import numpy as np
import pytest

import pyggml as gg
from pyggml.backends.cuda.naming import name_of
from pyggml.backends.cuda.reasons import reason
from pyggml.node import Node
from tests.cuda.test_recording import steps_of


def reasons(node: Node) -> str:
    """The reasons of a node's steps."""
    each = (reason(step, [name_of(r) for r in records]) for step, records in steps_of(node))
    return "; ".join(filter(None, each))


def weight(*shape: int, dtype: str, name: str = "w") -> Node:
    return gg.constant(np.ones(shape, np.float32), dtype=dtype, name=name)


def product(dtype: str, columns: int, rows: int = 64, **attrs: str) -> Node:
    return gg.mul_mat(weight(rows, 256, dtype=dtype), gg.input("x", ne=(256, columns)), **attrs)


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0", "f16", "bf16"])
@pytest.mark.parametrize("columns", [1, 8, 200])
def test_products_with_fast_kernels(dtype: str, columns: int) -> None:
    assert reasons(product(dtype, columns)) == ""


def test_products_with_slow_kernels() -> None:
    assert reasons(product("f32", 200)) == ""  # f32 as two numbers of f16
    assert reasons(product("f32", 200, rows=512)) == (
        "f32 weights are multiplied in f32, without tensor cores"
    )
    assert reasons(product("q8_0", 200, prec="f32")) == (
        'prec="f32" keeps products off the tensor cores'
    )
    assert reasons(product("f16", 200, rows=512, prec="f32")) == (
        'prec="f32" decodes f16 weights to f32, without tensor cores'
    )
    for dtype in ("f32", "q8_0"):  # a router's, which only reads its weights
        assert reasons(product(dtype, 1, prec="f32")) == ""


def experts(dtype: str, n: int, tokens: int) -> Node:
    ids = gg.input("ids", "i32", ne=(2, tokens))
    return gg.mul_mat_id(weight(4, 64, n, dtype=dtype), gg.input("x", ne=(n, 1, tokens)), ids)


def test_experts() -> None:
    assert reasons(experts("f16", 64, 100)) == reasons(experts("f32", 64, 8)) == ""
    assert "experts with f32 weights" in reasons(experts("f32", 64, 100))
    assert "rows of 40 elements are not whole blocks" in reasons(experts("f16", 40, 100))


def test_up_and_gate_of_two_types() -> None:
    up, gate = weight(64, 256, dtype="q8_0"), weight(64, 256, dtype="q8_0", name="gate")
    x = gg.input("x", ne=(256, 1))
    assert reasons(gg.fused_up_gate(up, gate, x)) == ""
    other = weight(64, 256, dtype="q4_0", name="gate")
    assert "up and gate differ" in reasons(gg.fused_up_gate(up, other, x))
    up, gate = weight(64, 256, dtype="f16"), weight(64, 256, dtype="f16", name="gate")
    assert "up and gate of f16 are two products" in reasons(gg.fused_up_gate(up, gate, x))


def attention(d: int, kinds: tuple[str, str], n_q: int = 1, prec: str = "default") -> Node:
    k, v = (gg.input(n, t, ne=(d, 256, 2)) for n, t in zip("kv", kinds))
    q = gg.input("q", ne=(d, n_q, 2))
    return gg.flash_attn_ext(q, k, v, scale=1.0, prec=prec)


def test_attention() -> None:
    assert reasons(attention(128, ("f16", "f16"))) == ""
    assert "heads of 72/72 have no tensor-core kernel" in reasons(attention(72, ("f16", "f16")))
    assert "K of f16 and V of q8_0" in reasons(attention(128, ("f16", "q8_0")))
    assert "K and V of q4_0" in reasons(attention(128, ("q4_0", "q4_0")))
    assert 'prec="f32"' in reasons(attention(128, ("f16", "f16"), prec="f32"))


def indexer(d: int = 128, heads: int = 64, dtype: str = "f16", tokens: int = 1) -> Node:
    q, k = gg.input("q", ne=(d, heads, tokens)), gg.input("k", dtype, ne=(d, 300))
    return gg.lightning_indexer(q, k, gg.input("w", ne=(heads, tokens)))


def test_an_indexer() -> None:
    for dtype in ("f16", "bf16", "q8_0"):
        assert reasons(indexer(dtype=dtype)) == reasons(indexer(dtype=dtype, tokens=9)) == ""
    assert "rows of f32" in reasons(indexer(dtype="f32"))
    assert "rows of 64 elements" in reasons(indexer(64))
    assert "48 heads" in reasons(indexer(heads=48))
    odd = gg.view(gg.input("k", "f16", ne=(129, 300)), ne=(128, 300))
    q, w = gg.input("q", ne=(128, 64, 1)), gg.input("w", ne=(64, 1))
    assert "not aligned" in reasons(gg.lightning_indexer(q, odd, w))

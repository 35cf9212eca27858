"""Every builder's errors: which op, which tensors, both shapes, the user's line, what to do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import ops
from pyggml.errors import DTypeError, PyggmlError, ShapeError
from pyggml.operation import Op

S, T = ShapeError, DTypeError
f = {
    key: gg.input(key, kind, ne=ne)
    for key, kind, ne in (
        ("a84", "f32", (8, 4)), ("a83", "f32", (8, 3)), ("a48", "f32", (4, 8)),
        ("a4", "f32", (4,)), ("a8421", "f32", (8, 4, 2)), ("h84", "f16", (8, 4)),
        ("i84", "i32", (8, 4)), ("i4", "i32", (4,)), ("i3", "i32", (3,)), ("l4", "i64", (4,)),
        ("q", "q4_0", (32, 4)), ("a32", "f32", (32, 4)), ("a324", "f32", (32, 4, 4)),
        ("q8", "f32", (8, 5, 6)), ("k8", "f32", (8, 7, 4)), ("k82", "f32", (8, 7, 2)),
        ("k83", "f32", (8, 7, 3)), ("v9", "f32", (8, 9, 2)), ("m", "f16", (7, 5)),
        ("m3", "f16", (7, 3)), ("m4", "f16", (7, 5, 4)), ("mf", "f32", (7, 5)),
        ("e", "f32", (8, 3, 5)), ("b81", "f32", (8, 1, 4)), ("ids", "i32", (2, 4)),
        ("r", "f32", (8, 2, 4)), ("a17", "f32", (17,)), ("a8", "f32", (8,)),
    )
}  # fmt: skip
X = type("X", (), f)
st = gg.state("st", "f32", ne=(8, 6))
sq = gg.state("sq", "iq2_xs", ne=(256, 6))

#: (call, its error, a part of the message)
CALLS: list[tuple[Callable[[], Any], type[PyggmlError], str]] = [
    # elementwise
    (lambda: gg.add(X.a84, X.a48), S, "add(a84, a48): b does not repeat into a"),
    (lambda: gg.add(X.a84, X.h84), T, "cast one of them"),
    (lambda: gg.sub(X.i84, X.i84), T, "a has type i32"),
    (lambda: gg.mul(X.q, X.q), T, "a has type q4_0; expected f32, f16. Use cast"),
    (lambda: gg.div(X.a83, X.a84), S, "b's ne1=4 does not divide a's 3"),
    (lambda: gg.scale(X.a84, s=float("inf")), S, "s=inf must be finite"),
    (lambda: gg.scale(X.a84, s=float("nan")), S, "s= is NaN"),
    (lambda: gg.scale(X.a84, s=10**400), S, "s= is too large"),
    (lambda: gg.scale(X.a84, s="1"), T, "s= takes float, not '1'"),
    (lambda: gg.scale(X.a84, s=True), T, "s= takes float, not True"),
    (lambda: gg.scale(X.a84), T, "the attribute s= is required"),
    (lambda: gg.scale(X.a84, 2.0), T, "scale takes 1 tensor (a), got 2 positional arguments"),
    (lambda: gg.scale(X.a84, s=1, scale=2), T, "scale has no argument 'scale'"),
    (lambda: gg.soft_max_ext(X.a84, max_bia=1.0), T, "did you mean max_bias?"),
    (lambda: gg.clamp(X.a84, min=2, max=1), S, "min=2.0 must not be above max=1.0"),
    (lambda: gg.fill(X.i84, value=1), T, "a has type i32"),
    (lambda: gg.exp(X.i84), T, "exp(i84): a has type i32"),
    (lambda: gg.relu(np.zeros(3)), T, "a must be a node, not ndarray; wrap arrays"),
    (lambda: gg.relu(), T, "the tensor a is missing"),
    (lambda: gg.add(X.a84, None), T, "b must be a node, not NoneType"),
    (lambda: gg.add(X.a84, X.a84, X.a84), T, "add takes 2 tensors (a, b)"),
    (lambda: gg.glu(X.a17), S, "a.ne[0]=17 must be even"),
    (lambda: gg.glu(X.a84, X.a83), S, "b must be [8, 4, 1, 1]"),
    (lambda: gg.swiglu(X.a17), S, "a.ne[0]=17 must be even"),
    (lambda: gg.rope(X.r, X.i3), S, "one for each token"),
    (lambda: gg.glu(X.a84, act="swish"), S, "must be one of silu, gelu, relu"),
    (lambda: gg.glu(X.a84, X.a84, swapped=True), S, "only for the form without b"),
    (lambda: gg.add_id(X.r, X.a83, X.i4), S, "ids must be [2, 4, 1, 1]"),
    (lambda: gg.add_id(X.r, X.a48, X.ids), S, "a row as long as a's"),
    # shapes
    (lambda: gg.reshape(X.a84, ne=(5, 6)), S, "a has 32 elements, but [5, 6] is 30"),
    (lambda: gg.reshape(X.a84, ne=(0, 6)), S, "every size must be at least 1"),
    (lambda: gg.reshape(X.a84, ne=(-8, -4)), S, "every size must be at least 1"),
    (lambda: gg.reshape(X.a84, ne=(2, 2, 2, 2, 2)), S, "one to four dimensions, not 5"),
    (lambda: gg.reshape(X.a84, ne=32), T, "takes whole numbers such as (64, 32), not 32"),
    (lambda: gg.reshape(X.a84, ne=(8.0, 4)), T, "takes whole numbers"),
    (lambda: gg.reshape(X.a84, ne=(True, 32)), T, "takes whole numbers"),
    (lambda: gg.reshape(X.a84, ne=None), T, "takes whole numbers"),
    (lambda: gg.reshape(gg.transpose(X.a84), ne=(32,)), S, "use cont(a) first"),
    (lambda: gg.reshape(X.q, ne=(8, 16)), S, "does not divide into q4_0 blocks of 32"),
    (lambda: gg.permute(X.a84, axes=(0, 0)), S, "must be a permutation of"),
    (lambda: gg.permute(X.a84, axes=(4, 1)), S, "must be a permutation of"),
    (lambda: gg.permute(X.a84, axes=(1.0, 0)), T, "takes whole numbers"),
    (lambda: gg.transpose(X.q), S, "cast a to f16 first"),
    (lambda: gg.view(X.a84, ne=(9, 4)), S, "does not fit in ne0=8"),
    (lambda: gg.view(X.a84, ne=(4, 4), start=(5,)), S, "slice of 4 from start 5 in steps of 1"),
    (lambda: gg.view(X.a84, ne=(4, 4), step=(0,)), S, "in steps of 0"),
    (lambda: gg.view(X.a84, ne=(4, 4), start=(-1,)), S, "from start -1"),
    (lambda: gg.view(X.a84, ne=(4, 4), start=(0,) * 5), S, "at most 4"),
    (lambda: gg.view(X.a84, ne=(4, 4), start="ab"), T, "takes whole numbers"),
    (lambda: gg.view(X.a84, ne=(4, 4), nb=(17,)), S, "is not a slice of"),
    (lambda: gg.view(X.a84, ne=(4, 4), offset=-4), S, "offset=-4 must not be negative"),
    (lambda: gg.view(X.a84, ne=(4,), offset=2), S, "2 bytes past the start of an element"),
    (lambda: gg.view(X.a84, ne=(4,), offset=4, start=(1,)), S, "not both"),
    (lambda: gg.view(np.zeros(3), ne=(4,)), T, "a must be a node"),
    (lambda: gg.state_of(X.a84), S, "a must be in the memory of a state"),
    (lambda: gg.cast(X.a84, dtype="q9"), T, "unknown type 'q9'; known types"),
    (lambda: gg.cast(X.a84, dtype="iq1_s"), T, "does not convert to iq1_s; expected f32 or one of"),
    (lambda: gg.cast(X.i84, dtype="f16"), T, "a has type i32"),
    (lambda: gg.cast(X.a84, dtype="q4_0"), S, "a row of 8 elements does not divide"),
    (lambda: gg.cpy(X.a84, X.a84), S, "must be a state or a view of one"),
    (lambda: gg.cpy(X.a84, st), S, "a has 32, b has 48"),
    (lambda: gg.cpy(X.a84, sq), T, "does not convert to iq2_xs"),
    (lambda: gg.concat(X.a84, X.a84, dim=4), S, "dim=4 must be 0, 1, 2 or 3"),
    (lambda: gg.concat(X.a84, X.h84, dim=0), T, "cast one of them"),
    (lambda: gg.concat(X.a84, X.a83, dim=0), S, "a's sizes except ne0"),
    (lambda: gg.repeat(X.a84, ne=(12, 4)), S, "ne0=8 does not divide 12"),
    (lambda: gg.repeat(X.q, ne=(32, 8)), T, "a has type q4_0"),
    (lambda: gg.get_rows(X.a84, X.a4), T, "ids has type f32"),
    (lambda: gg.get_rows(X.a84, X.l4), T, "ids has type i64"),
    (lambda: gg.get_rows(X.a8421, X.i4), S, "ids must be [n_ids, 2, 1] to match a"),
    (lambda: gg.set_rows(X.a84, X.a84, X.i4), S, "must be a state"),
    (lambda: gg.set_rows(st, X.a48, X.i4), S, "rows as long as a's"),
    (lambda: gg.set_rows(st, X.a84, X.i3), S, "must be [4, c1, c2]"),
    (lambda: gg.set_rows(st, X.i84, X.i4), T, "b has type i32"),
    # reduce, norm, rope
    (lambda: gg.sum_rows(X.h84), T, "a has type f16"),
    (lambda: gg.rms_norm(X.a84, eps=-1e-6), S, "must not be negative"),
    (lambda: gg.rms_norm(X.a84, eps=float("inf")), S, "eps=inf must be finite"),
    (lambda: gg.norm(X.a84, eps=-1e-6), S, "must not be negative"),
    (lambda: gg.norm(X.h84, eps=1e-6), T, "a has type f16"),
    (lambda: gg.dsv4_hc_comb(X.a84, X.a8, X.a8, eps=0, n_iter=0), S, "n_iter=0 must be at least 1"),
    (lambda: gg.dsv4_hc_comb(X.a48, X.a8, X.a4, eps=0, n_iter=1), S, "must be (2 + hc) hc"),
    (lambda: gg.dsv4_hc_comb(X.a84, X.a84, X.a8, eps=0, n_iter=1), S, "needs one row of at least"),
    (lambda: gg.dsv4_hc_comb(X.a84, X.a8, X.a4, eps=0, n_iter=1), S, "as long as a row of mixes"),
    (lambda: gg.dsv4_hc_post(X.a84, X.a84, X.a84), S, "x must be [8, 1, 1, 1]"),
    (lambda: gg.dsv4_hc_post(X.a8, X.a84, X.a8), S, "post must be [4, 1, 1, 1]"),
    (lambda: gg.dsv4_hc_post(X.a8, X.a84, X.a4, X.a84), S, "comb must be [4, 4, 1, 1]"),
    (lambda: gg.dsv4_hc_pre(X.a84, X.a8), S, "a weight for each row of a"),
    (lambda: gg.soft_max_ext(X.k82, X.m), S, "must have ne0=8 (keys) and ne1 >= 7"),
    (lambda: gg.soft_max_ext(gg.cont(gg.transpose(X.mf)), X.mf), S, "must have ne0=5"),
    (lambda: gg.soft_max_ext(X.a84, max_bias=8.0), S, "max_bias=8.0 needs a mask"),
    (lambda: gg.soft_max_ext(X.mf, X.m, max_bias=-1.0), S, "must not be negative"),
    (lambda: gg.soft_max_ext(X.k82, None, X.a4), S, "sinks must be [2, 1, 1, 1]"),
    (lambda: gg.soft_max_ext(X.k82, head0=1, n_head=2), S, "must be within n_head=2"),
    (lambda: gg.soft_max(X.h84), T, "a has type f16"),
    (lambda: gg.argsort(X.a84, order="down"), S, "must be one of asc, desc"),
    (lambda: gg.top_k(X.a84, k=9), S, "k=9 must be 1 to 8"),
    (lambda: gg.top_k(X.a84, k=0), S, "k=0"),
    (lambda: gg.top_k(X.a84, k=2.5), T, "k= takes int"),
    (lambda: gg.argmax(X.h84), T, "a has type f16"),
    (lambda: gg.rope_ext(X.r, X.i3, n_dims=8), S, "pos must be [4, 1, 1, 1]"),
    (lambda: gg.rope_ext(X.r, X.i4, n_dims=3), S, "n_dims=3 must be even"),
    (lambda: gg.rope_ext(X.r, X.i4, n_dims=8, offset=2), S, "do not fit a row of 8"),
    (lambda: gg.rope_ext(X.r, X.i4, n_dims=8, mode="yarn"), S, "one of normal, neox"),
    (lambda: gg.rope_ext(X.r, X.i4, n_dims=8, freq_base=0.0), S, "must be above 1 and 0"),
    (lambda: gg.rope_ext(X.r, X.i4, n_dims=8, ext_factor=1.0), S, "YaRN needs n_ctx_orig"),
    (lambda: gg.rope_ext(X.r, X.i4, X.a4, n_dims=8, freq_scale=0.0), S, "freq_scale=0.0"),
    (lambda: gg.rope_ext(X.k82, gg.input("p7", "i32", ne=(2,)), X.i3, n_dims=8), T, "freq_factors"),
    # linear, moe
    (lambda: gg.mul_mat(X.a84, X.a48), S, "inner dimensions differ: a.ne[0]=8, b.ne[0]=4"),
    (lambda: gg.mul_mat(X.k83, X.k82), S, "a.ne[2]=3 does not divide b.ne[2]=2"),
    (lambda: gg.mul_mat(X.i84, X.a84), T, "a has type i32; expected a float or block type"),
    (lambda: gg.mul_mat(X.a32, X.q), T, "b has type q4_0"),
    (lambda: gg.mul_mat(X.a84, X.a84, dtype="bf16"), S, "must be one of f32, f16"),
    (lambda: gg.mul_mat(X.a84, X.a84, prec="f64"), S, "must be one of default, f32"),
    (lambda: gg.mul_mat_id(X.e, X.b81, X.i4), S, "[n_used, n_tokens]"),
    (lambda: gg.mul_mat_id(X.e, X.b81, X.ids, prec="tf32"), S, "must be one of default, f32"),
    (lambda: gg.moe_up_gate(X.e, X.e, X.b81, X.ids, prec="f64"), S, "must be one of default, f32"),
    (lambda: gg.fused_up_gate(X.a84, X.a84, X.a84, prec="f64"), S, "must be one of default, f32"),
    (lambda: gg.mul_mat_id(X.e, X.a324, X.ids), S, "experts.ne[0]=8, b.ne[0]=32"),
    (lambda: gg.mul_mat_id(X.e, gg.cont(X.k8), X.ids), S, "b.ne[1]=7 rows per token"),
    (lambda: gg.mul_mat_id(gg.permute(X.e, axes=(1, 0)), X.b81, X.ids), S, "use cont or cast"),
    (lambda: gg.moe_up_gate(X.e, X.e, X.b81, X.ids, act="tanh"), S, "one of silu, gelu, relu"),
    (lambda: gg.moe_up_gate(X.e, X.e, X.b81, X.ids, limit=0), S, "limit=0.0 must be above 0"),
    (lambda: gg.fused_up_gate(X.a84, X.a84, X.a84, limit=-1.0), S, "limit=-1.0 must be above 0"),
    (lambda: gg.glu(X.a84, limit=float("inf")), S, "limit=inf must be above 0 and finite"),
    (lambda: gg.moe_up_gate(X.e, X.k8, X.b81, X.ids), S, "up's size"),
    (lambda: gg.fused_up_gate(X.a48, X.a48, X.a84), S, "[k, n_ff] with b's k"),
    (lambda: gg.grouped_topk(X.a84, n_group=3, n_group_used=1, n_top=1, k=1), S, "n_group=3"),
    (lambda: gg.grouped_topk(X.a84, n_group=2, n_group_used=3, n_top=1, k=1), S, "n_group_used=3"),
    (lambda: gg.grouped_topk(X.a84, n_group=2, n_group_used=1, n_top=5, k=1), S, "n_top=5"),
    (lambda: gg.grouped_topk(X.a84, n_group=2, n_group_used=1, n_top=1, k=5), S, "k=5"),
    (lambda: gg.multi_add(X.h84), T, "a has type f16"),
    (lambda: gg.mul_multi_add(X.r, X.r), S, "b must be [1, 2, 4, 1]"),
    # attention
    (lambda: gg.flash_attn_ext(X.q8, X.k83, X.k82, scale=1), S, "same numbers of keys and heads"),
    (lambda: gg.flash_attn_ext(X.q8, X.k8, X.k8, scale=1), S, "n_head=6 must be a multiple"),
    (lambda: gg.flash_attn_ext(X.q8, X.k82, X.v9, scale=1), S, "same numbers of keys and heads"),
    (lambda: gg.flash_attn_ext(X.a32, X.k82, X.k82, scale=1), S, "the same head size"),
    (lambda: gg.flash_attn_ext(X.q8, X.k82, X.k82, X.m3, scale=1), S, "ne1 >= 5"),
    (lambda: gg.flash_attn_ext(X.q8, X.k82, X.k82, X.m4, scale=1), S, "must divide n_head=6"),
    (lambda: gg.flash_attn_ext(X.q8, X.k82, X.k82, X.mf, scale=1), T, "mask has type f32"),
    (lambda: gg.flash_attn_ext(X.q8, X.k82, X.k82, None, X.a4, scale=1), S, "one for each head"),
    (lambda: gg.flash_attn_ext(X.q8, X.k82, X.k82, kv_len=X.i4, scale=1), S, "one number"),
    (lambda: gg.flash_attn_ext(X.q8, X.k82, X.k82, scale=float("inf")), S, "scale=inf"),
    (lambda: gg.flash_attn_ext(X.q8, X.k82, X.k82, scale=1, logit_softcap=-1.0), S, "not be neg"),
    (lambda: gg.flash_attn_ext(X.q8, X.k82, X.k82, scale=1, max_bias=1.0), S, "needs a mask"),
    (lambda: gg.flash_attn_ext(X.q8, X.k82, X.k82), T, "the attribute scale= is required"),
    (lambda: gg.flash_attn_ext(X.q8, X.k82, gg.transpose(X.k82), scale=1), S, "use cont"),
    (lambda: gg.causal_mask(X.i84, n_kv=4), S, "a vector of positions"),
    (lambda: gg.causal_mask(X.i4, n_kv=0), S, "n_kv=0"),
    (lambda: gg.causal_mask(X.i4, n_kv=4, window=0), S, "window=0"),
    (lambda: gg.causal_mask(X.i4, n_kv=4, stride=0), S, "stride=0 must be at least 1"),
    (lambda: gg.causal_mask(X.i4, n_kv=1 << 24, stride=128), S, "positions fit 32 bits"),
    (lambda: gg.causal_mask(X.i4, n_kv=4, window=3, stride=4), S, "must be 1 with kv_end"),
    (lambda: gg.causal_mask(X.i4, n_kv=4, window=1.5), T, "window= takes int | None"),
    (lambda: gg.merge_lse(X.a84, X.a83), S, "a's size"),
    # leaves
    (lambda: gg.input("x", "f32"), S, "give exactly one of ne= (ggml's order) and shape="),
    (lambda: gg.input("x", "f32", ne=(4,), shape=(4,)), S, "give exactly one"),
    (lambda: gg.input("", "f32", ne=(4,)), T, "a string that is not empty"),
    (lambda: gg.input("x", "f33", ne=(4,)), T, "unknown type 'f33'"),
    (lambda: gg.input("x", "f64", ne=(4,)), T, "graphs have no type f64"),
    (lambda: gg.input("x", "q8_1", ne=(32,)), T, "graphs have no type q8_1"),
    (lambda: gg.input("x", "f32", ne=(4, 0)), S, "input 'x': every size must be at least 1"),
    (lambda: gg.input("x", "f32", shape=(1, 2, 3, 4, 5)), S, "one to four dimensions"),
    (lambda: gg.input("x", "f32", ne="44"), T, "takes whole numbers"),
    (lambda: gg.input("x", "q4_K", ne=(100,)), S, "blocks of 256; use a multiple"),
    (lambda: gg.state(5, "f32", ne=(4,)), T, "state needs a name"),
    (lambda: gg.constant("text"), T, "expected real numbers"),
    (lambda: gg.constant(np.zeros(3, complex)), T, "expected real numbers, got complex128"),
    (lambda: gg.constant(np.ma.masked_array([1.0], [True])), T, "expected real numbers"),
    (lambda: gg.constant([[1], [1, 2]]), T, "cannot convert it to an array"),
    (lambda: gg.constant(np.zeros((2, 0))), S, "every size must be at least 1"),
    (lambda: gg.constant(np.zeros(5, np.uint8)), T, "corresponds to uint8; give dtype="),
    (lambda: gg.constant(np.zeros(33), dtype="q4_0"), S, "does not divide into q4_0 blocks"),
    (lambda: gg.constant(np.zeros(17, np.uint8), dtype="q4_0"), S, "not whole q4_0 blocks of 18"),
    (lambda: gg.constant(np.zeros(256), dtype="iq2_xs"), T, "cannot encode iq2_xs"),
    (lambda: gg.constant([1.5], dtype="i32"), T, "takes whole numbers, not float64"),
    (lambda: gg.constant([1 << 40], dtype="i32"), T, "values do not fit in i32"),
    (lambda: gg.label(X.a84, 5), T, "takes a node and a string"),
    (lambda: gg.label("x", "y"), T, "takes a node and a string"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CALLS)), ids=lambda i: f"{i}-{CALLS[i][2][:40]}")
def test_error(number: int) -> None:
    call, error, text = CALLS[number]
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert text in message
    assert isinstance(caught.value, PyggmlError)
    assert isinstance(caught.value, ValueError if error is S else TypeError)
    line = inspect.getsourcelines(call)[1]
    assert message.count("; at ") == 1 and message.endswith(f"; at {__file__}:{line}")


def test_both_shapes_in_both_orders() -> None:
    with pytest.raises(ShapeError) as caught:
        gg.mul_mat(gg.label(X.a84, "blk.3.attn_q"), X.a48)
    assert (
        "mul_mat(blk.3.attn_q, a48): inner dimensions differ: a.ne[0]=8, b.ne[0]=4 "
        "(ne order: a=f32 [8, 4], b=f32 [4, 8]; numpy shapes: a=(4, 8), b=(8, 4)); at "
    ) in str(caught.value)


BUILDERS = sorted(set(ops.BUILDERS))


@pytest.mark.parametrize("name", BUILDERS)
def test_wrong_calls_of_every_builder(name: str) -> None:
    """No arguments, an array for a tensor, an unknown keyword: the error names the user's line."""
    build = getattr(ops, name)
    first = next(iter(inspect.signature(build).parameters))
    calls = [
        lambda: build(),
        lambda: build(np.zeros(3), no_such_argument=1),
        lambda: build(**{first: X.a84}, no_such_argument=1),
    ]
    if isinstance(build, Op):
        calls += [lambda: build(np.zeros(3)), lambda: build(*[X.a84] * 12, np.zeros(3))]
    for call in calls:
        with pytest.raises(TypeError) as caught:
            call()
        message = str(caught.value)
        line = inspect.getsourcelines(call)[1]
        assert isinstance(caught.value, DTypeError), message
        assert name in message and f"; at {__file__}:" in message
        assert abs(int(message.rpartition(":")[2]) - line) <= 1, message

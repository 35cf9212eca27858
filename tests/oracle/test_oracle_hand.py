"""The float64 oracle against values computed by hand, for what ggml lacks or leaves undefined."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pyggml.parity.oracle import run

INF = math.inf
RNG = np.random.default_rng(7)


def four(values: Any) -> np.ndarray:
    array = np.asarray(values)
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def test_reshape_and_transpose_follow_ne() -> None:
    a = four([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])  # ne = [3, 2]
    assert run("reshape", [a], ne=(2, 3))[0, 0].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert run("transpose", [a])[0, 0].tolist() == [[1, 4], [2, 5], [3, 6]]


def test_permute_sends_source_dimension_i_to_axes_i() -> None:
    a = np.arange(120.0).reshape(2, 3, 4, 5)  # ne = [5, 4, 3, 2]
    out = run("permute", [a], axes=(2, 0, 3, 1))
    assert out.shape[::-1] == (4, 2, 5, 3)  # ne0 5 went to 2, ne1 4 to 0, ne2 3 to 3, ne3 2 to 1
    assert out[2, 4, 1, 3] == a[1, 2, 3, 4]
    assert out[0, 1, 0, 2] == a[0, 0, 2, 1]


def test_view_takes_start_extent_and_step_of_each_dimension() -> None:
    a = np.arange(24.0).reshape(1, 2, 3, 4)
    out = run("view", [a], ne=(2, 2, 1, 1), start=(1, 0, 1, 0), step=(2, 2, 1, 1))
    assert out.tolist() == [[[[13, 15], [21, 23]]]]


def test_fill_and_soft_max() -> None:
    a = four([[0.0, math.log(3.0)], [-INF, -INF]])
    assert run("fill", [a], value=2.5).tolist() == [[[[2.5, 2.5], [2.5, 2.5]]]]
    np.testing.assert_allclose(run("soft_max", [a])[0, 0], [[0.25, 0.75], [0, 0]], rtol=1e-15)


def test_gelu_is_the_tanh_form() -> None:
    # ggml's table has errors of 1e-7; gelu(1) by erf would be 0.841344746...
    want = [0.8411919906082768, -0.04540230591222494, 2.996362607918227]
    np.testing.assert_allclose(run("gelu", [four([1.0, -2.0, 3.0])]).ravel(), want, rtol=1e-12)


def test_a_fully_masked_row_is_zero_and_huge_scores_do_not_overflow() -> None:
    mask = four([[0.0, -INF], [-INF, -INF]])
    out = run("soft_max_ext", [four([[1e5, 3.0], [1.0, 2.0]]), mask], scale=1.0)
    assert out[0, 0].tolist() == [[1, 0], [0, 0]]


def test_causal_mask_and_window() -> None:
    pos = four([2, 0])
    o, x = 0.0, -INF
    assert run("causal_mask", [pos], n_kv=4)[0, 0].tolist() == [[o, o, o, x], [o, x, x, x]]
    windowed = run("causal_mask", [pos], n_kv=4, window=2)[0, 0]
    assert windowed.tolist() == [[x, o, o, x], [o, x, x, x]]


def test_order_of_equals_is_that_of_their_indices() -> None:
    a = four([2.0, 5.0, 2.0, 5.0])
    assert run("argsort", [a], order="asc").ravel().tolist() == [0, 2, 1, 3]
    assert run("argsort", [a], order="desc").ravel().tolist() == [1, 3, 0, 2]
    assert run("top_k", [a], k=3).ravel().tolist() == [1, 3, 0]
    many = RNG.integers(0, 3, 99)
    for order, sign in (("asc", 1), ("desc", -1)):
        want = sorted(range(99), key=lambda i: sign * many[i])
        assert run("argsort", [four(many * 1.0)], order=order).ravel().tolist() == want
    assert run("argmax", [a]).ravel().tolist() == [1]


def test_grouped_topk_by_maximum_and_by_the_two_best() -> None:
    a = four([[9.0, 0.0, 1.0, 5.0, 6.0, 2.0, 7.0, 1.5]])  # four groups of two
    by_max = run("grouped_topk", [a], n_group=4, n_group_used=2, n_top=1, k=3)
    assert by_max.ravel().tolist() == [0, 6, 7]  # maxima 9 5 6 7
    by_two = run("grouped_topk", [a], n_group=4, n_group_used=2, n_top=2, k=3)
    assert by_two.ravel().tolist() == [0, 6, 7]  # sums 9 6 8 8.5
    one = run(
        "grouped_topk", [four([[9.0, 0.0, 6.0, 5.0]])], n_group=2, n_group_used=1, n_top=2, k=2
    )
    assert one.ravel().tolist() == [2, 3]  # 11 beats 9


def test_negative_ids_give_zeros_and_ids_past_the_end_raise() -> None:
    a, ids = four([[1.0, 2.0], [3.0, 4.0]]), four([1, -1])
    assert run("get_rows", [a, ids])[0, 0].tolist() == [[3, 4], [0, 0]]
    assert run("set_rows", [a, four([[7.0, 8.0], [9.0, 9.0]]), ids])[0, 0].tolist() == [
        [1, 2],
        [7, 8],
    ]
    experts, b = np.ones((1, 2, 3, 2)), four([[[1.0, 2.0]]])
    assert run("mul_mat_id", [experts, b, four([[1, -1]])])[0, 0].tolist() == [[3, 3, 3], [0, 0, 0]]
    assert run(
        "add_id", [four([[[1.0], [1.0]]]), four([[5.0]]), four([[0, -3]])]
    ).ravel().tolist() == [6, 1]
    for op, sources in (("get_rows", [a]), ("mul_mat_id", [experts, b])):
        with pytest.raises(IndexError):
            run(op, [*sources, four([[2]])])


def test_cast_rounds_to_nearest_even() -> None:
    ulp = 2.0**-7  # of bf16 at 1; its largest value is (2 - ulp) * 2^127
    a = [
        1 + ulp / 2,
        1 + 3 * ulp / 2,
        -1 - 0.51 * ulp,
        3.39e38,
        3.4e38,
        INF,
        1.5 * 2.0**-133,
        2.0**-135,
    ]
    want = [1, 1 + 2 * ulp, -1 - ulp, (2 - ulp) * 2.0**127, INF, INF, 2.0**-132, 0]
    assert run("cast", [four(a)], dtype="bf16").ravel().tolist() == want
    halves = run("cast", [four([1 + 2.0**-11, 65519.0, 65520.0])], dtype="f16")
    assert halves.ravel().tolist() == [1, 65504, INF]
    assert run("cast", [four([1.7, -1.7])], dtype="i32").ravel().tolist() == [1, -1]


@pytest.mark.parametrize(
    ("mode", "want"), [("normal", [9, 0, 1, 0, 2, 8]), ("neox", [9, -2, 0, 1, 0, 8])]
)
def test_rope_counts_its_pairs_from_the_offset(mode: str, want: list[float]) -> None:
    a = four([[[9.0, 1.0, 0.0, 2.0, 0.0, 8.0]]])  # d = 6, one head, one token
    quarter_turn = {"freq_base": 1.0, "freq_scale": math.pi / 2}  # (x, y) -> (-y, x), every pair
    got = run("rope_ext", [a, four([1])], n_dims=4, offset=1, mode=mode, **quarter_turn)
    np.testing.assert_allclose(got.ravel(), want, atol=1e-15)


def attention(n_q: int = 3, n_kv: int = 8, heads: int = 4, d: int = 6) -> list[np.ndarray]:
    shapes = ((heads, n_q, d), (heads // 2, n_kv, d), (heads // 2, n_kv, d - 1))
    return [four(RNG.standard_normal(shape)) for shape in shapes]


def naive(q: np.ndarray, k: np.ndarray, v: np.ndarray, live: np.ndarray) -> np.ndarray:
    """[n_q, H, Dv + 1] with log-sum-exp, without any shift by the maximum."""
    out = []
    for h in range(q.shape[1]):
        weights = np.exp(0.5 * q[0, h] @ k[0, h // 2].T) * live
        total = weights.sum(1, keepdims=True)
        out.append(np.concatenate([weights @ v[0, h // 2] / total, np.log(total)], axis=1))
    return np.stack(out, axis=1)


def test_kv_len_hides_the_end_and_counts_from_kv0() -> None:
    q, k, v = attention()
    for kv0, n_live in ((0, 5), (2, 3)):
        got = run("flash_attn_ext", [q, k, v, None, None, four([5])], scale=0.5, kv0=kv0, lse=True)
        want = naive(q, k, v, np.arange(8) < n_live)
        np.testing.assert_allclose(got[0], want, rtol=1e-13)


def test_masked_cells_may_hold_anything() -> None:
    q, k, v = attention()
    mask = four(np.where(np.arange(8) < np.array([[3], [6], [1]]), 0.0, -INF))
    want = run("flash_attn_ext", [q, k, v, mask], scale=0.5)
    k[..., 6:, :], v[..., 6:, :] = np.nan, INF
    np.testing.assert_array_equal(run("flash_attn_ext", [q, k, v, mask], scale=0.5), want)
    assert np.isfinite(want).all()


def test_log_sum_exp_of_dead_rows_and_sinks() -> None:
    q, k, v = attention(n_q=1)
    dead = np.full((1, 1, 1, 8), -INF)
    out = run("flash_attn_ext", [q, k, v, dead], scale=0.5, lse=True)
    assert (out[..., :-1] == 0).all() and (out[..., -1] == -INF).all()
    sinks = four([0.5, 1.5, -1.0, 30.0])
    out = run("flash_attn_ext", [q, k, v, dead, sinks], scale=0.5, lse=True)
    assert (out[..., :-1] == 0).all() and out[..., -1].ravel().tolist() == sinks.ravel().tolist()
    alive = naive(q, k, v, np.ones(8))
    out = run("flash_attn_ext", [q, k, v, None, sinks], scale=0.5, lse=True)[0]
    total = np.exp(alive[..., -1]) + np.exp(sinks.ravel())
    np.testing.assert_allclose(out[..., -1], np.log(total), rtol=1e-13)
    share = np.exp(alive[..., -1]) / total
    np.testing.assert_allclose(out[..., :-1], alive[..., :-1] * share[..., None], rtol=1e-13)


def test_merging_key_blocks_gives_the_whole() -> None:
    q, k, v = attention()
    mask = four(np.where(RNG.random((3, 8)) < 0.4, -INF, 0.0))
    mask[..., 0, :3] = -INF  # the first row has no key in the first block
    mask[..., 1, :] = -INF  # the second has none at all
    whole = run("flash_attn_ext", [q, k, v, mask], scale=0.5, lse=True)
    cut = [slice(0, 3), slice(3, 8)]
    parts = [
        run("flash_attn_ext", [q, k[..., s, :], v[..., s, :], mask[..., s]], scale=0.5, lse=True)
        for s in cut
    ]
    np.testing.assert_allclose(run("merge_lse", parts), whole, rtol=1e-12)
    assert (whole[0, 1, :, -1] == -INF).all()


@pytest.mark.parametrize("op", ["flash_attn_ext", "soft_max_ext"])
def test_a_part_of_the_heads_keeps_its_slopes(op: str) -> None:
    q, k, v = attention(heads=6)
    mask = four(RNG.standard_normal((3, 8)))
    at = {"scale": 0.5, "max_bias": 8.0}
    part = {**at, "head0": 2, "n_head": 6}
    if op == "flash_attn_ext":
        whole = run(op, [q, k, v, mask], **at)[:, :, 2:4]
        got = run(op, [q[:, 2:4], k[:, 1:2], v[:, 1:2], mask], **part)
    else:
        scores = four(RNG.standard_normal((6, 3, 8)))
        whole, got = run(op, [scores, mask], **at)[:, 2:4], run(op, [scores[:, 2:4], mask], **part)
    np.testing.assert_array_equal(got, whole)


def test_an_indexer_sums_relus_of_heads() -> None:
    q = four([[[1.0, 0.0], [-1.0, 0.0]]])  # one token, two heads
    k = four([[3.0, 9.0], [-2.0, 9.0], [np.nan, 9.0]])
    weights, mask = four([[10.0, -100.0]]), four([[0.5, -INF, -INF]])
    out = run("lightning_indexer", [q, k, weights])[0, 0, 0]
    np.testing.assert_array_equal(out, [30.0, -200.0, np.nan])
    hidden = run("lightning_indexer", [q, k, weights, mask])[0, 0, 0]
    np.testing.assert_array_equal(hidden, [30.5, -INF, -INF])
    short = run("lightning_indexer", [q, k, weights, None, four(2)])[0, 0, 0]
    np.testing.assert_array_equal(short, [30.0, -200.0, -INF])


def test_a_mask_hides_nan() -> None:
    out = run("add_mask", [four([1.0, np.nan, np.nan]), four([2.0, -INF, 0.0])])[0, 0, 0]
    np.testing.assert_array_equal(out, [3.0, -INF, np.nan])


def test_a_constant_row_of_norm_is_0() -> None:
    out = run("norm", [four([[0.1, 0.1, 0.1], [1.0, 2.0, 3.0]])], eps=0.0)
    want = [[0, 0, 0], [-math.sqrt(1.5), 0, math.sqrt(1.5)]]
    np.testing.assert_allclose(out[0, 0], want, rtol=1e-15)


def test_softplus_at_both_ends() -> None:
    out = run("softplus", [four([-100.0, 0.0, 100.0, -INF, INF])]).ravel()
    want = [math.exp(-100.0), math.log(2.0), 100.0, 0.0, INF]
    np.testing.assert_allclose(out, want, rtol=1e-15)


def test_a_limit_is_one_sided_for_the_gate() -> None:
    gate, up = four([5.0, -5.0, 1.0]), four([1.0, 9.0, -9.0])
    out = run("glu", [gate, up], act="relu", limit=2.0).ravel()
    assert out.tolist() == [2, 0, -2]
    silu = run("glu", [gate, up], act="silu", limit=2.0).ravel()
    np.testing.assert_allclose(silu[1], 2 * -5.0 / (1 + math.exp(5.0)), rtol=1e-15)


def test_hyper_connections_of_two_streams() -> None:
    """hc = 2: mixes have 2 numbers of pre, 2 of post, then C[0, 0], C[1, 0], C[0, 1], C[1, 1]."""
    three = math.log(3.0)
    mixes = four([9.0, 9.0, 9.0, 9.0, three, 0.0, 0.0, 0.0])
    scale, base = four([7.0, 7.0, 1.0]), four(np.zeros(8))
    # The softmax over targets gives columns (3/4, 1/4) and (1/2, 1/2); then rows are divided.
    first = run("dsv4_hc_comb", [mixes, scale, base], eps=0.0, n_iter=1)[0, 0]  # [source, target]
    np.testing.assert_allclose(first, [[3 / 5, 1 / 3], [2 / 5, 2 / 3]], rtol=1e-14)
    many = run("dsv4_hc_comb", [mixes, scale, base], eps=0.0, n_iter=50)[0, 0]
    np.testing.assert_allclose([many.sum(axis=0), many.sum(axis=1)], np.ones((2, 2)), rtol=1e-12)
    maps = run("dsv4_hc_maps", [four([0.0, three, three, 0.0, *[0.0] * 4]), four([1.0, -1.0, 1.0]),
               base], eps=0.25, n_iter=1)  # fmt: skip
    np.testing.assert_allclose(maps[0, 0, :2], [[0.75, 1.0], [0.5, 1.0]], rtol=1e-14)
    comb = four([[[1.0, 2.0], [3.0, 4.0]]])  # source 0 goes to (0, 1) by (1, 2), source 1 by (3, 4)
    x, streams, post = four([[10.0]]), four([[[1.0], [100.0]]]), four([[0.5, 2.0]])
    assert run("dsv4_hc_pre", [streams, post]).ravel().tolist() == [200.5]
    assert run("dsv4_hc_post", [x, streams, post, comb]).ravel().tolist() == [306, 422]
    assert run("dsv4_hc_post", [x, streams, post]).ravel().tolist() == [6, 120]


def test_collectives_sum_join_cut_and_copy() -> None:
    a, b = four([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), four([[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]])
    assert run("all_reduce", [a, b], rank=1)[0, 0].tolist() == [[11, 22, 33], [44, 55, 66]]
    pieces = [run("reduce_scatter", [a, b], dim=0, sizes=(2, 1), rank=r)[0, 0] for r in (0, 1)]
    assert [piece.tolist() for piece in pieces] == [[[11, 22], [44, 55]], [[33], [66]]]
    gathered = run("all_gather", [a, b[..., :1, :]], dim=1)[0, 0]
    assert gathered.tolist() == [[1, 2, 3], [4, 5, 6], [10, 20, 30]]
    assert run("broadcast", [a], rank=1)[0, 0].tolist() == a[0, 0].tolist()


def test_all_reduce_merges_attentions_by_their_log_sum_exp() -> None:
    """Weights e^0 and e^ln 3 of the values 1 and 5; a part without keys adds nothing."""
    parts = [four([[1.0, 0.0]]), four([[5.0, math.log(3.0)]]), four([[0.0, -INF]])]
    np.testing.assert_allclose(run("all_reduce", parts, op="lse").ravel(), [4.0], rtol=1e-15)

"""Attention to a list of keys for each query."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from pyggml.node import Node
from pyggml.operation import cost_of, slice_of

PLACES = sorted({"numpy", backends.on_host()})
D, KEYS, HEADS, QUERIES = 64, 300, 4, 5
RNG = np.random.default_rng(0)
Q = RNG.standard_normal((HEADS, QUERIES, D)).astype(np.float32)
K = RNG.standard_normal((KEYS, D)).astype(np.float16)
MASK = np.where(np.arange(KEYS) <= np.arange(QUERIES)[:, None] + 250, 0, -np.inf)


def listed(ids: Any, dtype: str = "f16", mask: bool = True, n_ids: int = 0, **attrs: Any) -> Node:
    k = gg.input("k", dtype, ne=(D, KEYS))
    return gg.flash_attn_ext(
        gg.input("q", ne=(D, QUERIES, HEADS)),
        k,
        gg.view(k, ne=(32, KEYS)),
        gg.input("mask", "f16", ne=(KEYS, QUERIES)) if mask else None,
        None,
        None,
        None if ids is None else gg.input("ids", "i32", ne=(n_ids or np.shape(ids)[1], QUERIES)),
        scale=0.2,
        **attrs,
    )


def run(place: str, node: Node, ids: Any, k: Any = K, mask: Any = MASK) -> np.ndarray:
    values = {"q": Q, "k": k, "mask": mask, "ids": ids}
    used = {leaf.attrs["name"] for leaf in gg.Graph({"y": node}).nodes if leaf.op.leaf}
    plan = gg.compile({"y": node}, backends=[place])
    return np.asarray(plan.run(**{key: values[key] for key in used})["y"])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_a_list_of_all_keys_is_dense_attention(place: str, dtype: str) -> None:
    """In any order, and padded with -1 past the number of keys."""
    ids = np.array([RNG.permutation(KEYS) for _ in range(QUERIES)])
    padded = np.concatenate([np.full((QUERIES, 100), -1), ids, np.full((QUERIES, 7), -1)], axis=1)
    dense = run(place, listed(None, dtype, lse=True), None)
    for lists in (ids, padded):
        sparse = run(place, listed(lists, dtype, lse=True), lists)
        np.testing.assert_allclose(sparse, dense, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("place", PLACES)
def test_a_list_is_a_mask_of_the_others(place: str) -> None:
    ids = np.array([RNG.choice(KEYS, 40, replace=False) for _ in range(QUERIES)])
    mask = np.full((QUERIES, KEYS), -np.inf)
    np.put_along_axis(mask, ids, np.take_along_axis(MASK, ids, 1), 1)
    dense = run(place, listed(None), None, mask=mask)
    np.testing.assert_allclose(run(place, listed(ids), ids), dense, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("place", PLACES)
def test_rows_outside_the_lists_are_not_read(place: str) -> None:
    """Not even if they hold NaN, nor listed rows that the mask hides."""
    ids = np.array([RNG.choice(np.arange(0, 200, 2), 40, replace=False) for _ in range(QUERIES)])
    ids[:, 7] = 299  # hidden by the mask
    spoiled = K.copy()
    spoiled[1::2], spoiled[200:] = np.nan, np.inf
    clean = run(place, listed(ids), ids)
    np.testing.assert_array_equal(run(place, listed(ids), ids, k=spoiled), clean)


@pytest.mark.parametrize("place", PLACES)
def test_a_query_without_keys(place: str) -> None:
    ids = np.full((QUERIES, 3), -1)
    ids[0, 1] = 5
    y = run(place, listed(ids, mask=False, lse=True), ids)
    assert np.isfinite(y[0]).all()
    assert (y[1:, :, :-1] == 0).all() and np.isneginf(y[1:, :, -1]).all()


@pytest.mark.parametrize("place", PLACES)
def test_chosen_rows_join_a_window(place: str) -> None:
    """merge_lse of two lists is one attention to both."""
    ids = np.array([RNG.choice(250, 60, replace=False) for _ in range(QUERIES)])
    halves = ids[:, :17], ids[:, 17:]
    parts = [run(place, listed(half, lse=True), half) for half in halves]
    shape = parts[0].shape[::-1]
    merged = gg.merge_lse(gg.input("a", ne=shape), gg.input("b", ne=shape))
    joined = gg.compile({"y": merged}, backends=[place]).run(a=parts[0], b=parts[1])["y"]
    whole = run(place, listed(ids, lse=True), ids)
    np.testing.assert_allclose(np.asarray(joined), whole, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("place", PLACES)
def test_an_id_past_the_end(place: str) -> None:
    ids = np.zeros((QUERIES, 3), int)
    ids[2, 1] = KEYS
    with pytest.raises(gg.IdError, match="300"):
        run(place, listed(ids), ids)


def test_lists_must_fit() -> None:
    with pytest.raises(gg.ShapeError, match="a list of keys for each query"):
        gg.flash_attn_ext(
            gg.input("q", ne=(D, QUERIES, HEADS)), *(gg.input(x, ne=(D, 9)) for x in "kv"),
            ids=gg.input("ids", "i32", ne=(3, QUERIES, 2)), scale=1.0,
        )  # fmt: skip


def test_a_list_costs_its_rows() -> None:
    """A node with ids is another node than one without, and every slice keeps its ids."""
    few, dense = listed(None, n_ids=0), listed([[0] * 40])
    assert few is not dense and few.op is dense.op
    assert cost_of(dense).flops == cost_of(few).flops * 40 / KEYS
    assert cost_of(dense).nbytes < cost_of(few).nbytes
    node = listed([[0] * 40], lse=True)
    for axis, cut in (("kv", 0), (1, None), (2, 1), (3, 3)):
        rule = slice_of(node, axis, 1)
        assert rule is not None and len(rule.cuts) == len(node.src)
        of_ids = rule.cuts[node.op.index("ids")]
        assert (None if of_ids is None else of_ids.axis) == cut
        assert axis != "kv" or (rule.cuts[1] is None and not rule.shift)


def test_only_attention_to_a_list_has_a_meaning() -> None:
    assert not gg.flash_attn_ext.composes(listed(None))
    assert gg.flash_attn_ext.composes(listed([[0]]))


def test_scratch_holds_no_copy_of_the_rows() -> None:
    """For long lists and many queries it is that of one block of keys."""
    for place in PLACES:
        sizes = []
        for n_ids, n_q in ((512, 20), (2048, 200)):
            k = gg.input("k", "f16", ne=(576, 65536))
            y = gg.flash_attn_ext(
                gg.input("q", ne=(576, n_q, 16)), k, gg.view(k, ne=(512, 65536)),
                ids=gg.input("ids", "i32", ne=(n_ids, n_q)), scale=0.1,
            )  # fmt: skip
            memory = gg.compile({"y": y}, backends=[place]).memory
            sizes.append(memory.compute - 2 * 4 * 512 * 16 * n_q * (place == "cpu"))
        assert sizes[1] < 2 * sizes[0] + (8 << 20), (place, sizes)

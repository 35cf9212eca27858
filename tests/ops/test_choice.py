"""The choice of rows: exact top_k over long rows, and the indexer's scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from pyggml.operation import cost_of, slice_of

PLACES = sorted({"numpy", backends.on_host()})


def run(place: str, node: gg.Node, **inputs: Any) -> np.ndarray:
    return np.asarray(gg.compile({"y": node}, backends=[place]).run(**inputs)["y"])


@pytest.mark.parametrize("place", PLACES)
def test_a_choice_of_long_rows_is_exact(place: str) -> None:
    """2,048 of 163,840, as by a stable sort: with ties at the border, NaN and infinities."""
    n, k = 163840, 2048
    rng = np.random.default_rng(0)
    rows = np.zeros((3, n), np.float32)
    rows[0] = rng.standard_normal(n)
    rows[1] = np.maximum(rng.standard_normal(n) - 2.5, 0)  # about 1,000 above 0, then ties
    rows[2] = -np.inf
    rows[2, rng.choice(n, 500, replace=False)] = rng.choice([1.5, -0.0, 0.0, np.nan, np.inf], 500)
    ids = run(place, gg.top_k(gg.input("a", ne=(n, 3)), k=k), a=rows)
    for row, chosen in zip(rows, ids):
        order = np.lexsort((-row, ~np.isnan(row)))
        assert np.array_equal(chosen, order[:k])


@pytest.mark.parametrize("place", PLACES)
def test_threads_change_no_choice(place: str) -> None:
    """A row alone is shared by threads; among others it is the work of one."""
    rows = np.random.default_rng(1).integers(0, 300, (9, 50000)).astype(np.float32)
    together = run(place, gg.top_k(gg.input("a", ne=(50000, 9)), k=3000), a=rows)
    for row, ids in zip(rows, together):
        alone = run(place, gg.top_k(gg.input("a", ne=(50000,)), k=3000), a=row)
        assert np.array_equal(alone, ids)


def indexer(mask: bool = True, kv_len: bool = False, dtype: str = "f16") -> gg.Node:
    return gg.lightning_indexer(
        gg.input("q", ne=(32, 3, 2)),
        gg.input("k", dtype, ne=(32, 5)),
        gg.input("w", ne=(3, 2)),
        gg.input("mask", "f16", ne=(5, 2)) if mask else None,
        gg.input("n", "i32", ne=(1,)) if kv_len else None,
    )


@pytest.mark.parametrize("place", [*PLACES, "meaning"])
def test_rows_never_written_do_not_leak(place: str) -> None:
    """NaN and infinity in hidden rows give -inf, and the choice never sees them."""
    k = np.ones((5, 32), np.float16)
    k[3], k[4] = np.nan, np.inf
    mask = np.zeros((2, 5), np.float16)
    mask[:, 3:] = -np.inf
    inputs = {"q": np.ones((2, 3, 32)), "k": k, "w": np.array([[1, -2, 3.0]] * 2)}
    for node, hidden in (
        (indexer(), {"mask": mask}),
        (indexer(mask=False, kv_len=True), {"n": [3]}),
    ):
        if place == "meaning":
            meaning = node.op.meaning
            assert meaning is not None
            node = meaning(*node.src)
        scores = run("numpy" if place == "meaning" else place, node, **inputs, **hidden)
        assert np.array_equal(scores, [[64, 64, 64, -np.inf, -np.inf]] * 2)
    visible = indexer(mask=False)
    assert np.isnan(run("numpy", visible, **inputs)[:, 3]).all()


@pytest.mark.parametrize("place", PLACES)
def test_a_sum_of_relus_not_a_relu_of_sums(place: str) -> None:
    q = np.zeros((2, 3, 32), np.float32)
    q[:, :, 0] = [[1, -1, 2], [-1, -1, 1]]
    k = np.zeros((5, 32), np.float16)
    k[:, 0] = [1, -1, 0, 2, -2]
    w = np.array([[1, 10, -100], [1, 10, 100.0]])
    y = run(place, indexer(mask=False), q=q, k=k, w=w)
    assert np.array_equal(y, [[-199, 10, 0, -398, 20], [100, 11, 0, 200, 22]])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k": ("f16", (32, 5, 2))}, "k must be"),
        ({"k": ("f16", (16, 5))}, "k must be"),
        ({"k": ("i32", (32, 5))}, "float or block type"),
        ({"w": ("f32", (2, 3))}, "weights must be"),
        ({"w": ("f16", (3, 2))}, "weights has type f16"),
        ({"q": ("f16", (32, 3, 2))}, "q has type f16"),
        ({"mask": ("f32", (5, 2))}, "mask has type f32"),
        ({"mask": ("f16", (5, 1))}, "ne1 >= 2"),
        ({"mask": ("f16", (5, 2, 3))}, "heads are summed"),
        ({"n": ("i32", (2,))}, "kv_len must be"),
    ],
)
def test_wrong_operands(change: dict[str, tuple[str, tuple[int, ...]]], match: str) -> None:
    operands = {
        "q": ("f32", (32, 3, 2)),
        "k": ("f16", (32, 5)),
        "w": ("f32", (3, 2)),
        "mask": ("f16", (5, 2)),
        "n": ("i32", (1,)),
    }
    nodes = [gg.input(name, type_, ne=ne) for name, (type_, ne) in (operands | change).items()]
    with pytest.raises((gg.ShapeError, gg.DTypeError), match=match):
        gg.lightning_indexer(*nodes)


def test_what_the_indexer_costs() -> None:
    node = indexer()
    assert cost_of(node).flops == 2 * 5 * 2 * 3 * 33
    assert slice_of(node, 0, 2) is not None and slice_of(indexer(kv_len=True), 0, 2) is None


def test_the_indexer_keeps_no_products_of_all_heads() -> None:
    """Scratch does not grow with the rows, and is far below a tensor of all heads."""
    for place in PLACES:
        plans = [
            gg.compile(
                {
                    "y": gg.lightning_indexer(
                        gg.input("q", ne=(128, 64, 16)),
                        gg.input("k", "f16", ne=(128, n_kv)),
                        gg.input("w", ne=(64, 16)),
                    )
                },
                backends=[place],
            )
            for n_kv in (16384, 65536)
        ]
        scratch = [plan.memory.compute - 4 * 16 * n for plan, n in zip(plans, (16384, 65536))]
        assert scratch[0] == scratch[1] < 8 << 20, place

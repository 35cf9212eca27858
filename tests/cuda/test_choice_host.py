"""The step that scores rows and chooses the largest, run on the host: the ids of a stable sort, in
some order that is the same in every run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import pyggml as gg
from pyggml.backends.cuda import indexer_choice
from pyggml.backends.cuda.gpu import H200, Device
from pyggml.backends.cuda.launch import Call, Launch, Operand
from pyggml.backends.cuda.table import ALIGNMENT
from pyggml.parity import oracle, tolerance
from pyggml.quants import encode
from tests.cuda.emulated import Memory, starter
from tests.cuda.test_top_k_host import KINDS, data

D, HEADS = 128, 32
rng = np.random.default_rng(3)


class Choosing:
    """The launches of one choice of k rows, for a mask that is added to the scores."""

    def __init__(
        self, mask: NDArray[np.float16], k: int, weight: float, dtype: str = "f16",
        device: Device = H200,
    ) -> None:  # fmt: skip
        n = len(mask)
        rows, q = rng.standard_normal((n, D), np.float32), rng.standard_normal((HEADS, D), "f4")
        w = (weight * rng.standard_normal(HEADS)).astype(np.float32)
        stored = rows.astype(np.float16) if dtype == "f16" else encode(dtype, rows)
        nodes = {
            "q": gg.input("q", ne=(D, HEADS, 1)),
            "k": gg.input("k", dtype, ne=(D, n)),
            "weights": gg.input("w", ne=(HEADS, 1)),
            "mask": gg.input("mask", "f16", ne=(n, 1)),
        }
        self.scores = gg.lightning_indexer(*nodes.values())
        node = gg.top_k(self.scores, k=k)
        need = sum(indexer_choice.aligned(x) for x in indexer_choice._sizes(n))
        self.n, self.scratch, self.ids = n, Memory(need + ALIGNMENT), np.full(k, -7, np.int32)
        self.arrays = [q, stored, w, mask]
        operands = {
            name: Operand(x.ctypes.data, nodes[name].ne, nodes[name].nb, nodes[name].dtype)
            for name, x in zip(nodes, self.arrays)
        }
        out = Operand(self.ids.ctypes.data, node.ne, node.nb, node.dtype)
        call = Call(node, out, operands, node.attrs, device, (self.scratch.ptr, need))
        indexer_choice._record(call, self.scores)
        self.launches = [r for r in call.records if isinstance(r, Launch)]

    def run(self, start: Callable[[Launch], None]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """The scores, and ids of the largest."""
        for launch in self.launches:
            start(launch)
        return self.scratch.data[: 4 * self.n].view(np.float32).copy(), self.ids.copy()


def largest(scores: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    return np.sort(np.lexsort((-scores, ~np.isnan(scores)))[:k])


def masks(kind: str, n: int) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        return data(kind, n, rng).astype(np.float16)


def test_the_largest_of_any_scores(tmp_path: Path) -> None:
    """Scores are those of a mask: ties, infinities, NaN, too few, all in one bin, all in one block.
    Counts are zeros again after each run."""
    sizes = ((1000, 513), (777, 1), (1000, 777), (1539, 999))
    cases = [
        (kind, Choosing(masks(kind, n), k, 0.0))
        for kind, (n, k) in zip(KINDS, itertools.cycle(sizes))
    ]
    near = np.full(2003, 1.0, np.float16)  # of one bin, more than are compared with each other
    near[rng.permutation(2003)[:900]] = 1.001
    run = masks("random", 2003)
    run[900:1600] = 50 + np.arange(700) / 16
    cases += [("near", Choosing(near, 800, 0.0)), ("run", Choosing(run, 650, 0.0))]
    start = starter(tmp_path, [launch for _, case in cases for launch in case.launches])
    first = {kind: case.run(start)[1] for kind, case in cases[:2]}
    for kind, case in cases:
        scores, ids = case.run(start)
        np.testing.assert_array_equal(scores, case.arrays[3].astype(np.float32))
        np.testing.assert_array_equal(np.sort(ids), largest(scores, len(ids)), kind)
        np.testing.assert_array_equal(ids, first.get(kind, ids))


def test_threads_with_several_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block has more rows than threads; the parts of some are longer than a warp."""
    monkeypatch.setattr(indexer_choice, "BLOCKS", 3)
    cases = [Choosing(masks(kind, 5001), 2048, 0.0) for kind in ("random", "sorted", "whole")]
    start = starter(tmp_path, [launch for case in cases for launch in case.launches])
    for case in cases:
        scores, ids = case.run(start)
        np.testing.assert_array_equal(np.sort(ids), largest(scores, 2048))


def test_counts_of_a_run_that_was_broken_off(tmp_path: Path) -> None:
    """Ctrl-C between the two launches: the next run does not rely on what the counts hold."""
    near = np.full(1203, 1.0, np.float16)
    cases = [Choosing(mask, 700, 0.0) for mask in (masks("random", 1203), near, -near)]
    few = masks("random", 1000)
    few[:400] = -np.inf
    cases.append(Choosing(few, 700, 0.0))
    start = starter(tmp_path, [launch for case in cases for launch in case.launches])
    for broken, case in zip((cases[1], cases[0], cases[0], cases[2]), cases):
        start(broken.launches[0])
        scores, ids = case.run(start)
        np.testing.assert_array_equal(np.sort(ids), largest(scores, 700))


@pytest.mark.parametrize("dtype", ("f16", "q8_0"))
def test_products_are_scored(dtype: str, tmp_path: Path) -> None:
    """The same scores as without the choice, of blocks that have few tiles or many."""
    mask = masks("random", 1250)
    mask[1200:] = -np.inf
    cases = [Choosing(mask, 700, 1.0, dtype, device) for device in (H200, replace(H200, sms=3))]
    start = starter(tmp_path, [launch for case in cases for launch in case.launches])
    for case in cases:
        scores, ids = case.run(start)
        q, k, w, _ = case.arrays
        rows = k if dtype == "f16" else gg.quants.decode(dtype, k)
        values = [q[None, None], rows[None, None], w[None, None, None], mask[None, None, None]]
        expected = oracle.run("lightning_indexer", [x.astype("f8") for x in values])
        assert tolerance.within(scores.reshape(expected.shape).astype("f8"), expected, 1e-6)
        np.testing.assert_array_equal(np.sort(ids), largest(scores, len(ids)))


N = 13_000


def names(
    n: int = N, n_tokens: int = 1, k: int = 2048, kept: str = "", dtype: str = "f16",
    offset: int = 0,
) -> set[str]:  # fmt: skip
    """The kernels of attention to chosen rows, without their instances."""
    q = gg.input("q", ne=(D + offset, HEADS, n_tokens))
    q = gg.view(q, ne=(D, HEADS, n_tokens), start=(offset,))
    rows, w = gg.input("rows", dtype, ne=(D, n)), gg.input("w", ne=(HEADS, n_tokens))
    scores = gg.lightning_indexer(q, rows, w)
    ids = gg.top_k(scores, k=k)
    cache, heads = gg.input("cache", "f16", ne=(512, n)), gg.input("h", ne=(512, n_tokens, 16))
    y = gg.flash_attn_ext(heads, cache, cache, ids=ids, scale=0.1)
    outputs = {"y": y} | ({kept: {"scores": scores, "ids": ids}[kept]} if kept else {})
    if kept == "ids":
        outputs["ids"] = gg.get_rows(gg.input("table", ne=(4, n)), ids)
    plan = gg.compile(outputs, backends=["cuda:0:24GiB"])
    return {name.partition("<")[0] for kernels in plan.kernels() for name in kernels.names}


def test_only_what_lists_read_is_unsorted() -> None:
    assert {"choice"} == names() & {"choice", "scores", "scores_any", "top_k_cluster", "top_k"}
    for other in (
        names(n=10_000), names(n_tokens=2), names(k=2049), names(kept="ids"),
        names(kept="scores"), names(dtype="f32"), names(n=indexer_choice.LONGEST + 1),
    ):  # fmt: skip
        assert "choice" not in other and any(name.startswith("scores") for name in other)


def test_queries_at_any_address() -> None:
    """Those that are not aligned are scored and sorted by other kernels."""
    assert {"scores_any", "top_k_cluster"} <= names(offset=1)

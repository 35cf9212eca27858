"""Sparse attention in plans for a GPU: in simpler ops for now, all of them on the GPU."""

from __future__ import annotations

import pytest

import pyggml as gg
from pyggml.backends.step import LoopStep

GPU, HOST = "cuda:0:24GiB", "numpy"


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("length", [False, True])
def test_an_indexer_needs_no_host(dtype: str, length: bool) -> None:
    """The choice of 2,048 of 163,840 too."""
    q, w = gg.input("q", ne=(128, 64, 3)), gg.input("w", ne=(64, 3))
    pos, end = gg.input("pos", "i32", ne=(3,)), gg.input("end", "i32", ne=(1,))
    keys = gg.state("keys", dtype, ne=(128, 163840))
    mask = None if length else gg.causal_mask(pos, n_kv=163840)
    scores = gg.lightning_indexer(q, keys, w, mask, end if length else None)
    plan = gg.compile({"ids": gg.top_k(scores, k=2048)}, backends=[GPU, HOST])
    assert {split.backend.place for split in plan.splits} == {"cuda:0"}
    names = [node.op.name for step in plan.steps for node in step.nodes]
    assert "lightning_indexer" not in names and "add_mask" in names and names[-1] == "top_k"


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("heads_kv", [1, 2])
@pytest.mark.parametrize("n_q", [1, 70])
def test_listed_rows_need_no_host(dtype: str, heads_kv: int, n_q: int) -> None:
    """The rows are gathered once where values are part of keys, and a list stays with a mask."""
    q, ids = gg.input("q", ne=(576, n_q, 128)), gg.input("ids", "i32", ne=(2048, n_q))
    k = gg.state("rows", dtype, ne=(576, 65536, heads_kv))
    v = gg.view(k, ne=(512, 65536, heads_kv))
    mask = gg.causal_mask(gg.input("pos", "i32", ne=(n_q,)), n_kv=65536)
    y = gg.flash_attn_ext(q, k, v, mask, None, None, ids, scale=0.1, lse=True)
    plan = gg.compile({"y": y}, backends=[GPU, HOST])
    assert {split.backend.place for split in plan.splits} == {"cuda:0"}
    nodes = [node for step in plan.steps for node in step.nodes]
    (attention,) = (node for node in nodes if node.op is gg.flash_attn_ext)
    assert attention.get("ids") is None and attention["k"].ne == (576, 2048, heads_kv, n_q)
    assert sum(n.op is gg.get_rows and n.ne[0] == 576 for n in nodes) == 1
    assert sum(n.op is gg.get_rows for n in nodes) == 2  # rows, and the mask


def test_the_budget_cuts_gathered_rows() -> None:
    q, ids = gg.input("q", ne=(576, 64, 16)), gg.input("ids", "i32", ne=(512, 64))
    k = gg.state("rows", "f16", ne=(576, 4096))
    y = gg.flash_attn_ext(q, k, gg.view(k, ne=(512, 4096)), None, None, None, ids, scale=0.1)
    whole = gg.compile({"y": y}, backends=[GPU]).memory.score_peak
    assert whole >= 64 * 512 * 576 * (4 + 2)
    cut = gg.compile({"y": y}, backends=[GPU], amb=20)
    assert cut.memory.score_peak <= 20 << 20
    (dims,) = (step.loop.dims for step in cut.steps if isinstance(step, LoopStep))
    assert [dim.total for dim in dims] == [64]

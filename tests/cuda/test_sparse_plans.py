"""Sparse attention in plans for a GPU: nothing of it is on the host."""

from __future__ import annotations

import re

import pytest

import pyggml as gg
from pyggml.backends.cuda.attention import routes
from pyggml.backends.cuda.launch import Launch
from pyggml.backends.cuda.table import KERNELS as TABLE
from pyggml.backends.step import LoopStep
from tests.cuda.test_recording import records_of

GPU, HOST = "cuda:0:24GiB", "numpy"


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("length", [False, True])
def test_an_indexer_needs_no_host(dtype: str, length: bool) -> None:
    """One kernel for the scores and one for the choice of 2,048 of 163,840."""
    q, w = gg.input("q", ne=(128, 64, 3)), gg.input("w", ne=(64, 3))
    pos, end = gg.input("pos", "i32", ne=(3,)), gg.input("end", "i32", ne=(1,))
    keys = gg.state("keys", dtype, ne=(128, 163840))
    mask = None if length else gg.causal_mask(pos, n_kv=163840)
    scores = gg.lightning_indexer(q, keys, w, mask, end if length else None)
    plan = gg.compile({"ids": gg.top_k(scores, k=2048)}, backends=[GPU, HOST])
    assert {split.backend.place for split in plan.splits} == {"cuda:0"}
    names = [node.op.name for step in plan.steps for node in step.nodes]
    assert names[-2:] == ["lightning_indexer", "top_k"]
    products = 64 * scores.spec.nbytes
    assert plan.memory.compute < products / 8


def listed(pair: tuple[int, int], dtype: str, heads_kv: int, n_q: int, m2: int = 1) -> gg.Node:
    """Attention of 128 heads to 2,048 of 65,536 rows; V is a part of K."""
    d_k, d_v = pair
    q, ids = gg.input("q", ne=(d_k, n_q, 128)), gg.input("ids", "i32", ne=(2048, n_q))
    k = gg.state("rows", dtype, ne=(d_k, 65536, heads_kv))
    v = gg.view(k, ne=(d_v, 65536, heads_kv))
    mask = gg.input("mask", "f16", ne=(65536, n_q, m2))
    return gg.flash_attn_ext(q, k, v, mask, None, None, ids, scale=0.1, lse=True)


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("heads_kv", [1, 2])
@pytest.mark.parametrize("n_q", [1, 70])
def test_listed_rows_need_no_host(dtype: str, heads_kv: int, n_q: int) -> None:
    """The rows are gathered once where values are part of keys, and a list stays with a mask."""
    y = listed((192, 128), dtype, heads_kv, n_q)
    plan = gg.compile({"y": y}, backends=[GPU, HOST])
    assert {split.backend.place for split in plan.splits} == {"cuda:0"}
    nodes = [node for step in plan.steps for node in step.nodes]
    (attention,) = (node for node in nodes if node.op is gg.flash_attn_ext)
    assert attention.get("ids") is None and attention["k"].ne == (192, 2048, heads_kv, n_q)
    assert sum(n.op is gg.get_rows and n.ne[0] == 192 for n in nodes) == 1
    assert sum(n.op is gg.get_rows for n in nodes) == 2  # rows, and the mask


@pytest.mark.parametrize("pair", routes.LATENT)
@pytest.mark.parametrize(
    ("dtype", "n_q", "kernel"),
    [
        ("f16", 1, "list_token<5..>"),
        ("bf16", 1, "latent<__nv_bfloat16, 5.., 1, 1, 8, 64, false, true>"),
        ("bf16", 70, "list_hopper<__nv_bfloat16, 5..>"),
        ("q8_0", 1, "latent<__half, 5.., 1, 1, 8, 64, true, true>"),
        ("q8_0", 70, "list_hopper<__half, 5..>"),
        ("f32", 1, "any<576, 16, true>"),
    ],
)
def test_lists_of_latent_rows_have_a_kernel(
    pair: tuple[int, int], dtype: str, n_q: int, kernel: str
) -> None:
    """It gathers no rows. One mask for each head is the only thing that it cannot read."""
    plan = gg.compile({"y": listed(pair, dtype, 1, n_q)}, backends=[GPU, HOST])
    (names,) = (kernels.names for kernels in plan.kernels())
    names = [name for name in names if name not in ("combine<4>", "list_combine", "decode_q8_0")]
    assert len(names) == 1 and re.fullmatch(kernel, names[0])
    y = listed(pair, dtype, 1, n_q, m2=128)
    reason = TABLE.refusal(y)
    assert reason is not None and "one mask for all heads" in reason
    nodes = [n for step in gg.compile({"y": y}, backends=[GPU]).steps for n in step.nodes]
    assert any(n.op is gg.get_rows for n in nodes)


def test_ids_that_only_lists_read_are_in_no_order() -> None:
    n = 12_288
    scores, rows = gg.input("scores", ne=(n,)), gg.input("rows", "f16", ne=(512, n))
    ids = gg.top_k(scores, k=300)
    q = gg.input("q", ne=(512, 1, 64))
    y = gg.flash_attn_ext(q, rows, rows, ids=ids, scale=0.1)
    column = gg.reshape(scores, ne=(1, n))
    again = gg.flash_attn_ext(q, rows, rows, ids=ids, scale=0.2)
    for outputs, name in (
        ({"y": y}, "top_k_list_cluster<2>"),
        ({"y": y, "again": again}, "top_k_list_cluster<2>"),
        ({"y": y, "ids": ids}, "top_k_cluster<4, 2>"),
        ({"y": y, "best": gg.get_rows(column, ids)}, "top_k_cluster<4, 2>"),
    ):
        kernels = gg.compile(outputs, backends=[GPU]).kernels()
        assert [k for each in kernels for k in each.names if k.startswith("top_k")] == [name]


@pytest.mark.parametrize(("n", "packs"), [(260, 1), (2048, 1), (8192, 4)])
def test_a_block_lists_a_short_row(n: int, packs: int) -> None:
    rows, q = gg.input("rows", "f16", ne=(512, n)), gg.input("q", ne=(512, 1, 64))
    y = gg.flash_attn_ext(q, rows, rows, ids=gg.top_k(gg.input("s", ne=(n,)), k=200), scale=0.1)
    (name,) = (
        k
        for each in gg.compile({"y": y}, backends=[GPU]).kernels()
        for k in each.names
        if "top_k" in k
    )
    assert name == f"top_k_list<{packs}>"


def test_a_block_has_one_list() -> None:
    """Its rows are heads of one query, and splits share the list."""
    shapes = ((1, 5, 100, 16), (16, 3, 2048, 16), (40, 2, 65, 16), (128, 1, 2048, 32))
    for heads, n_q, n_ids, rows in (*shapes, (20, 8, 300, 64), (128, 9, 2048, 64)):
        q, ids = gg.input("q", ne=(576, n_q, heads)), gg.input("ids", "i32", ne=(n_ids, n_q))
        k = gg.state("k", "f16", ne=(576, 4096))
        y = gg.flash_attn_ext(q, k, gg.view(k, ne=(512, 4096)), ids=ids, scale=0.1)
        launch = records_of(y)[0]
        assert isinstance(launch, Launch)
        kind = {16: "latent", 32: "list_token", 64: "list_hopper"}[rows]
        assert launch.name.startswith(f"{kind}<")
        blocks = n_q * -(-heads // rows)
        assert launch.grid[1:] == (blocks, 1)
        assert 1 <= launch.grid[0] <= max(1, min(132 // blocks, -(-n_ids // 64)))


def test_the_budget_cuts_gathered_rows() -> None:
    q, ids = gg.input("q", ne=(192, 64, 16)), gg.input("ids", "i32", ne=(1536, 64))
    k = gg.state("rows", "f16", ne=(192, 4096))
    y = gg.flash_attn_ext(q, k, gg.view(k, ne=(128, 4096)), None, None, None, ids, scale=0.1)
    whole = gg.compile({"y": y}, backends=[GPU]).memory.score_peak
    assert whole >= 64 * 1536 * 192 * (4 + 2)
    cut = gg.compile({"y": y}, backends=[GPU], amb=20)
    assert cut.memory.score_peak <= 20 << 20
    (dims,) = (step.loop.dims for step in cut.steps if isinstance(step, LoopStep))
    assert [dim.total for dim in dims] == [64]

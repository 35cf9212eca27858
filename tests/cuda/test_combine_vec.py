"""The kernel that adds up splits of attention and multiplies, run on the host against float64."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pyggml as gg
from benchmarks.gpu_bench import random_blocks
from pyggml import quants
from pyggml.backends.cuda.attention import combine_vec
from pyggml.backends.cuda.attention.arguments import Attention
from pyggml.backends.cuda.gpu import H200, Device
from pyggml.backends.cuda.launch import Call, Launch, Operand
from pyggml.backends.cuda.recording import record_step
from pyggml.backends.cuda.weights.packing import layout_of, repack
from pyggml.dtypes import F32
from pyggml.parity.patterns import pattern
from pyggml.parity.tolerance import nmse
from pyggml.runtime.kernels import planned_memory
from tests.cuda.compared import compare_all
from tests.cuda.emulated import Memory, starter

rng = np.random.default_rng(3)
#: `place_of` in attention_list_token.cu for each column.
_C = np.arange(512)
PLACES = _C & 256 | _C // 16 % 4 * 64 | _C % 8 * 8 | _C // 64 % 4 * 2 | _C // 8 % 2


class Recorded:
    """Sums of `splits` splits for `queries` queries of `heads` heads, some splits without a key and
    the last row with none at all; its weights, its launch and its results. `listed`: the sums are
    those of list_token."""

    def __init__(
        self,
        dtype: str,
        n: int,
        heads: int,
        queries: int,
        splits: int,
        sinks: bool = False,
        listed: bool = False,
    ) -> None:
        self.w = random_blocks(dtype, n * heads, 512, rng).reshape(heads, n, -1)
        w = gg.constant(self.w, dtype=dtype)
        sums, pos = gg.input("q", ne=(576, queries, heads)), gg.input("k", "f16", ne=(576, 64))
        y = gg.flash_attn_ext(sums, pos, gg.view(pos, ne=(512, 64)), scale=1.0)
        product = gg.mul_mat(w, gg.permute(y, axes=(0, 2, 1, 3)))
        layout = layout_of(w, [product])
        assert layout.name == "tiles8"
        self.weights = Memory(layout.nbytes)
        self.weights.data[:] = repack(w, layout, self.w)
        shape = queries, heads, splits
        self.parts = rng.standard_normal((*shape, 512), dtype=np.float32)
        self.stats = np.stack([rng.normal(0, 9, shape), rng.uniform(1, 60, shape)], -1)
        self.stats = self.stats.astype(np.float32)
        empty = rng.random(shape) < 0.2
        empty[-1, -1] = True
        self.stats[empty] = -np.inf, 0
        self.parts[empty] = 0
        stored: NDArray[Any] = self.parts
        if listed:  # halves of means in f16
            stored = self.stored = np.empty(self.parts.shape, np.float16)
            stored[..., PLACES] = self.parts
            self.parts = 2 * self.stats[..., 1:] * stored[..., PLACES].astype(np.float32)
        self.sinks = rng.normal(0, 3, heads).astype(np.float32) if sinks else None
        self.y = np.full((heads, queries, n), np.nan, np.float32)
        self.fixed = np.zeros(heads * queries * n // 32 * 80, np.uint8)
        out = _operand(self.y)
        named = {"w": Operand(self.weights.ptr, w.ne, w.nb, w.dtype, "tiles8")}
        named["fixed"] = Operand(self.fixed.ctypes.data, (1,) * 4, (1,) * 4, F32)
        call = Call(product, out, named, product.attrs, H200)
        argument = Attention.from_buffer(bytearray(ctypes.sizeof(Attention)))
        argument.parts, argument.stats = stored.ctypes.data, self.stats.ctypes.data
        argument.heads, argument.n_q, argument.splits = heads, queries, splits
        argument.d_v, argument.nb_sinks = 512, 4
        argument.sinks = 0 if self.sinks is None else self.sinks.ctypes.data
        combine_vec.launch(call, product, argument, listed)
        (record,) = call.records
        assert isinstance(record, Launch)
        self.launch, self.dtype = record, dtype

    def expected(self) -> NDArray[np.float64]:
        most, many = self.stats.astype(np.float64).transpose(3, 0, 1, 2)
        sink = np.full(most.shape[1], -np.inf) if self.sinks is None else self.sinks / np.log(2)
        top = np.maximum(most.max(-1), sink)
        top = np.where(np.isfinite(top), top, 0)
        weights = np.exp2(most - top[..., None])
        total = ((many * weights).sum(-1) + np.exp2(sink - top))[..., None]
        sums = (self.parts * weights[..., None]).sum(2)
        sums = np.divide(sums, total, out=np.zeros_like(sums), where=total > 0)
        heads, n, _ = self.w.shape
        w = quants.decode_rows(self.dtype, self.w.reshape(heads * n, -1)).reshape(heads, n, 512)
        return np.einsum("hnk,qhk->hqn", w.astype(np.float64), sums)

    def fixed_values(self) -> NDArray[np.float64]:
        groups = self.fixed.reshape(-1, 80)
        high, low = (groups[:, i : i + 32].view(np.int8).astype(np.float64) for i in (0, 32))
        step = groups[:, 64:68].copy().view(np.float32)
        return ((256 * high + low) * step).reshape(self.y.shape)


def _operand(x: NDArray[np.float32]) -> Operand:
    nb = (*x.strides[::-1], x.nbytes)
    return Operand(x.ctypes.data, (*x.shape[::-1], 1), nb, F32)


#: (type, rows of a head, heads, queries, splits, sinks, listed)
CASES: tuple[tuple[Any, ...], ...] = (
    ("iq4_nl", 128, 2, 1, 68), ("q8_0", 128, 1, 2, 132, True), ("q6_K", 96, 3, 1, 2),
    ("q2_K", 32, 2, 2, 33), ("iq3_xxs", 128, 2, 1, 17), ("q5_1", 256, 2, 1, 5),
    ("iq4_nl", 128, 13, 5, 66, True), ("q3_K", 224, 33, 2, 7), ("iq2_xs", 64, 65, 1, 3),
    ("iq4_nl", 128, 65, 1, 33, False, True), ("q8_0", 224, 33, 2, 7, True, True),
)  # fmt: skip


def test_sums_and_products_are_right(tmp_path: Path) -> None:
    recorded = [Recorded(*case) for case in CASES]
    names = {each.launch.name.partition(", ")[2] for each in recorded}
    assert names == {"8, 1>", "8, 2>", "4, 2>", "4, 4>", "4, 2, true>", "4, 4, true>"}
    start = starter(tmp_path, [each.launch for each in recorded])
    for case, each in zip(CASES, recorded):
        start(each.launch)
        expected = each.expected()
        assert nmse(each.y, expected) < 1e-8, case
        assert nmse(each.fixed_values(), expected) < 1e-8, case
        assert (each.y[-1, -1] == 0).all(), case


def test_numbers_that_are_not_finite_stay_in_their_row(tmp_path: Path) -> None:
    """NaN and infinity of one split, and a maximum that is NaN."""
    each = Recorded("iq4_nl", 64, 3, 2, 40)
    each.parts[0, 0, 7, 100], each.parts[1, 1, 9, 300] = np.nan, np.inf
    each.stats[0, 0, 7], each.stats[1, 1, 9], each.stats[0, 2, 11] = (1, 1), (2, 1), (np.nan, 1)
    starter(tmp_path, [each.launch])(each.launch)
    bad = np.zeros((3, 2), bool)
    bad[0, 0] = bad[1, 1] = bad[2, 0] = True
    np.testing.assert_array_equal(np.isnan(each.y).all(-1), bad)
    np.testing.assert_array_equal(np.isnan(each.y).any(-1), bad)


@pytest.mark.parametrize("splits", (1, 144))
def test_the_same_bits_each_time(splits: int, tmp_path: Path) -> None:
    each = Recorded("q4_0", 128, 2, 1, splits)
    start = starter(tmp_path, [each.launch])
    start(each.launch)
    first = each.y.copy()
    start(each.launch)
    np.testing.assert_array_equal(each.y, first)


@pytest.mark.parametrize(
    ("changes", "fused"),
    [
        ({}, True),
        ({"n_kv": 64}, False),  # one split
        ({"max_bias": 8.0}, False),
        ({"lse": True}, False),
        ({"n_tokens": 9}, False),
        ({"n": 288}, False),
        ({"n": 80}, False),
        ({"dtype": "f16"}, False),
    ],
)
def test_what_becomes_one_step(changes: dict[str, Any], fused: bool) -> None:
    case = {"n_kv": 200, "n_tokens": 1, "n": 128, "dtype": "iq4_nl", **changes}
    n_kv, n_tokens, n, dtype = (case.pop(name) for name in ("n_kv", "n_tokens", "n", "dtype"))
    q, k = gg.input("q", ne=(576, n_tokens, 4)), gg.input("k", "f16", ne=(576, n_kv))
    mask = gg.input("mask", "f16", ne=(n_kv, n_tokens))
    y = gg.flash_attn_ext(q, k, gg.view(k, ne=(512, n_kv)), mask, scale=0.04, **case)
    y = gg.permute(gg.view(y, ne=(512, *y.ne[1:])), axes=(0, 2, 1, 3))
    w = gg.constant(np.ones((4, n, 512), "f4"), dtype=dtype)
    plan = gg.compile({"y": gg.mul_mat(w, y)}, backends=["cuda:0:24GiB"])
    ops = [{node.op for node in step.nodes} for step in plan.steps]
    assert any({gg.flash_attn_ext, gg.mul_mat} <= each for each in ops) == fused


A100 = replace(H200, arch="80", shared=166_912)


@pytest.mark.parametrize("device", (A100, H200), ids=("80", "90a"))
def test_gpus_without_clusters_take_the_steps_apart(device: Device) -> None:
    graph = pattern("values_of_heads_in_lists")
    work = gg.compile(graph.outputs, backends=["cuda:0:24GiB"])._work
    at, arenas = planned_memory(work)
    (records,) = (
        record_step(step, at, (arenas["cuda:0"].ptr, step.scratch), device)
        for step in work.steps
        if any(node.op is gg.flash_attn_ext for node in step.nodes)
    )
    kinds = [r.name.partition("<")[0] for r in records if isinstance(r, Launch)]
    apart = ["latent", "combine", "vec", "quantize"]
    assert kinds == (["latent", "combine_vec"] if device is H200 else apart)


def test_steps_apart_are_right(tmp_path: Path) -> None:
    names = "values_of_heads_q8_0", "values_of_heads_in_lists"
    graphs = {name: pattern(name) for name in names}
    cases = {name: (g.outputs, dict(g.inputs)) for name, g in graphs.items()}
    compare_all(cases, tmp_path, 1e-6, A100)

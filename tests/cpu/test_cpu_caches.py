"""Caches: rows written as NumPy writes them, attention over every type, plans without NumPy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pyggml as gg
from pyggml.backends.cpu.rows import READABLE, WRITABLE
from pyggml.backends.cpu.table import CpuStep
from pyggml.backends.step import LoopStep, Step
from pyggml.models.presets import preset
from pyggml.models.synth import synth
from pyggml.ops import lse_finish, lse_sum
from pyggml.parity.tolerance import nmse
from pyggml.quants import decode_rows, encode_rows

Array = NDArray[Any]
K = 96  # three blocks


def native(plan: gg.Plan) -> list[bool]:
    return [isinstance(step, CpuStep) for step in steps_of(plan.steps)]


def steps_of(steps: Iterable[Step]) -> Iterator[Step]:
    """The steps, with those in loops."""
    for step in steps:
        if isinstance(step, LoopStep):
            for body in step.bodies:
                yield from steps_of(body.steps)
        else:
            yield step


# -- writing ------------------------------------------------------------------------------------


def special_rows() -> Array:
    """Rows with everything that an encoder may treat in its own way."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((48, K)).astype(np.float32)
    x[0], x[1], x[2], x[3] = 0, -0.0, 1, -1
    x[4, 5], x[5, 7], x[6, 40], x[7] = np.nan, np.inf, -np.inf, np.nan
    x[8, 9:11], x[9, 4:10] = (np.inf, -np.inf), (np.nan, np.inf, -np.inf, 0, np.nan, 1)
    x[10, 3], x[11, [0, 31]] = -np.nan, np.nan
    x[12], x[13], x[14] = 1e-40 * np.arange(K), 1e-45, 5.9e-39 * x[14]  # scales underflow
    x[15], x[16], x[17] = 3e38, 1e7 * x[17], 1e-6 * x[16]  # and overflow f16
    x[18], x[19, 3], x[20, 3] = 1e-38 * x[18], 65520, 65519
    x[21], x[22] = np.where(np.arange(K) % 2, 2, -2), np.where(np.arange(K) % 2, -2, 2)  # equals
    x[23], x[24] = rng.integers(-3, 4, K), rng.integers(-127, 127, K) + 0.5  # ties of q8_0
    x[24, ::32] = 127
    x[25] = rng.integers(-8, 8, K) + 0.5  # ties of four bits
    x[25, ::32] = -8
    x[26], x[26, ::32] = rng.integers(0, 16, K) + 0.5, 0
    x[26, 31::32] = 15
    x[27], x[28] = np.float32(1 + 2**-8), np.float32(1 + 3 * 2**-8)  # ties of bf16
    x[29], x[30] = np.float32(1 + 2**-11), np.float32(1 + 3 * 2**-11)  # and of f16
    x[31], x[32] = np.abs(x[31]), -np.abs(x[32])
    x[36] = float.fromhex("0x1.fc3f82p+0")  # whose 127th part is not its product with 1/127 as f16
    x[37, 7], x[37, 39] = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    x[33:36] = rng.integers(0, 0x7F800000, (3, K), dtype=np.uint32).view(np.float32)
    return x


@pytest.mark.parametrize("type_", WRITABLE)
def test_rows_are_written_as_numpy_writes_them(type_: str) -> None:
    x, states = special_rows(), {}
    if type_ == "f16":
        x[37] = np.nan  # a signalling NaN becomes quiet here, and not in NumPy
    n = len(x)
    for backend in ("numpy", "cpu"):
        cache = gg.state("cache", type_, ne=(K, n + 1))
        rows, ids = gg.input("rows", "f32", ne=(K, n)), gg.input("ids", "i32", ne=(n,))
        store = gg.Store()
        write = gg.set_rows(cache, rows, ids)
        plan = gg.compile({}, updates=[write], backends=[backend], store=store)
        assert backend == "numpy" or all(native(plan))
        order = np.arange(n, dtype=np.int32)[::-1].copy()
        order[-1] = -1
        with np.errstate(all="ignore"):
            plan.run(rows=x, ids=order)
        states[backend] = store.read("cache", raw=True).reshape(n + 1, -1).view(np.uint8)
    differ = (states["numpy"] != states["cpu"]).any(axis=1)
    assert not differ.any(), np.flatnonzero(differ)
    assert not states["cpu"][[0, n]].any() and states["cpu"][2:n].any()  # nobody wrote these two


@pytest.mark.parametrize("source", READABLE)
@pytest.mark.parametrize("target", WRITABLE)
def test_rows_are_converted_as_numpy_converts_them(source: str, target: str) -> None:
    """Rows longer than a piece of the conversion, and of plain types with a rest."""
    if source == target:
        pytest.skip("no conversion")
    blocks = not {source, target} <= {"f32", "f16", "bf16"}
    k = 544 if blocks else 531
    rows = encode_rows(source, np.random.default_rng(1).standard_normal((3, k)).astype(np.float32))
    results = []
    for backend in ("numpy", "cpu"):
        x, y = gg.state("x", source, ne=(k, 3)), gg.state("y", target, ne=(k, 3))
        store = gg.Store()
        plan = gg.compile({}, updates=[gg.cpy(x, y)], backends=[backend], store=store)
        assert backend == "numpy" or native(plan) == [True]
        plan.bind()
        store.write("x", rows)
        plan.run()
        results.append(store.read("y", raw=True).view(np.uint8))
    assert results[0].any() and np.array_equal(*results)


def test_rows_of_a_cache_are_read_by_id() -> None:
    x = np.random.default_rng(2).standard_normal((7, K)).astype(np.float32)
    for type_ in READABLE:
        cache, ids = gg.state("cache", type_, ne=(K, 7)), gg.input("ids", "i32", ne=(4,))
        store = gg.Store()
        plan = gg.compile({"y": gg.get_rows(cache, ids)}, backends=["cpu"], store=store)
        assert native(plan) == [True]
        rows = encode_rows(type_, x)
        plan.bind()
        store.write("cache", rows)
        got = plan.run(ids=np.array([6, -1, 0, 6], np.int32))["y"]
        want = decode_rows(type_, rows)[[6, 0, 0, 6]]
        want[1] = 0
        assert np.array_equal(got, want)


# -- reading ------------------------------------------------------------------------------------


def attention(k_type: str, v_type: str, backend: str, n_q: int, d_k: int, d_v: int) -> Array:
    """Attention of random queries over caches of 700 keys, 333 of them hidden or not yet written;
    the rows of a mixture of NaN."""
    rng = np.random.default_rng(3)
    n_kv, heads = 700, 2
    store, inputs = gg.Store(), {}
    caches = [gg.state(n, t, ne=(d, n_kv, heads)) for n, t, d in
              (("k", k_type, d_k), ("v", v_type, d_v))]  # fmt: skip
    q = gg.input("q", "f32", ne=(d_k, n_q, 6))
    mask = gg.input("mask", "f16", ne=(n_kv, n_q))
    inputs["q"] = rng.standard_normal((6, n_q, d_k)).astype(np.float32)
    inputs["mask"] = np.where(rng.random((n_q, n_kv)) < 0.3, -np.inf, 0).astype(np.float16)
    inputs["mask"][:, 640:] = -np.inf
    y = gg.flash_attn_ext(q, *caches, mask, scale=d_k**-0.5, lse=True)
    plan = gg.compile({"y": y}, backends=[backend], store=store)
    assert backend == "numpy" or native(plan) == [True]
    plan.bind()
    for name, type_, d in ("k", k_type, d_k), ("v", v_type, d_v):
        values = rng.standard_normal((heads, n_kv, d)).astype(np.float32)
        values[:, 650:] = np.nan
        with np.errstate(invalid="ignore"):
            store.write(name, encode_rows(type_, values))
    result: Array = plan.run(inputs)["y"]
    return result


@pytest.mark.parametrize("n_q", [1, 40])
@pytest.mark.parametrize(
    ("k_type", "v_type"), [(t, t) for t in READABLE] + [("q8_0", "q4_0"), ("f16", "q5_1")]
)
def test_attention_over_caches(k_type: str, v_type: str, n_q: int) -> None:
    """Rows of 1 and of 11 blocks of keys; of values with columns past the last 64."""
    for d_k, d_v in ((32, 352), (160, 96)):
        got, want = (attention(k_type, v_type, b, n_q, d_k, d_v) for b in ("cpu", "numpy"))
        assert np.isfinite(got).all() and nmse(got, want) < 1e-11


def test_values_of_any_length() -> None:
    assert nmse(*(attention("f16", "f16", b, 2, 40, 1100) for b in ("cpu", "numpy"))) < 1e-11


# -- merging ------------------------------------------------------------------------------------


@pytest.mark.parametrize("d_v", [1, 16, 37])
@pytest.mark.parametrize("lse", [False, True])
def test_merging_is_that_of_numpy(d_v: int, lse: bool) -> None:
    """Rows whose weights differ by up to e^60, without keys, and with NaN; the second part and the
    third change the reference of some rows."""
    rng, parts = np.random.default_rng(4), {}
    for i in range(4):
        part = rng.standard_normal((2, 5, 3, d_v + 1)).astype(np.float32)
        part[..., -1] *= 20.0
        part[0, 0, 0] = part[i % 2, 1, 0] = np.array([0.0] * d_v + [-np.inf])
        part[1, 4, :, -1] = [10.0 * i, 40.0 * i, -40.0 * i]
        parts[f"p{i}"] = part
    parts["p1"][0, 2, 1, 0] = parts["p2"][0, 3, 1, -1] = np.nan
    nodes = [gg.input(name, "f32", ne=part.shape[::-1]) for name, part in parts.items()]
    total, merged = lse_sum(nodes[0]), nodes[0]
    for node in nodes[1:]:
        total, merged = lse_sum(node, total), gg.merge_lse(merged, node)
    outputs = {"sum": lse_finish(total, lse=lse), "merged": merged, "total": total}
    plans = [gg.compile(outputs, backends=[b]) for b in ("cpu", "numpy")]
    assert all(native(plans[0])) and len(plans[0].steps) == 8
    with np.errstate(all="ignore"):
        got, want = (plan.run(parts) for plan in plans)
    for name in outputs:
        np.testing.assert_allclose(got[name], want[name], rtol=3e-6, atol=1e-6)
    assert np.isnan(got["merged"]).sum() > 1 and np.isneginf(got["sum"]).any() == lse


# -- plans --------------------------------------------------------------------------------------

ATTENTION = {"flash_attn_ext", "set_rows", "get_rows", "rope_ext", "causal_mask", "mul_mat"}


def others(plan: gg.Plan) -> set[str]:
    """The ops of steps that NumPy runs."""
    return {step.node.op.name for step in steps_of(plan.steps) if not isinstance(step, CpuStep)}


def tiny(name: str, weights: str, folder: Path) -> Path:
    """A file of a tiny model whose cache rows are whole blocks."""
    arch = preset("tiny-llama") if name == "llama" else replace(preset("tiny"), n_rot=32)
    path = folder / f"{weights}.gguf"
    if not path.exists():
        synth(path, arch, dtype=weights)
    return path


@pytest.mark.parametrize("type_", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["llama", "deepseek2"])
def test_a_decode_step_has_only_native_steps_in_attention(
    name: str, type_: str, tmp_path: Path
) -> None:
    with gg.load(tiny(name, "q8_0", tmp_path), backends=["cpu"]) as model:
        session = model.session(n_ctx=64, n_batch=32, cache_k=type_, cache_v=type_)
        plan = session.plan(1, 32, 1)
        assert {step.node.op.name for step in plan.steps} >= ATTENTION
        assert not others(plan)
    logits = []
    for backend in ("cpu", "numpy"):  # with products that round nothing
        with gg.load(tiny(name, "f32", tmp_path), backends=[backend]) as model:
            session = model.session(n_ctx=64, n_batch=32, cache_k=type_, cache_v=type_)
            session.forward([5, 9, 17, 3])
            logits.append(session.forward([11]))
    assert nmse(*logits) < 1e-6


def test_a_budget_merges_natively(tmp_path: Path) -> None:
    """A prompt of MLA expands keys and values from the latent cache, in blocks under a budget."""
    logits = []
    for weights, amb in ("q8_0", 0.4), ("f32", 0.4), ("f32", None):
        path = tiny("deepseek2", weights, tmp_path)
        with gg.load(path, backends=["cpu"], amb=amb) as model:
            session = model.session(n_ctx=512, n_batch=512, cache_k="q8_0")
            plan = session.plan(512, 512, 1)
            ops = {step.node.op.name for step in steps_of(plan.steps)}
            assert ("lse_sum" in ops) is (amb is not None)
            if weights == "q8_0":
                assert others(plan) <= {"mul_mat"}  # of parts of attn_kv_b
            else:
                logits.append(session.forward([i % 89 for i in range(500)]))
    assert nmse(*logits) < 1e-6

"""Plans on a GPU compared with NumPy, and products by cuBLAS."""

from __future__ import annotations

import numpy as np
import pytest

import pyggml as gg
from pyggml.dtypes import dtype
from pyggml.errors import IdError
from tests.gpu.checks import apart, refused, same_as_numpy


def test_a_state_is_written_run_after_run() -> None:
    """A graph that writes a state, launched, captured and replayed."""
    rng = np.random.default_rng(1)
    x, pos = gg.input("x", ne=(64, 4, 3)), gg.input("pos", "i32", ne=(3,))
    cache = gg.state("cache", "f16", ne=(256, 32))
    normed = gg.rms_norm(x, eps=1e-6)
    turned = gg.rope_ext(normed, pos, n_dims=64)
    rows = gg.set_rows(cache, gg.reshape(turned, ne=(256, 3)), pos)
    y = gg.scale(gg.cast(rows, dtype="f32"), s=0.5)
    plans = {b: gg.compile({"y": y}, backends=[b]) for b in ("numpy", "cuda")}
    for turn in range(4):
        inputs = {
            "x": rng.standard_normal((3, 4, 64)).astype(np.float32),
            "pos": np.arange(3 * turn, 3 * turn + 3, dtype=np.int32),
        }
        expected, result = (plans[b].run(inputs)["y"] for b in ("numpy", "cuda"))
        error = apart(result, expected)
        assert error < 1e-3, f"run {turn}: relative error {error}"


@pytest.mark.parametrize("type", ["iq4_nl", "f16"])
def test_a_product_writes_its_result_into_pinned_memory(type: str) -> None:
    """The same bits as a copy from the GPU, also if the caller keeps some of the results."""
    rng = np.random.default_rng(8)
    w = gg.constant(rng.standard_normal((50_003, 512)) / 16, dtype=type, name=f"output_{type}")
    y = gg.mul_mat(w, gg.scale(gg.input("x", ne=(512, 1)), s=2.0))
    plan = gg.compile({"y": y}, backends=["cuda"])
    kept = []
    for turn in range(12):
        x = rng.standard_normal((1, 512)).astype("f4")
        copy, result = plan.submit(x=x).result()["y"].copy(), plan.run(x=x)["y"]
        kept.append((copy, result))
        if turn % 4 == 3:
            del kept[-3:]
        for copy, result in kept:
            np.testing.assert_array_equal(result, copy)
        del copy, result


@pytest.mark.parametrize("tight", [False, True])
def test_loop(tight: bool) -> None:
    """Softmax attention with a budget: a loop over heads and rows, each piece recorded."""
    rng = np.random.default_rng(3)
    q, k, v = (gg.input(n, ne=ne) for n, ne in zip("qkv", ((64, 40, 4), (64, 96, 4), (96, 32, 4))))
    y = gg.mul_mat(v, gg.soft_max_ext(gg.mul_mat(k, q), scale=0.125))
    inputs = {n.attrs["name"]: rng.standard_normal(n.shape).astype("f4") for n in (q, k, v)}
    same_as_numpy({"y": y}, inputs, 2e-3, amb=3 * 2 * 96 * 4 / 2**20 if tight else None)


@pytest.mark.parametrize("n", [37, 640, 8192, 20000])
def test_norm_and_weight_are_one_step(n: int) -> None:
    """If something else reads the norm, the steps differ and the results do not."""
    rng = np.random.default_rng(n)
    x = gg.input("x", ne=(n, 9, 2))
    weight = gg.constant(rng.standard_normal(n).astype("f4"), name=f"w{n}")
    normed = gg.rms_norm(x, eps=1e-6)
    y = gg.mul(normed, weight)
    inputs = {"x": rng.standard_normal((2, 9, n)).astype("f4")}
    for node, steps in ((y, 1), (gg.add(y, normed), 3)):
        assert len(gg.compile({"y": node}, backends=["cuda"]).steps) == steps
        same_as_numpy({"y": node}, inputs, 1e-6)


@pytest.mark.parametrize("type", ["q8_0", "iq4_nl", "q5_1"])
def test_casts_and_reshapes_read_tiles(type: str) -> None:
    """One tensor for heads, for all heads as one matrix, and for a cast, into parts of a concat."""
    rng = np.random.default_rng(6)
    w = gg.constant(rng.standard_normal((4, 16, 256)) / 16, dtype=type, name="w")
    x, z = gg.input("x", ne=(256, 37)), gg.input("z", ne=(256, 5, 4))
    half = gg.cast(w, dtype="f16")
    products = {"y": gg.mul_mat(gg.reshape(w, ne=(256, 64)), x), "z": gg.mul_mat(w, z)}
    casts = {"c": gg.concat(half, half, dim=0), "d": gg.cast(w, dtype="f32")}
    plan = gg.compile({**products, **casts}, backends=["cuda"])
    assert plan._work.layouts[w].name == "tiles8"
    inputs = {n: rng.standard_normal(plan.inputs[n].shape).astype("f4") for n in "xz"}
    same_as_numpy(products, inputs, 1e-2)
    same_as_numpy(casts, {}, 0)
    for turn in range(2):
        result, expected = plan.run(inputs), gg.compile(casts).run()
        for key, values in expected.items():
            assert np.array_equal(result[key], values), f"{key}, run {turn}"


def test_a_derived_constant_is_uploaded_once() -> None:
    """The cast of a weight, computed on the host; two plans of a store share it."""
    rng = np.random.default_rng(7)
    big = gg.constant(rng.standard_normal((1024, 1024)).astype("f4"), name="big")
    w = gg.constant(rng.standard_normal((64, 64)), dtype="q8_0", name="w")
    z, store = gg.input("z", ne=(1024, 1)), gg.Store()
    for n in (1, 40):
        x = gg.input("x", ne=(64, n))
        y = gg.mul_mat(gg.transpose(gg.cast(w, dtype="f16")), x)
        outputs = {"y": y, "b": gg.mul_mat(big, z)}
        inputs = {"x": rng.standard_normal((n, 64)).astype("f4"), "z": np.ones((1, 1024), "f4")}
        plan = gg.compile(outputs, backends=["cuda"], store=store)
        assert not any(step.node.op is gg.cast for step in plan.steps)
        same_as_numpy(outputs, inputs, 2e-3, store=store)
        assert len(store.shared.weights) == 2


@pytest.mark.parametrize("type", ["q8_0", "iq4_nl", "f16"])
def test_packed_weights(type: str) -> None:
    """Products with few and many columns, which are rows of a quantized table."""
    rng = np.random.default_rng(5)
    ids = gg.input("ids", "i32", ne=(21,))
    table = gg.constant(rng.standard_normal((50, 256)), dtype="q4_0", name="table")
    x = gg.get_rows(table, ids)
    weight = gg.constant(rng.standard_normal((96, 256)) / 16, dtype=type, name=f"w_{type}")
    inputs = {"ids": rng.integers(0, 50, 21).astype("i4")}
    for node in (gg.mul_mat(weight, x), gg.mul_mat(weight, gg.view(x, ne=(256, 2)))):
        same_as_numpy({"y": node}, inputs, 1e-2)


@pytest.mark.parametrize("n", [4097, 102400])
def test_rows_that_several_blocks_share(n: int) -> None:
    x = gg.input("x", ne=(n, 3, 2))
    inputs = {"x": np.random.default_rng(6).integers(-n, n, (2, 3, n)).astype("f4")}
    for node in (gg.argmax(x), gg.argsort(x, order="desc"), gg.top_k(x, k=40)):
        same_as_numpy({"y": node}, inputs, 0.0)


def test_ids_past_the_end() -> None:
    """They give a zero row, and an IdError with PYGGML_CUDA_DEBUG=1."""
    x, ids = gg.input("x", ne=(8, 5)), gg.input("ids", "i32", ne=(3,))
    y = {"y": gg.get_rows(x, ids)}
    inputs = {"x": np.ones((5, 8), "f4"), "ids": np.array([4, 5, -1], "i4")}
    assert gg.compile(y, backends=["cuda"]).run(inputs)["y"].sum(axis=1).tolist() == [8, 0, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYGGML_CUDA_DEBUG", "1")
        plan = gg.compile(y, backends=["cuda"])
        refused(IdError, lambda: plan.run(inputs), "id 5", "there are 5", "get_rows")


@pytest.mark.parametrize("op", ["mul_mat_id", "moe_up_gate"])
@pytest.mark.parametrize("type", ["f16", "q8_0"])
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_experts_past_the_end_are_none(op: str, type: str, tokens: int) -> None:
    """Their rows are zero, as those of negative ids."""
    rng = np.random.default_rng(9)
    names = ["experts"] if op == "mul_mat_id" else ["up", "gate"]
    weights = [
        gg.constant(rng.standard_normal((9, 40, 256)) / 16, dtype=type, name=name) for name in names
    ]
    x, ids = gg.input("x", ne=(256, 1, tokens)), gg.input("ids", "i32", ne=(4, tokens))
    plan = gg.compile({"y": getattr(gg, op)(*weights, x, ids)}, backends=["cuda"])
    values = rng.standard_normal((tokens, 1, 256)).astype("f4")
    experts = rng.integers(0, 9, (tokens, 4)).astype("i4")
    experts[::2, 1] = -1
    expected = plan.run(x=values, ids=experts)["y"]
    experts[::2, 1] = 12
    result = plan.run(x=values, ids=experts)["y"]
    assert not expected[::2, 1].any() and expected[1::2].all(axis=-1).all() and expected[:, 0].any()
    assert np.array_equal(result, expected)


@pytest.mark.parametrize(("type", "most"), [("f32", 1e-6), ("f16", 1e-3)])
def test_cublas(type: str, most: float) -> None:
    """cuBLAS, called directly and inside a CUDA graph."""
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal((n, 256)).astype(np.dtype(dtype(type).numpy)) for n in (320, 40))
    weight = gg.constant(a, dtype=type, name=f"w_{type}")
    # Scaled, because a single step does not become a graph.
    y = gg.scale(gg.mul_mat(weight, gg.input("x", ne=(256, 40))), s=0.5)
    plan = gg.compile({"y": y}, backends=["cuda"])
    assert any(step.workspace for step in plan.steps), "the plan does not use cuBLAS"
    expected = 0.5 * b.astype(np.float64) @ a.astype(np.float64).T
    for turn in range(3):
        error = apart(plan.run(x=b.astype(np.float32))["y"], expected)
        assert error < most, f"run {turn}: relative error {error:.2e}"

"""Whole plans on a GPU against NumPy, products by cuBLAS, `gpu_arrays`; and a few speeds."""

from __future__ import annotations

import os
from time import perf_counter
from typing import Any

import numpy as np
from gpu_arrays import CHECKS
from gpu_faults import raises, report

import pyggml as gg
from pyggml import backends
from pyggml.errors import IdError


def _plan() -> str:
    """A graph that writes a state, run again and again: by launches, then by graphs."""
    rng = np.random.default_rng(1)
    x, pos = gg.input("x", ne=(64, 4, 3)), gg.input("pos", "i32", ne=(3,))
    cache = gg.state("cache", "f16", ne=(256, 32))
    normed = gg.rms_norm(x, eps=1e-6)
    turned = gg.rope_ext(normed, pos, n_dims=64)
    rows = gg.set_rows(cache, gg.reshape(turned, ne=(256, 3)), pos)
    y = gg.scale(gg.cast(rows, dtype="f32"), s=0.5)
    plans = {b: gg.compile({"y": y}, backends=[b]) for b in ("numpy", "cuda")}
    for turn in range(4):
        given = {
            "x": rng.standard_normal((3, 4, 64)).astype(np.float32),
            "pos": np.arange(3 * turn, 3 * turn + 3, dtype=np.int32),
        }
        want, got = (plans[b].run(given)["y"] for b in ("numpy", "cuda"))
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        if not error < 1e-3:
            return f"run {turn}: relative error {error}"
    return ""


def _compared(node: gg.Node, given: dict[str, Any], most: float, **options: Any) -> str:
    """The graph on CUDA against NumPy, three runs of it."""
    want = gg.compile({"y": node}).run(given)["y"]
    plan = gg.compile({"y": node}, **{"backends": ["cuda", "numpy"], **options})
    for turn in range(3):
        got = plan.run(given)["y"]
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        if not error < most:
            return f"run {turn}: relative error {error}\n{plan}"
    return ""


def _loop() -> str:
    """Attention by softmax within a budget: a loop over heads and rows, recorded piece by piece."""
    rng = np.random.default_rng(3)
    q, k, v = (gg.input(n, ne=ne) for n, ne in zip("qkv", ((64, 40, 4), (64, 96, 4), (96, 32, 4))))
    y = gg.mul_mat(v, gg.soft_max_ext(gg.mul_mat(k, q), scale=0.125))
    given = {n.attrs["name"]: rng.standard_normal(n.shape).astype("f4") for n in (q, k, v)}
    tight = 3 * 2 * 96 * 4 / 2**20
    return _compared(y, given, 2e-3) or _compared(y, given, 2e-3, amb=tight)


def _fused() -> str:
    """A norm and its weight in one step; the same beside a reader of the norm alone."""
    rng = np.random.default_rng(7)
    for n in (37, 640, 8192, 20000):
        x = gg.input("x", ne=(n, 9, 2))
        weight = gg.constant(rng.standard_normal(n).astype("f4"), name=f"w{n}")
        normed = gg.rms_norm(x, eps=1e-6)
        y = gg.mul(normed, weight)
        given = {"x": rng.standard_normal((2, 9, n)).astype("f4")}
        for node, steps in ((y, 1), (gg.add(y, normed), 3)):
            made = len(gg.compile({"y": node}, backends=["cuda"]).steps)
            wrong = _compared(node, given, 1e-6)
            if wrong or made != steps:
                return f"rows of {n}: {made} steps for {steps}; {wrong}"
    return ""


def _weights() -> str:
    """Products with packed weights, few columns and many, and rows of a quantized table."""
    rng = np.random.default_rng(5)
    ids = gg.input("ids", "i32", ne=(21,))
    table = gg.constant(rng.standard_normal((50, 256)), dtype="q4_0", name="table")
    x = gg.get_rows(table, ids)
    for kind in ("q8_0", "iq4_nl", "f16"):
        weight = gg.constant(rng.standard_normal((96, 256)) / 16, dtype=kind, name=f"w_{kind}")
        given = {"ids": rng.integers(0, 50, 21).astype("i4")}
        for node in (gg.mul_mat(weight, x), gg.mul_mat(weight, gg.view(x, ne=(256, 2)))):
            wrong = _compared(node, given, 1e-2)
            if wrong:
                return f"{kind}: {wrong}"
    return ""


def _long_rows() -> str:
    """Rows that several blocks share."""
    rng = np.random.default_rng(6)
    for n in (4097, 102400):
        x = gg.input("x", ne=(n, 3, 2))
        given = {"x": rng.integers(-n, n, (2, 3, n)).astype("f4")}
        for node in (gg.argmax(x), gg.argsort(x, order="desc"), gg.top_k(x, k=40)):
            want, got = (
                gg.compile({"y": node}, backends=[b]).run(given)["y"] for b in ("numpy", "cuda")
            )
            if not np.array_equal(got, want):
                return f"{node.op.name} of rows of {n}"
    return ""


def _bad_ids() -> str:
    """Ids past the end: a zero row, and an IdError where steps are watched."""
    x, ids = gg.input("x", ne=(8, 5)), gg.input("ids", "i32", ne=(3,))
    plan = gg.compile({"y": gg.get_rows(x, ids)}, backends=["cuda"])
    given = {"x": np.ones((5, 8), "f4"), "ids": np.array([4, 5, -1], "i4")}
    got = plan.run(given)["y"]
    if got.sum(axis=1).tolist() != [8, 0, 0]:
        return f"sums of rows: {got.sum(axis=1)}"
    os.environ["PYGGML_CUDA_DEBUG"] = "1"
    try:
        return raises(IdError, lambda: plan.run(given), "id 5", "there are 5", "get_rows")
    finally:
        del os.environ["PYGGML_CUDA_DEBUG"]


def _product() -> str:
    """cuBLAS: f32 and f16, started and inside a graph."""
    from pyggml.backends.base import Address
    from pyggml.backends.cuda.launch import Gemm
    from pyggml.dtypes import dtype
    from pyggml.node import Spec

    device: Any = backends.get("cuda")
    rng = np.random.default_rng(2)
    for kind, most in (("f32", 1e-6), ("f16", 1e-3)):
        a, b = (rng.standard_normal((n, 96)).astype(np.dtype(dtype(kind).numpy)) for n in (40, 7))
        specs = [Spec.of(dtype(kind), (96, n)) for n in (40, 7)]
        spec = Spec.of(dtype("f32"), (40, 7))
        held = [Address(device.alloc(s.nbytes), 0, s.nb) for s in (*specs, spec)]
        for at, s, values in zip(held, specs, (a, b)):
            device.upload(at, s, values)
        ptrs = (held[0].buffer.ptr, held[1].buffer.ptr, held[2].buffer.ptr)
        one = Gemm(
            m=40,
            n=7,
            k=96,
            ptrs=ptrs,
            types=(kind, kind, "f32"),
            leading=(96, 96, 40),
            transposed=(True, False),
            batch=1,
            strides=(0, 0, 0),
            alpha=1.0,
            beta=0.0,
        )
        want = b.astype(np.float64) @ a.astype(np.float64).T
        with device.context:
            product = device.cublas.ready()
            product(one)
            for how in ("started", "in a graph"):
                got = device.download(held[2], spec)
                error = np.linalg.norm(got - want) / np.linalg.norm(want)
                if not error < most:
                    return f"{kind} {how}: relative error {error}"
                if how == "started":
                    device.upload(held[2], spec, np.zeros((7, 40), np.float32))
                    stream = device.context.external
                    stream.begin_capture()
                    product(one)
                    graph = stream.end_capture()
                    graph.launch(stream)
    return ""


def plans(log: list[str]) -> bool:
    checks = (_plan, _loop, _fused, _weights, _long_rows, _bad_ids, _product)
    return report("plan", (*checks, *CHECKS), log)


def speed(log: list[str]) -> bool:
    """Bandwidth of large calls, and time of small ones in a replayed graph of 20."""
    from pyggml.node import cost_of

    def f32(name: str, *ne: int) -> gg.Node:
        return gg.input(name, ne=ne)

    big, row = f32("x", 8192, 4096), f32("w", 8192)
    half = gg.input("h", "f16", ne=(8192, 4096))
    cases = {
        "add 8192x4096": gg.add(big, f32("y", 8192, 4096)),
        "mul by a row": gg.mul(big, row),
        "silu": gg.silu(big),
        "rms_norm 8192x4096": gg.rms_norm(big, eps=1e-6),
        "cast f32 to f16": gg.cast(big, dtype="f16"),
        "cast f16 to f32": gg.cast(half, dtype="f32"),
        "cont of a transposed": gg.cont(gg.transpose(big)),
        "cast q8_0 to f16": gg.cast(gg.input("q", "q8_0", ne=(8192, 4096)), dtype="f16"),
        "rope 64x16x2048": gg.rope_ext(
            f32("r", 64, 16, 2048), gg.input("p", "i32", ne=(2048,)), n_dims=64
        ),
        "rms_norm 2048x1": gg.rms_norm(f32("a", 2048), eps=1e-6),
        "add 2048x1": gg.add(f32("a", 2048), f32("b", 2048)),
        "top_k 64, 6": gg.top_k(f32("a", 64), k=6),
        "argmax 102400": gg.argmax(f32("l", 102400)),
    }
    device: Any = backends.get("cuda")
    for name, node in cases.items():
        plan = gg.compile({"y": node}, backends=["cuda"])
        plan.bind()
        runner: Any = plan.runners[0]
        with device.context:
            actions = [action for step in runner.actions for action in step]
            for action in actions:
                action()
            stream = device.context.external
            stream.begin_capture()
            for _ in range(20):
                for action in actions:
                    action()
            graph = stream.end_capture()
            times = []
            for _ in range(6):
                device.synchronize()
                start = perf_counter()
                graph.launch(stream)
                device.synchronize()
                times.append((perf_counter() - start) / 20)
        best = sorted(times)[len(times) // 2]
        print(
            f"speed {name:22} {best * 1e6:9.1f} us {cost_of(node).nbytes / best / 1e12:7.2f} TB/s"
        )
    return True

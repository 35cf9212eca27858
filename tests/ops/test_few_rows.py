"""Products of few rows on NumPy: right, the same every time, and in the calling thread alone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from pyggml.backends.numpy import products, threads
from pyggml.backends.numpy.products import FEW, MOST, row_products

SIZES = [
    (n, m, k)
    for n in (1, 2, 3, FEW, FEW + 1)
    for m in (1, 2, 7, 64, 513, 1100)
    for k in (1, 129, 1024, 8193, 20000)
    if m * k < 1 << 23
]


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 1)], ids=str)
def test_values(lead: tuple[int, ...], columns: bool) -> None:
    """Against float64. `columns`: the weights are the transpose of an array, as V in attention."""
    rng = np.random.default_rng(0)
    for n, m, k in SIZES:
        if lead and m * k > 1 << 20:
            continue
        outer = (2, 5) if lead == (2, 1) else lead  # broadcast
        x = rng.standard_normal((*outer, n, k), np.float32)
        w = rng.standard_normal((*lead, k, m) if columns else (*lead, m, k), np.float32)
        w = w.swapaxes(-1, -2) if columns else w
        memory = np.full((*outer, n, m + 3), np.nan, np.float32)
        out = memory[..., :m]
        row_products(x, w, out)
        expected = np.einsum("...nk,...mk->...nm", x, w, dtype=np.float64, optimize=True)
        # A sum of k products of normal numbers has size sqrt(k).
        assert np.abs(out - expected).max() < 2e-5 * np.sqrt(k), (n, m, k)
        assert np.isnan(memory[..., m:]).all(), (n, m, k)
        again = np.empty_like(out)
        row_products(x, w, again)
        assert np.array_equal(out, again), (n, m, k)


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("lead", [(), (3,)], ids=str)
@pytest.mark.parametrize("n", [1, 2, FEW])
def test_the_same_bits_for_any_number_of_threads(
    n: int, lead: tuple[int, ...], columns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    k, m = 2053, 2 * MOST // 2053
    x = rng.standard_normal((*lead, n, k), np.float32)
    w = rng.standard_normal((*lead, k, m) if columns else (*lead, m, k), np.float32)
    w = w.swapaxes(-1, -2) if columns else w
    ranges: list[int] = []

    def counted(function: Callable[[slice], None], parts: Iterable[slice]) -> None:
        ranges.append(len(parts := list(parts)))
        threads.for_each(function, parts)

    monkeypatch.setattr(products, "for_each", counted)
    results = []
    for number in "1", "2", "5":
        threads._others.cache_clear()
        monkeypatch.setenv("PYGGML_THREADS", number)
        row_products(x, w, out := np.empty((*lead, n, m), np.float32))
        results.append(out)
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])
    assert min(ranges) > 1, "one thread computes the whole product"
    threads._others.cache_clear()


def test_threads_share_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part once, at least one of them in another thread, with the caller's error state."""
    monkeypatch.setenv("PYGGML_THREADS", "3")
    threads._others.cache_clear()
    names: list[str] = []
    meeting = threading.Barrier(2, timeout=60)

    def function(part: int) -> None:
        names.append(threading.current_thread().name)
        assert np.geterr()["invalid"] == "raise"
        if part < 2:
            meeting.wait()  # until another thread has a part too

    with np.errstate(invalid="raise"):
        threads.for_each(function, range(40))
    assert len(names) == 40 and len(set(names)) > 1
    threads._others.cache_clear()


@pytest.mark.parametrize("where", ["the caller", "another thread"])
def test_an_error_ends_the_work(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When for_each raises, no thread works any more."""
    monkeypatch.setenv("PYGGML_THREADS", "2")
    threads._others.cache_clear()
    caller, parts, meeting = threading.current_thread(), [], threading.Barrier(2, timeout=60)

    def function(part: int) -> None:
        if part < 2:
            meeting.wait()
            if (threading.current_thread() is caller) == (where == "the caller"):
                raise ZeroDivisionError
        time.sleep(0.01)
        parts.append(part)

    with pytest.raises(ZeroDivisionError):
        threads.for_each(function, range(1000))
    n_parts = len(parts)
    time.sleep(0.05)
    assert len(parts) == n_parts
    assert n_parts < 900
    threads._others.cache_clear()


PROGRAM = """
import time
import numpy as np
import pyggml as gg

def others(run):
    "Processor time of other threads, as a share of this thread's."
    run()
    time.sleep(0.3)  # threads of BLAS spin for a while after their work
    process, thread = time.process_time(), time.thread_time()
    while time.thread_time() - thread < 0.3:
        run()
    own = time.thread_time() - thread
    return (time.process_time() - process - own) / own

def weight(name, *ne):
    return gg.constant(np.ones(ne[::-1], np.float32), dtype="q8_0", name=name)

a, b = np.ones((64, 2048), np.float32), np.ones((2048, 2048), np.float32)
if others(lambda: a @ b) < 0.1:
    raise SystemExit("this BLAS does not use threads")
up, gate = weight("up", 1024, 1024), weight("gate", 1024, 1024)
plain = gg.constant(np.ones((1024, 1024), np.float32), name="plain")
experts, gates = weight("experts", 1024, 512, 4), weight("gates", 1024, 512, 4)
for n in (1, 2, 8):
    x = gg.input("x", ne=(1024, n))
    ids = gg.input("ids", "i32", ne=(2, n))
    slots = gg.reshape(x, ne=(1024, 1, n))
    graphs = {
        "mul_mat": gg.mul_mat(up, x), "f32": gg.mul_mat(plain, x),
        "fused_up_gate": gg.fused_up_gate(up, gate, x, act="silu"),
        "mul_mat_id": gg.mul_mat_id(experts, slots, ids),
        "moe_up_gate": gg.moe_up_gate(experts, gates, slots, ids, act="silu"),
        "attention": gg.flash_attn_ext(
            gg.input("q", ne=(64, 1, 4 * n)), gg.input("k", "f16", ne=(64, 4096, 4)),
            gg.input("v", "f16", ne=(64, 4096, 4)), scale=0.1),
    }
    for name, node in graphs.items():
        plan = gg.compile({"y": node}, backends=["numpy"])
        arrays = {
            key: np.arange(spec.elements).reshape(spec.shape) % 4
            for key, spec in plan.inputs.items()
        }
        print(n, name, others(lambda: plan.run(arrays)))
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="times of threads: Linux only")
def test_threads_of_blas_sleep() -> None:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2"}
    environment.pop("OMP_NUM_THREADS", None)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    if "does not use threads" in result.stderr:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert len(lines) == 18
    assert not [line for line in lines if float(line[2]) > 0.1]

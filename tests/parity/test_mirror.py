"""Memory mirrored on the host, which the grid uses on a GPU; here with NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from pyggml.parity import running
from pyggml.parity.case import Case
from pyggml.parity.cases import cases
from pyggml.parity.mirror import Mirrored, Region, mirrored
from pyggml.parity.worker import Pool, Setup

CASES = [*cases()[::60], Case.parse("add(f32[100000,5], f32[100000,5])")]


@pytest.fixture
def mirror() -> Iterator[Mirrored]:
    with mirrored("numpy") as device:
        yield device


def test_it_gives_the_same_outcomes_and_keeps_nothing() -> None:
    with mirrored("numpy") as device:
        assert backends.get("numpy") is device
        outcomes = [running.tested(case, "numpy") for case in CASES]
        assert device.twin is not None, "nothing was mirrored"
        assert device.live == device.top == 0
    assert backends.get("numpy") is device.backend
    assert outcomes == [running.tested(case, "numpy") for case in CASES]


def test_a_plan_runs_in_mirrored_memory(mirror: Mirrored) -> None:
    x = gg.input("x", ne=(6, 2))
    plan = gg.compile({"y": gg.sqr(x), "x": x}, backends=["numpy"])
    array = np.arange(12, dtype=np.float32).reshape(2, 6)
    got = plan.run(x=array)
    assert mirror.live and (got["y"] == array**2).all() and (got["x"] == array).all()


def test_what_does_not_fit_is_on_the_device() -> None:
    with mirrored("numpy", nbytes=1 << 13) as device:
        small, large = device.alloc(64), device.alloc(1 << 13)
        assert isinstance(small, Region) and not isinstance(large, Region)
        del small
        assert all(running.tested(case, "numpy").status == "ok" for case in CASES)


def test_a_kernel_that_writes_outside_its_memory_on_the_device_is_found(mirror: Mirrored) -> None:
    case = Case.parse("relu(f32[64,5])")
    with running.restored("numpy") as table:
        row = table.KERNELS[gg.relu]

        def run(*args: Any, **named: Any) -> None:
            row.run(*args, **named)
            mirror.twin[mirror.top - 1] ^= 1  # the last guard in use

        table.KERNELS[gg.relu] = replace(row, run=run)
        outcome = running.tested(case, "numpy")
    assert outcome.status == "fail" and "wrote past" in outcome.why


def test_worker_processes_mirror_too() -> None:
    texts = [str(case) for case in CASES[:9]]
    with Pool(Setup("numpy", mirror=True), 2, chunk=3) as pool:
        outcomes = list(pool.run(texts))
    assert [outcome.case for outcome in outcomes] == texts
    assert all(outcome.status == "ok" for outcome in outcomes) and not pool.deaths

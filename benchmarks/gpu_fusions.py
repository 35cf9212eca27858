"""Graphs in which the CUDA backend does several nodes in one step, against NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gpu_faults import report

import pyggml as gg
from pyggml.parity.patterns import PATTERNS, pattern

#: Relative error of an output; products are of 16-bit numbers, cache rows may be of 8 bits.
MOST = 2e-3
ROUNDED = {"bf16": 1e-2, "q8_0": 2e-2}


def _check(name: str) -> Callable[[], str]:
    def check() -> str:
        most = next((most for kind, most in ROUNDED.items() if kind in name), MOST)
        for seed in range(3):
            made = pattern(name, seed)
            host = gg.compile(made.outputs)
            plan = gg.compile(made.outputs, backends=["cuda"])
            for turn in range(3):  # by launches, captured, replayed; each goes on from the states
                wanted = host.run(made.inputs)
                for key, got in plan.run(made.inputs).items():
                    want = wanted[key].astype("f8")
                    finite = np.where(np.isfinite(want), want, 0)  # a mask has -inf
                    same = np.array_equal(np.isfinite(want), np.isfinite(got))
                    apart = np.where(np.isfinite(got), got, 0) - finite
                    error = np.linalg.norm(apart) / max(np.linalg.norm(finite), 1e-30)
                    if not (same and error <= (0 if wanted[key].dtype.kind == "i" else most)):
                        return f"{key}, run {turn}, seed {seed}: relative error {error:.2e}"
        return ""

    check.__name__ = f"_{name}"
    return check


def fusions(log: list[str]) -> bool:
    return report("fusion", [_check(name) for name in PATTERNS], log)

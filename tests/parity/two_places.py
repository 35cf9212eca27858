"""A place whose kernels a test can spoil, and a graph to compare there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml.backends.numpy.backend import NumpyBackend
from pyggml.backends.numpy.table import KERNELS
from pyggml.parity.report import Report, Row

B = "null:7"


class Host(NumpyBackend):
    """NumPy for a null device: some kernels are wrong, some ops declare another numeric class."""

    def __init__(self) -> None:
        self.wrong: dict[str, Callable[..., None]] = {}
        self.classes: dict[str, str] = {}

    def bind(self, *args: Any) -> Any:
        right = dict(KERNELS)
        try:
            for name, spoil in self.wrong.items():
                op = getattr(gg, name)
                KERNELS[op] = replace(right[op], run=_then(right[op].run, spoil))
            return super().bind(*args)
        finally:
            KERNELS.update(right)

    def numeric(self, node: gg.Node) -> str:
        return self.classes.get(node.op.name, "f32")


def _then(right: Callable[..., None], spoil: Callable[..., None]) -> Callable[..., None]:
    def run(out: Any, *sources: Any, **attrs: Any) -> None:
        right(out, *sources, **attrs)
        spoil(out)

    return run


def scaled(by: float) -> Callable[..., None]:
    return lambda out: np.multiply(out, by, out=out)


def values(shape: tuple[int, ...], seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Model:
    """A small graph: a product with blocks, a state that is written and read, scores, a view."""

    def __init__(self) -> None:
        w = gg.constant(values((32, 64), 1) / 8, dtype="q8_0", name="w")
        x = gg.input("x", ne=(64, 5))
        self.cache = gg.state("cache", "f16", ne=(32, 12))
        ids = gg.input("ids", "i32", ne=(5,))
        h = gg.label(gg.mul_mat(w, x), "h")
        old = gg.label(gg.mul_mat(gg.view(self.cache, ne=(32, 4)), h), "old")
        self.rows = gg.label(gg.set_rows(self.cache, h, ids), "rows")
        kq = gg.label(gg.mul_mat(gg.view(self.rows, ne=(32, 12)), gg.silu(h)), "kq")
        p = gg.label(gg.soft_max_ext(kq, scale=0.1), "p")
        v = gg.label(gg.cont(gg.transpose(self.rows)), "v")
        y = gg.label(gg.add(gg.mul_mat(v, p), h), "y")
        self.outputs = {"y": gg.transpose(y), "old": old}
        self.inputs = {"x": values((5, 64)), "ids": [3, 1, 11, 6, 0]}
        self.states = {"cache": values((12, 32), 2)}

    def on(self, b: str = B, a: str = "numpy") -> Report:
        return gg.compare(self.outputs, a, b, self.inputs, states=self.states)


def bad(report: Report) -> list[str]:
    return [row.label for row in report.rows if row.status != "ok"]


def at(row: Row) -> tuple[int, ...]:
    """Coordinates of the worst element."""
    assert row.comparison is not None and row.comparison.at is not None
    return row.comparison.at


def run_here(path: Path) -> tuple[int, dict[str, Any]]:
    """(exit status, globals) of a script that runs in this process, with its wrong kernels."""
    code = compile(path.read_text(), str(path), "exec")
    names: dict[str, Any] = {"__file__": str(path), "__name__": "__main__"}
    with pytest.raises(SystemExit) as stop:
        exec(code, names)
    return int(stop.value.code or 0), names

"""Measuring the speed of models: llama-bench's tests and sweep-bench's table, with memory.

with gg.load("model.gguf") as model:
    tests = [gg.bench.Test(n_prompt=512), gg.bench.Test(n_gen=128, n_depth=4096)]
    for row in gg.bench.measure(model, tests, repeats=3):
        print(row.test, row.avg_ts, row.stddev_ts, row.samples_ts)
    for point in gg.bench.sweep(model, n_ctx=8192, n_ubatch=512):
        print(point.n_kv, point.speed_pp, point.speed_tg, point.compute)
"""

from __future__ import annotations

from pyggml.bench.depth import Point, sweep
from pyggml.bench.runs import Row, Test, measure

__all__ = ["Point", "Row", "Test", "measure", "sweep"]

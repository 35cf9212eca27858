"""benchmarks/gpu_v4.py on a device without a GPU, with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu_bench, gpu_model, gpu_v4
from pyggml import backends
from tools.tables import BARS


def used() -> int:
    """The bytes of the null device's blocks."""
    device: Any = backends.get("null")
    return sum(len(block.data) for block in device._blocks)


def rows_of(path: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["name"]: line for line in lines}


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of rows of a short benchmark."""
    monkeypatch.setenv(gpu_bench.ROWS, str(tmp_path / "rows"))
    for name, value in (
        ("PRESET", "tiny-deepseek4"), ("N_BATCH", 32), ("PROMPTS", (32, 64)), ("DEPTH", 64),
        ("N_CTX", 96),
    ):  # fmt: skip
        monkeypatch.setattr(gpu_v4, name, value)
    monkeypatch.setattr(gpu_model, "STEPS", 3)
    return tmp_path / "rows"


def test_rows_of_the_whole_model(rows: Path, tmp_path: Path) -> None:
    model = gpu_v4.opened(tmp_path / "x.gguf", layers=None, dtype="iq3_xxs", place="null")
    session = gpu_v4.measure(model, used, used())
    lines = rows_of(rows)
    assert len(session.tokens) == gpu_v4.DEPTH + 1
    names = {name.replace("_d64", "_d8192").replace("_32", "_2048") for name in lines}
    assert {name for name in BARS if name.startswith("v4_whole_")} < names
    for part in ("weights", "caches", "compute"):
        row = lines[f"v4_whole_{part}"]
        assert row["value"] == row["planned"] > 0 and row["bar"] is None, part
    total, driver = lines["v4_whole_memory"], lines["v4_whole_driver"]
    assert total["bar"] == total["planned"] and driver["planned"] == 0
    # The states with which a device feeds itself are not in the plan, and nothing else.
    assert total["planned"] < total["value"] < total["planned"] + 8 * 1024 / 2**30
    assert all(min(row["samples"]) > 0 for row in lines.values())


def test_rows_of_fewer_layers_have_other_names(rows: Path, tmp_path: Path) -> None:
    model = gpu_v4.opened(tmp_path / "x.gguf", layers=2, dtype="q4_0", place="null")
    gpu_v4.measure(model, used, used())
    assert all(name.startswith("v4_2_layers_") for name in rows_of(rows))


def test_logits_that_are_not_finite_end_the_benchmark() -> None:
    gpu_v4.check(np.ones((1, 4), np.float32))
    for bad in (np.array([[1.0, np.nan]]), np.array([[np.inf, 0.0]]), np.zeros((1, 4))):
        with pytest.raises(SystemExit, match="not finite"):
            gpu_v4.check(bad)

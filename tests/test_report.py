"""The tables of benchmarks/report.py."""

from __future__ import annotations

from typing import Any

from benchmarks import report
from benchmarks.gpu_speeds import record_row


def row(test: str, engine: str, speed: float, **fields: Any) -> dict[str, Any]:
    """A row of the record from a row of llama-bench's JSON."""
    sizes = {"score_peak_bytes": 1 << 21, "compute_bytes": 3 << 20, "cache_bytes": 4 << 20}
    timed = {"n_prompt": 0, "n_gen": 0, "n_depth": 0}
    setting = {"flash_attn": 1, "mla": 3, "amb": 0, "type_k": "f16", **sizes}
    return record_row(
        test, engine, {"avg_ts": speed, "samples_ts": [speed], **timed, **setting, **fields}
    )


RECORD: dict[str, Any] = {
    "rows": [
        row("prompts", "pyggml", 900.0, n_prompt=64),
        row("prompts", "pyggml", 1200.4, n_prompt=64, flash_attn=0),
        row("prompts", "llama.cpp", 400.0, n_prompt=64),
        row("decoding", "pyggml", 50.0, n_depth=8, loop=False),
        row("decoding", "pyggml", 60.0, n_depth=8, loop=True),
        row("q8_0 decoding", "pyggml", 40.0, n_depth=16),
        row("forms", "pyggml", 7.0),
        row("forms", "pyggml", 8.0, flash_attn=0, mla=0),
        row("budgets", "pyggml", 6.0, flash_attn=0, amb=64.0),
    ]
}


def test_speeds_beside_the_peer() -> None:
    head, rows = report.by_size(report.prompt_lines(RECORD), "tokens")
    assert head == [
        "tokens", "pyggml, flash attention", "pyggml, softmax", "llama.cpp, flash attention",
        "best / best",
    ]  # fmt: skip
    assert rows == [["64", "900", "1,200", "400", "3.00"]]


def test_speeds_without_a_peer() -> None:
    head, rows = report.by_size(report.decode_lines(RECORD), "depth")
    assert head == [
        "depth", "pyggml, loop", "pyggml, latent f16", "pyggml, latent q8_0", "best / best"
    ]  # fmt: skip
    assert rows == [["8", "60", "50", "", ""], ["16", "", "", "40", ""]]


def test_memory_beside_time() -> None:
    _, rows = report.memory(RECORD)
    assert rows == [
        ["flash", "3", "none", "2", "3", "4", "7"],
        ["softmax", "0", "none", "2", "3", "4", "8"],
        ["softmax", "3", "64", "2", "3", "4", "6"],
    ]

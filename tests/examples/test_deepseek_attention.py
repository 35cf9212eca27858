"""The attention example: its table, its exit status, its files."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from pyggml.models.presets import TINY
from pyggml.models.synth import synth

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "deepseek_attention.py"
SHORT = ["--prompt", "40", "--decode", "2", "--n-kv", "64"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_deepseek_attention", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with q_lora and joined kv_b, whose cache rows are whole blocks."""
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    config = replace(TINY, n_head=6, n_rot=32, kv_b="joined", n_vocab=256)
    synth(path, config, dtype="q4_0", seed=1)
    return str(path)


def rows_of(example: ModuleType, tmp_path: Path, *words: str) -> tuple[int, list[dict[str, Any]]]:
    path = tmp_path / "rows.json"
    status = example.main([*SHORT, *words, "--json", str(path)])
    return status, json.loads(path.read_text())["rows"]


def test_the_table(
    example: ModuleType, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, rows = rows_of(example, tmp_path, "--model", model, "--layer", "2")
    assert status == 0
    counts = {(r["form"], r["flash"], r["cache"]): 0 for r in rows}
    for r in rows:
        counts[r["form"], r["flash"], r["cache"]] += 1
        assert r["bound"] == {"f16": 1e-2, "q8_0": 3e-2}[r["cache"]]
        # On NumPy, the cache is the only rounding.
        assert 1e-6 < r["error"] <= {"f16": 1e-3, "q8_0": 2e-2}[r["cache"]]
        assert r["equal"]
        assert r["amb"] is None or r["peak"] <= r["amb"]
        assert min(r["arena"], r["prompt"], r["decode"]) > 0
    for cache in ("f16", "q8_0"):
        assert counts.pop(("standard", True, cache)) == counts.pop(("latent", True, cache)) == 1
        for form, flash in (("standard", False), ("latent", False), ("expanded", True)):
            assert counts.pop((form, flash, cache)) == 4
    assert not counts
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny.gguf layer 2: n_embd 256, q_lora 96, 6 heads")
    assert len(lines) == 3 + len(rows) + 2
    assert "does not exist: expanded needs flash attention" in lines[-2]
    assert lines[-1] == (
        f"All {len(rows)} rows have errors within 0.01 (f16), 0.03 (q8_0), "
        "score peaks within amb, bit-equal runs."
    )


def test_the_default_file_is_cut_into_heads_and_then_into_rows_or_keys(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--prompt", "256", "--n-kv", "512"]
    status, rows = rows_of(example, tmp_path, "--types", "q8_0", *sizes)
    assert status == 0
    head = capsys.readouterr().out.splitlines()[0]
    assert "n_embd 2048, 16 heads, standard 192/128, latent 576/512" in head
    for form, part in (("standard", "rows"), ("latent", "rows"), ("expanded", "keys")):
        none, equal, heads, parts = (r for r in rows if r["form"] == form and r["peak"])
        assert none["cut"] == equal["cut"] == "whole"
        assert none["peak"] == equal["peak"] == equal["amb"]
        assert int(heads["cut"].removeprefix("heads ").partition("x")[0]) >= 3
        assert f"{part} " in parts["cut"]
        assert parts["amb"] < heads["amb"] < equal["amb"]


def test_the_picture(example: ModuleType, model: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'plot'")
    path = tmp_path / "arena.png"
    status, _ = rows_of(example, tmp_path, "--model", model, "--types", "f16", "--plot", str(path))
    assert status == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_prec_f32_reaches_every_op_that_has_a_precision(
    example: ModuleType, model: str, tmp_path: Path
) -> None:
    words = ["--model", model, "--prec", "f32"]
    with example.gguf.open(model) as file:
        bench = example.Bench(file, example.parse([*SHORT, *words]))
        for form, flash in (("latent", True), ("standard", False)):
            plan = bench.plan(example.Variant(form, flash, "f16"), 3, None, example.gg.Store())
            nodes = [n for n in plan.graph.nodes if "prec" in n.attrs]
            assert len(nodes) > 4 and {n.attrs["prec"] for n in nodes} == {"f32"}
            assert ("flash_attn_ext" in {n.op.name for n in nodes}) == flash
    status, rows = rows_of(example, tmp_path, *words, "--types", "f16")
    assert status == 0 and {r["bound"] for r in rows} == {1e-3}


@pytest.mark.parametrize("fault", ["error", "peak", "runs"])
def test_a_row_out_of_bounds_fails(
    fault: str,
    example: ModuleType,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fault == "error":
        monkeypatch.setitem(example.BOUNDS["default"], "f16", 1e-6)
    elif fault == "runs":
        run, runs = example.Bench.run, []

        def other_run(bench: Any, *plans: Any) -> Any:
            y, *times = run(bench, *plans)
            runs.append(y)
            if len(runs) == 2:
                y[0, 0] = np.nextafter(y[0, 0], np.float32(np.inf))
            return y, *times

        monkeypatch.setattr(example.Bench, "run", other_run)
    else:
        make = example.Row
        monkeypatch.setattr(example, "Row", lambda *a: replace(make(*a), peak=1e6))
    status, rows = rows_of(example, tmp_path, "--model", model, "--types", "f16")
    assert status == 1
    assert any(not r["ok"] for r in rows)
    out = capsys.readouterr().out
    assert "  FAILED" in out
    assert ("TWO RUNS DIFFER" in out) == (fault == "runs")
    assert "rows FAILED" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--types", "f16,q4_0"], "no cache type 'q4_0'"),
        (["--prompt", "0"], "at least 1"),
        (["--n-kv", "8"], "no room for 42 tokens"),
    ],
)
def test_wrong_usage(
    words: list[str], complaint: str, example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        example.main([*SHORT, *words])
    assert exit_.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--model", "no-such-file.gguf"], "no-such-file.gguf"),
        (["--backend", "abacus"], "abacus"),
        (["--layer", "1"], "no layer 1"),
    ],
)
def test_errors_are_one_line(
    words: list[str], complaint: str, example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.main([*SHORT, *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and complaint in error and "Traceback" not in error


def test_it_runs_as_a_script(model: str) -> None:
    words = [sys.executable, str(EXAMPLE), *SHORT, "--model", model, "--types", "f16"]
    done = subprocess.run(
        words,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("All 14 rows")


def test_types_that_do_not_divide_the_rows(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row of the tiny preset is not whole q8_0 blocks. One line says so; the others run."""
    model = tmp_path / "tiny.gguf"
    synth(model, TINY, dtype="f16", seed=0)
    status, rows = rows_of(example, tmp_path, "--model", str(model))
    assert status == 0 and {r["cache"] for r in rows} == {"f16"}
    assert "does not exist: a row of 48 is not whole blocks" in capsys.readouterr().out
    assert example.main([*SHORT, "--model", str(model), "--types", "q8_0"]) == 1
    assert "can have a cache of type q8_0" in capsys.readouterr().err

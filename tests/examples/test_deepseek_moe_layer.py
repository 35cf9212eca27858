"""The example of a whole MoE layer: its table, its exit status, its files."""

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

from pyggml.models.presets import TINY, V2_LITE
from pyggml.models.synth import synth

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "deepseek_moe_layer.py"
SHORT = ["--prompt", "12", "--decode", "2"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_deepseek_moe_layer", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tiny, with every feature of V3. Layer 0 is dense, and cache rows are whole blocks."""
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    synth(path, replace(TINY, n_rot=32, n_vocab=256), dtype="iq4_nl", seed=1)
    return str(path)


def rows_of(example: ModuleType, tmp_path: Path, *words: str) -> tuple[int, list[dict[str, Any]]]:
    path = tmp_path / "rows.json"
    status = example.main([*SHORT, *words, "--json", str(path)])
    return status, json.loads(path.read_text())["rows"]


def test_it_runs_as_a_script(model: str, tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    words = [sys.executable, str(EXAMPLE), *SHORT, "--model", model, "--json", str(output)]
    done = subprocess.run(
        words,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("tiny.gguf layer 1: n_embd 256, 4 heads, 2 of 8 experts of 128")
    assert lines[-1].startswith("All 6 rows passed.")
    rows = json.loads(output.read_text())["rows"]
    places = ["numpy", "null:0", "null:0 + experts on numpy"]
    assert [(r["place"], r["cache"]) for r in rows] == [
        (p, c) for p in places for c in ("f16", "q8_0")
    ]
    assert len(lines) == 3 + len(rows) + 1
    for row in rows:
        assert row["ok"] and row["equal"]
        assert row["same"] + row["near"] == 14 and row["other"] == 0
        assert row["bound"] == {"f16": 1e-2, "q8_0": 3e-2}[row["cache"]]
        for part in ("prompt_error", "decode_error"):
            assert row["bound"] / 1000 < row[part] <= row["bound"]
        assert min(row[key] for key in ("prompt", "decode", "weights", "arena")) > 0
    # The null device computes with NumPy, so all places give the same errors.
    for cache in ("f16", "q8_0"):
        errors = {(r["prompt_error"], r["decode_error"]) for r in rows if r["cache"] == cache}
        assert len(errors) == 1


def test_other_layers_precisions_and_places(
    example: ModuleType, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", model, "--layer", "2", "--types", "f16", "--prec", "f32"]
    status, rows = rows_of(example, tmp_path, *words, "--backend", "null:1", "--backend", "null:0")
    assert status == 0
    assert [r["place"] for r in rows] == ["null:1", "null:0", "null:1 + experts on numpy"]
    assert {r["bound"] for r in rows} == {1e-3}
    assert "layer 2: " in capsys.readouterr().out


def test_precise_reaches_every_op_that_has_a_precision(example: ModuleType, model: str) -> None:
    args = example.parse(["--model", model, "--prec", "f32", *SHORT])
    with example.gguf.open(model) as file:
        bench = example.Bench(file, args)
        plan = bench.plan({}, "f16", 3, example.gg.Store())
    nodes = [n for n in plan.graph.nodes if "prec" in n.attrs]
    assert len(nodes) > 8 and {n.attrs["prec"] for n in nodes} == {"f32"}
    assert {n.op.name for n in nodes} >= {"mul_mat", "mul_mat_id", "moe_up_gate", "fused_up_gate"}


def other_ids(bench: Any) -> None:
    """Change the experts that float64 chose for the first token."""
    bench.routing.ids[0] = (bench.routing.ids[0] + 1) % 8


@pytest.mark.parametrize("fault", ["prompt", "decode", "experts", "near tie", "runs"])
def test_what_fails_and_what_is_a_near_tie(
    fault: str,
    example: ModuleType,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make, run, runs = example.Bench.__init__, example.Bench.run, []

    def wrong_bench(bench: Any, *args: Any) -> None:
        make(bench, *args)
        if fault in ("prompt", "decode"):
            bench.expected[0 if fault == "prompt" else -1] *= 1.5
        if fault in ("experts", "near tie"):
            other_ids(bench)
            bench.routing.margin[0] = 1e-2 / 3 * (1.01 if fault == "experts" else 0.99)

    def wrong_run(bench: Any, *plans: Any) -> Any:
        y, *others = run(bench, *plans)
        runs.append(y)
        if fault == "runs" and len(runs) == 2:
            y[0, 0] = np.nextafter(y[0, 0], np.float32(np.inf))
        return y, *others

    monkeypatch.setattr(example.Bench, "__init__", wrong_bench)
    monkeypatch.setattr(example.Bench, "run", wrong_run)
    words = ["--model", model, "--types", "f16", "--backend", "numpy"]
    status, (row,) = rows_of(example, tmp_path, *words)
    out = capsys.readouterr().out
    assert row["ok"] == (fault == "near tie") == (status == 0) == ("FAILED" not in out)
    assert row["equal"] == (fault != "runs") == ("DIFFER" not in out)
    assert row["near"] == (fault == "near tie") == ("13/14, 1 near ties" in out)
    assert row["other"] == (fault == "experts") == ("13/14, 1 others" in out)
    for part in ("prompt", "decode"):
        assert (row[f"{part}_error"] > row["bound"]) == (fault == part)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [(["--types", "f16,q4_0"], "no cache type 'q4_0'"), (["--decode", "0"], "at least 1")],
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
        (["--layer", "0"], "layer 0 is dense"),
        (["--layer", "3"], "no layer 3"),
    ],
)
def test_errors_are_one_line(
    words: list[str],
    complaint: str,
    example: ModuleType,
    model: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert example.main([*SHORT, "--model", model, *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and complaint in error and "Traceback" not in error


def test_the_default_file_is_a_layer_of_v2_lite_with_experts(
    example: ModuleType, tmp_path: Path
) -> None:
    path = example.lite(str(tmp_path), 0)
    with example.gguf.open(path) as file:
        arch = example.Model(file).arch
        assert file.tensors["blk.0.ffn_up_exps.weight"].dtype.name == "iq4_nl"
        assert "blk.0.ffn_up.weight" not in file.tensors
    for size in ("n_embd", "n_head", "kv_lora_rank", "experts"):
        assert getattr(arch, size) == getattr(V2_LITE, size)

"""The example of sparse attention: its table, its exit status, its files."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.reference.sparse_layer import best_f64

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "sparse_attention.py"
#: The shallowest depth at which V4 chooses rows, and no other model.
SHORT = ["--quick", "--models", "V4", "--depths", "2304"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_sparse_attention", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def rows_of(example: ModuleType, tmp_path: Path, *words: str) -> tuple[int, list[dict[str, Any]]]:
    path = tmp_path / "rows.json"
    status = example.main([*words, "--json", str(path)])
    return status, json.loads(path.read_text())["rows"]


def test_the_table(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = rows_of(example, tmp_path, "--quick", "--types", "f16,q8_0")
    assert status == 0
    forms = [(name, form.name) for name in example.FORMS for form in example.FORMS[name]]
    assert len(rows) == 4 * len(forms)
    states = {}
    for r in rows:
        # On NumPy, the cache is the only rounding.
        assert 1e-6 < r["error"] <= {"f16": 1e-3, "q8_0": 2e-2}[r["cache"]]
        assert r["equal"] and r["ok"] and min(r["arena"], r["prompt"], r["token"]) > 0
        indexer = r["form"] in ("sparse", "4") and r["depth"] == 2304
        assert (r["swaps"] is not None) == indexer == (r["peak"] > 0)
        assert r["far"] <= {"f16": 1e-3, "q8_0": 1e-2}[r["cache"]]
        if r["form"] == "dense":
            assert r["gains"] == [1, 1]
        states[r["model"], r["form"], r["depth"], r["cache"]] = round(r["states"] * 2**20)
    assert {key[:2] for key in states} == set(forms)
    latent, index = 2304 * 576 * 2, 2304 * 128 * 2
    for name in ("V3.2", "GLM-5.2"):
        assert states[name, "dense", 2304, "f16"] == latent
        assert states[name, "sparse", 2304, "f16"] == latent + index
        assert states[name, "sparse", 2304, "q8_0"] == (latent + index) / 2 * 34 / 32
    assert states["GLM-5.2", "shared", 2304, "f16"] == latent
    assert states["V4", "dense", 2304, "f16"] == 2304 * 512 * 2
    for depth in (256, 2304):  # the windows of all tokens of a batch of 128
        assert states["V4", "window", depth, "f16"] == 256 * 512 * 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "n_embd 128, random f32 weights, 1/8 of the heads: 16 (V3.2), 8 (GLM"
    )
    assert lines[1].endswith("seed 0, numpy")
    assert len(lines) == 4 + len(rows) + 1 and "FAILED" not in "".join(lines)
    assert lines[-1].startswith(f"All {len(rows)} rows have errors within 0.01 (f16), 0.03 (q8_0)")


def test_depths_below_the_number_of_chosen_rows_are_dense(
    example: ModuleType, tmp_path: Path
) -> None:
    """The tokens see the same rows, so the errors are the same."""
    words = ["--quick", "--models", "V3.2", "--depths", "6,300", "--seed", "3"]
    status, rows = rows_of(example, tmp_path, *words)
    assert status == 0 and [r["depth"] for r in rows] == [6, 6, 300, 300]
    for dense, sparse in zip(rows[::2], rows[1::2]):
        assert sparse["error"] == dense["error"]


def test_the_picture(example: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'plot'")
    path = tmp_path / "sparse.png"
    assert example.main([*SHORT, "--depths", "256,512", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("fault", ["error", "choice", "runs"])
def test_a_row_out_of_bounds_fails(
    fault: str,
    example: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fault == "error":  # float64 with a window of 127 tokens
        layer = example.CompressedLayer
        exact = layer.attention

        def attention(self: Any, *args: Any) -> Any:
            self.window -= 1
            return exact(self, *args)

        monkeypatch.setattr(layer, "attention", attention)
    elif fault == "choice":  # float64 would choose the worst rows
        monkeypatch.setattr(
            example, "best_f64", lambda s, k: best_f64(np.where(np.isfinite(s), -s, s), k)
        )
    else:
        run = example.gg.Plan.run

        def other_run(plan: Any, *args: Any, **named: Any) -> Any:
            outputs = run(plan, *args, **named)
            if len(outputs) > 1:  # the second run, which observes the choice
                outputs["y"] = np.nextafter(outputs["y"], np.float32(np.inf))
            return outputs

        monkeypatch.setattr(example.gg.Plan, "run", other_run)
    status, rows = rows_of(example, tmp_path, *SHORT)
    assert status == 1
    wrong = [r["form"] for r in rows if not r["ok"]]
    assert ("4" in wrong) and (fault == "error" or wrong == ["4"])
    out = capsys.readouterr().out
    message = {"error": "error above 0.01", "choice": "from the border", "runs": "two runs differ"}
    assert f"  FAILED: {'a swapped row is' if fault == 'choice' else message[fault]}" in out
    assert message[fault] in out and "rows FAILED" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--types", "f16,q4_0"], "--types: no 'q4_0'; choose from f32, f16, q8_0"),
        (["--models", "V5"], "--models: no 'V5'"),
        (["--depths", "1024,many"], "must be numbers"),
        (["--depths", "19"], "at least 20: --prompt plus --tokens"),
        (["--tokens", "0"], "at least 1"),
        (["--cut", "3"], "--cut"),
    ],
)
def test_wrong_usage(
    words: list[str], complaint: str, example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        example.main(words)
    assert exit_.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [(["--backend", "abacus"], "abacus"), (["--weights", "q9"], "q9")],
)
def test_errors_are_one_line(
    words: list[str], complaint: str, example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.main([*SHORT, *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and complaint in error and "Traceback" not in error


def test_it_runs_as_a_script() -> None:
    words = [sys.executable, str(EXAMPLE), "--quick", "--models", "V3.2", "--depths", "256"]
    done = subprocess.run(
        words,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("All 2 rows")


def test_swaps_of_a_choice() -> None:
    """Of equal scores the lower row comes first. Rows that a token does not see are not chosen."""
    scores = np.array([[4.0, 1.0, 3.0, 3.0], [2.0, 5.0, -8.0, -np.inf], [7.0, *3 * [-np.inf]]])
    choice = best_f64(scores, 2)
    assert choice.chosen.tolist() == [[1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert choice.border.tolist() == [3, 2, -np.inf]
    assert choice.gap.tolist() == [0, 10 / 8, np.inf]
    assert choice.swaps(choice.chosen) == (0, 0)
    other = np.array([[1, 0, 0, 1], [0, 1, 1, 0], [1, 0, 0, 0]], bool)
    assert choice.swaps(other) == (2 / 3, 10 / 8)

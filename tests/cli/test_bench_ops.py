"""`pyggml bench --ops`: the cost of each step as tables, JSON, CSV and a trace."""

from __future__ import annotations

import argparse
import csv
import io
import json
from pathlib import Path

import pytest

from pyggml.cli import bench_ops, main, parser_of
from pyggml.cli.model_options import combinations
from pyggml.models.presets import preset
from pyggml.models.synth import synth

Streams = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("model") / "tiny.gguf"
    synth(file, preset("tiny-llama"), dtype="q8_0", seed=1)
    return file


def parsed(path: Path, *words: str) -> argparse.Namespace:
    defaults = ["-m", str(path), "--backend", "numpy", "-r", "1", "--ops"]
    return parser_of("bench").parse_args([*defaults, *words])


def test_tables(path: Path, capsys: Streams) -> None:
    assert bench_ops.ops(parsed(path, "-p", "0", "-d", "100", "--by", "op,layer,step")) == 0
    out = capsys.readouterr().out
    assert out.startswith("### tg1 @ d100: 39 steps, 39 launches, ")
    assert "- numpy: copies " in out and "- host: inputs " in out
    assert "\n| mul_mat x 11 | " in out and "\n| no layer x " in out and "\n| 1 x 17 | " in out
    assert "\n| Qcur-0 = rope_ext(" in out
    tables = [line for line in out.splitlines() if line.startswith("|")]
    assert {line.count(" | ") for line in tables if not line.startswith("|--")} == {7}


def test_json(path: Path, capsys: Streams) -> None:
    assert bench_ops.ops(parsed(path, "-p", "5", "-n", "1", "-o", "json")) == 0
    prompt, token = json.loads(capsys.readouterr().out)
    assert (prompt["test"], prompt["n_tokens"], token["test"], token["n_tokens"]) == (
        "pp5", 5, "tg1", 1,
    )  # fmt: skip
    assert len(token["steps"]) == 39 and set(token["by"]) == {*bench_ops.GROUPS} - {"step"}
    row = next(r for r in token["steps"] if r["label"] == "Qcur-1")
    assert row["layer"] == 1 and row["op"] == "rope_ext" and row["place"] == "numpy"
    assert row["seconds"] > 0 and row["ceiling"] > 0 and "models" in row["line"]
    assert row["kernels"] == "numpy.rope_ext" and row["why"] == ""
    for sums in token["by"].values():
        assert sum(r["seconds"] for r in sums) == pytest.approx(token["seconds"])


def test_lines_of_json(path: Path, capsys: Streams) -> None:
    assert bench_ops.ops(parsed(path, "-p", "5", "-n", "1", "-o", "jsonl")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["test"] for line in lines] == ["pp5", "tg1"]


def test_csv(path: Path, capsys: Streams) -> None:
    assert bench_ops.ops(parsed(path, "-p", "0", "-o", "csv", "--by", "label")) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {"l_out-*", "result_output"} <= {row["name"] for row in rows}
    assert sum(int(row["steps"]) for row in rows) == 39
    assert all(float(row["seconds"]) >= 0 for row in rows)


def test_a_trace(path: Path, tmp_path: Path, capsys: Streams) -> None:
    out = tmp_path / "out.json"
    assert bench_ops.ops(parsed(path, "-p", "0", "--trace", str(out))) == 0
    assert f"wrote {out}" in capsys.readouterr().err
    events = json.loads(out.read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == 3 + 39
    assert all("share of ceiling" in e["args"] for e in events if e["ph"] == "X" and e["pid"] > 1)


def test_cases(path: Path) -> None:
    """A prompt longer than a batch is profiled by its last batch. Lists are those of `bench`."""
    [args] = combinations(parsed(path, "-ub", "4", "-p", "0,10,8", "-d", "0,6"))
    assert [(c.name, c.n_tokens, c.depth) for c in bench_ops.cases(args)] == [
        ("pp10", 2, 8), ("pp8", 4, 4), ("tg1", 1, 0),
        ("pp10 @ d6", 2, 14), ("pp8 @ d6", 4, 10), ("tg1 @ d6", 1, 6),
    ]  # fmt: skip
    args.p, args.n, args.d = [0], [0], [0]
    assert not list(bench_ops.cases(args))


def test_wrong_usage(path: Path, capsys: Streams) -> None:
    words = ["bench", "-m", str(path), "--backend", "numpy"]
    for wrong, text in (
        (["--ops", "-o", "csv"], "need one case, for example -p 0; there are 2"),
        (["--ops", "-p", "0", "-fa", "0,1", "--trace", "x.json"], "there are 2"),
        (["--ops", "--loop"], "--loop does not go with --ops"),
        (["--trace", "x.json"], "--trace needs --ops"),
        (["--ops", "--by", "op,size"], "'size' must be one of step, op"),
    ):
        assert main([*words, *wrong]) == 2
        assert text in capsys.readouterr().err


def test_combinations(path: Path, capsys: Streams) -> None:
    assert bench_ops.ops(parsed(path, "-p", "0", "-fa", "0,1", "-o", "jsonl")) == 0
    tests = [json.loads(line)["test"] for line in capsys.readouterr().out.splitlines()]
    assert tests == ["tg1, -fa off", "tg1, -fa on"]

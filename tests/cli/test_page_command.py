"""`pyggml page`: what it writes, and its errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pyggml.cli import main


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    assert main(["synth", str(path), "--preset", "tiny", "--layers", "2"]) == 0
    return str(path)


def data_in(path: Path) -> dict[str, Any]:
    match = re.search(r'<script id="data"[^>]*>(.*?)</script>', path.read_text(), re.DOTALL)
    assert match
    data: dict[str, Any] = json.loads(match[1])
    return data


def test_it_has_both_plans_and_the_memory_of_pyggml_plan(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, options = tmp_path / "page.html", ["-m", tiny, "-c", "256", "-ub", "32", "-amb", "1"]
    assert main(["page", *options, "-o", str(out), "--backend", "numpy"]) == 0
    assert re.fullmatch(rf"wrote {out}: [\d,]+ bytes\n", capsys.readouterr().out)
    data = data_in(out)
    assert [plan["caption"] for plan in data["plans"]] == ["a batch of 32 tokens", "one token"]
    assert main(["plan", *options, "--backend", "numpy", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    for row, device in zip(data["memory"]["devices"], planned["devices"], strict=True):
        assert (row["weights"], row["compute"]) == (device["weights"], device["compute"])
        assert row["total"] == device["total"] - device["driver_estimate"] - device["pinned"]
    assert data["command"] == planned["command"]
    assert data["variants"][0]["change"] == "-amb 1 -ub 32 -mla 3 -fa on"
    assert not any("seconds" in plan["steps"] for plan in data["plans"])


def test_one_token_is_one_plan_and_can_be_timed(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    words = ["-c", "64", "-ub", "1", "--backend", "numpy", "--profile", "--what-if", "off"]
    assert main(["page", "-m", tiny, "-o", str(out), *words]) == 0
    data = data_in(out)
    [plan] = data["plans"]
    assert len(plan["steps"]["seconds"]) == len(plan["steps"]["node"])
    assert all(seconds > 0 for seconds in plan["steps"]["seconds"]) and data["variants"] == []


def test_errors_leave_no_file(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header, out = tmp_path / "header.gguf", tmp_path / "page.html"
    assert main(["synth", str(header), "--preset", "tiny", "--header-only"]) == 0
    capsys.readouterr()
    cases = [
        (["-m", str(header), "-o", str(out), "--profile"], "weights are missing, which --profile"),
        (["-m", tiny, "-o", str(tmp_path), "-c", "64"], "Is a directory"),
        (["-m", tiny, "-o", str(tmp_path / "no" / "page.html"), "-c", "64"], "No such file"),
        (
            ["-m", tiny, "-o", str(out), "--device", "null:1GiB", "--profile", "-c", "64"],
            "a place with a size is for planning only",
        ),
    ]
    for words, problem in cases:
        assert main(["page", *words, "--what-if", "off"]) == 1
        assert problem in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["header.gguf"]

"""Every record in benchmarks/results/ has the form that benchmarks/record.py describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record
from benchmarks.record import NOT_RECORDED, problems, row
from pyggml.bench import peers, runs

FILES = sorted(record.RESULTS.rglob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(record.RESULTS)))
def test_a_committed_record_fits(path: Path) -> None:
    result = json.loads(path.read_text())
    assert list(problems(result)) == [] and result["rows"]
    assert record.read(path) == result


def test_every_folder_has_records() -> None:
    assert {path.parent.name for path in FILES} >= {"results", "cpu", "h100", "h200", "speeds"}


def good() -> dict[str, Any]:
    return record.new("python x.py", rows=[row("a", "t/s", 2.0, [1.0, 2.0, 3.0]), row("b", "s", 1)])


def test_a_new_record_fits(tmp_path: Path) -> None:
    result = good()
    assert list(problems(result)) == []
    assert [r["better"] for r in result["rows"]] == ["more", "less"]
    assert result["rows"][1]["samples"] == [1] and result["machine"]["cores"] > 0
    record.write(tmp_path / "new" / "x.json", result)
    assert record.read(tmp_path / "new" / "x.json") == result


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"schema": 1}, "schema 1 is not 2"),
        ({"date": None}, "date is None"),
        ({"machine": "one H200"}, "machine is 'one H200'"),
        ({"rows": NOT_RECORDED}, "rows is 'not recorded'"),
        ({"threads": 2}, "threads, which belong into about"),
        ({"rows": [1]}, "row 0 is not an object"),
        ({"rows": [row("a", "s", 1) | {"value": "1"}]}, "value is '1'"),
        ({"rows": [row("a", "s", 1) | {"value": True}]}, "value is True"),
        ({"rows": [row("a", "s", 1, better="fast")]}, "better is 'fast'"),
        ({"rows": [row("a", "s", 1, bar="2")]}, "bar is '2'"),
        ({"rows": [row("a", "s", 1), row("a", "s", 2)]}, "another row has this name"),
        ({"rows": [row("a", "s", 1, [])]}, "samples are not numbers"),
        ({"rows": [row("a", "s", 1, ["1"])]}, "samples are not numbers"),
        ({"rows": [row("a", "s", 1, {"x": 1})]}, "samples are not numbers"),
    ],
)
def test_what_does_not_fit_is_not_written(
    change: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"x\.json: ") as error:
        record.write(tmp_path / "x.json", good() | change)
    assert problem in str(error.value) and not list(tmp_path.iterdir())


def test_a_field_that_is_missing_is_a_problem() -> None:
    for name in record.FIELDS:
        assert f"the record has no {name}" in problems(
            {k: v for k, v in good().items() if k != name}
        )
    for name in record.ROW_FIELDS:
        rows = [{k: v for k, v in row("a", "s", 1).items() if k != name}]
        assert any(f"has no {name}" in text for text in problems(good() | {"rows": rows}))


def test_what_was_not_recorded_may_be_absent() -> None:
    fields = ("date", "command", "commit", "kernels", "machine", "versions", "clocks")
    rows = [row("a", "t/s", 1.0, NOT_RECORDED)]
    assert not list(problems(good() | dict.fromkeys(fields, NOT_RECORDED) | {"rows": rows}))


def test_records_of_speeds_are_peers() -> None:
    lines = {peer.label: peer.speeds for peer in peers.read(record.RESULTS / "peers.json")}
    assert len(lines) == 10
    assert lines["ik_llama.cpp, standard"][runs.Test(n_prompt=2048)] == 8499
    [path] = (record.RESULTS / "speeds").glob("h100-2026-11-26.json")
    rows = record.read(path)["rows"]
    speeds = [speed for peer in peers.read(path) for speed in peer.speeds.values()]
    assert sorted(speeds) == sorted(row["value"] for row in rows)

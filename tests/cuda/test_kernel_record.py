"""The GPU's record is said to be stale as soon as a kernel changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import kernel_record


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    """A folder of kernels, and one of records: the newest is of the kernels, an older is not."""
    kernels, records = tmp_path / "kernels", tmp_path / "records"
    for folder, files in ((kernels, ("a.cu", "b.cuh")), (records, ())):
        folder.mkdir()
        for name in files:
            (folder / name).write_text(name)
    newest = kernel_record.fingerprint(kernels)
    for name, told in (("h100/2026-01-02", newest), ("h200/2025-12-31", "0")):
        path = records / f"{name}.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"kernels": told}))
    monkeypatch.setattr(kernel_record.fingerprint, "__defaults__", (kernels,))
    monkeypatch.setattr(kernel_record.newest, "__defaults__", (records,))
    return kernels, records


def said(capsys: pytest.CaptureFixture[str]) -> str:
    assert kernel_record.main() == 0  # a warning, no failure
    return capsys.readouterr().out


def test_a_record_of_these_kernels(
    places: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (places[0] / "notes.txt").write_text("no kernel")
    assert said(capsys) == "the newest record of the GPU is of these kernels\n"


@pytest.mark.parametrize("name", ["a.cu", "b.cuh", "c.cu"])
def test_a_record_of_other_kernels(
    places: tuple[Path, Path], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (places[0] / name).write_text("changed")
    text = said(capsys)
    assert text.startswith("WARNING: 2026-01-02.json was made from kernels ")
    assert kernel_record.fingerprint(places[0]) in text and "benchmarks/gpu.py" in text


def test_no_record(places: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for record in places[1].glob("*/*.json"):
        record.unlink()
    assert said(capsys).startswith("WARNING: there is no record")

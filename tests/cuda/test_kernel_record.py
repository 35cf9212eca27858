"""A warning says that the record of the GPU is stale if a kernel differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import kernel_record


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    """Folders of kernels and of records; only the newest record was made from these kernels."""
    kernels, records = tmp_path / "kernels", tmp_path / "records"
    for folder, files in ((kernels, ("a.cu", "b.cuh")), (records, ())):
        folder.mkdir()
        for name in files:
            (folder / name).write_text(name)
    newest = kernel_record.fingerprint(kernels)
    for name, kernels_hash in (("h100/2026-01-02", newest), ("h200/2025-12-31", "0")):
        path = records / f"{name}.json"
        path.parent.mkdir()
        command = "python benchmarks/gpu.py"
        path.write_text(json.dumps({"kernels": kernels_hash, "command": command}))
    for name in ("cpu/2026-01-02", "speeds/h100-2026-01-03"):  # of other benchmarks
        path = records / f"{name}.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"kernels": "2", "command": "python benchmarks/cpu.py"}))
    monkeypatch.setattr(kernel_record.fingerprint, "__defaults__", (kernels,))
    monkeypatch.setattr(kernel_record.newest, "__defaults__", (records,))
    return kernels, records


def warning(capsys: pytest.CaptureFixture[str]) -> str:
    assert kernel_record.main() == 0  # it does not fail
    return capsys.readouterr().out


def test_a_record_of_these_kernels(
    places: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (places[0] / "notes.txt").write_text("no kernel")
    assert warning(capsys) == "the newest record of the GPU is of these kernels\n"


@pytest.mark.parametrize("name", ["a.cu", "b.cuh", "c.cu"])
def test_a_record_of_other_kernels(
    places: tuple[Path, Path], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (places[0] / name).write_text("changed")
    text = warning(capsys)
    assert text.startswith("WARNING: 2026-01-02.json was made from kernels ")
    assert kernel_record.fingerprint(places[0]) in text and "benchmarks/gpu.py" in text


def test_no_record(places: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for record in places[1].glob("*/*.json"):
        record.unlink()
    assert warning(capsys).startswith("WARNING: there is no record")

"""--json: one object on stdout, with the keys in docs/cli.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pyggml import backends
from pyggml.cli import COMMANDS, main, parser_of
from tools import cli_tables

#: The rows of the table in docs/cli.md, and command lines that print these keys.
LINES = {
    "info": ["info FILE --json"],
    "plan": ["plan -m FILE -c 64 --json"],
    "graph": ["graph -m FILE --json", "graph -m FILE --backend null,numpy -ot exps=numpy --json"],
    "synth": ["synth new.gguf --preset tiny --json"],
    "quantize": ["quantize FILE q8.gguf q8_0 --allow-requantize --json"],
    "logits": ["logits -m FILE --tokens 1,2,3 -o out.npy --json"],
    "perplexity": ["perplexity -m FILE -f text.txt -c 32 --chunks 2 --json"],
    "parity": [
        "parity -b numpy -o relu(f32[3]) --json",
        "parity -b numpy --mode support -o relu --quick --json",
        "parity -b numpy --mode fuzz --cases 3 --seed 1 --json",
        "parity -b numpy --case relu(f32[3]) --json",
    ],
    "parity --mode list": ["parity --mode list -o relu --quick --json"],
    "parity -m": ["parity -m FILE -c 24 -ub 5 --json"],
    "diff": ["diff -m FILE --against DUMP.npz --tokens 1,2,3 --json"],
    "doctor": ["doctor --json"],
}
KEYS = {"doctor": {"python", *backends.available()}}


def documented() -> dict[str, set[str]]:
    """The keys of each row of the table."""
    section = re.search(
        r"^## JSON for scripts\n(.*?)^## ", cli_tables.PAGE.read_text(), re.M | re.S
    )
    assert section is not None
    rows = re.findall(r"^\| `(.*?)` \| (.*) \|$", section[1], re.M)
    keys = {name: re.sub(r" \(.*?\)", "", text) for name, text in rows}
    return {name: set(re.findall(r"`(\w+)`", text)) for name, text in keys.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("json")
    assert main(["synth", str(path / "FILE"), "--preset", "tiny"]) == 0
    (path / "text.txt").write_text("a text of some length\n" * 20)
    dump = ["--dump", str(path / "DUMP.npz"), "--tokens", "1,2,3"]
    assert main(["diff", "-m", str(path / "FILE"), *dump]) == 0
    return path


@pytest.mark.parametrize(("row", "line"), [(r, x) for r, lines in LINES.items() for x in lines])
def test_one_object_with_the_documented_keys(
    row: str,
    line: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if row == "perplexity":
        pytest.importorskip("tokenizers", reason="needs the extra 'text'")
    monkeypatch.chdir(folder)
    assert main(line.split()) == 0 or row == "doctor"
    report = json.loads(capsys.readouterr().out)
    assert set(report) == KEYS.get(row, documented()[row])


def test_the_table_has_every_command_with_json() -> None:
    options = {
        name: {o for a in parser_of(name)._actions for o in a.option_strings} for name in COMMANDS
    }
    have = {name for name, names in options.items() if "--json" in names}
    assert have == {row.split()[0] for row in documented()}
    assert set(LINES) <= set(documented())


def report_of(words: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    assert main(words.replace("FILE", str(folder / "FILE")).split()) == 0
    return json.loads(capsys.readouterr().out)


def test_the_steps_of_a_graph(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "graph -m FILE --backend null,numpy -ot exps=numpy"
    report = report_of(f"{words} --json", folder, capsys)
    assert main(words.replace("FILE", str(folder / "FILE")).split()) == 0
    text = capsys.readouterr().out
    splits = report["splits"]
    copies = sum(len(split["copies"]) for split in splits)
    steps = sum(len(split["steps"]) for split in splits)
    assert f"{len(splits)} splits, {steps} steps, {copies} copies of" in text
    assert {split["place"] for split in splits} == {"null:0", "numpy"}
    assert any(split["waits"] for split in splits) and not splits[0]["waits"]
    first = splits[0]["steps"][0]
    assert first["bytes"] > 0 and first["ne"][0] > 0 and first["type"] == "f32"
    assert first["offset"] % 4 == 0 and ".py:" in first["line"] and first["op"] in first["fused"]
    assert [row["device"] for row in report["devices"]] == ["null:0", "numpy"]
    assert all(row["total"] >= row["compute"] > 0 for row in report["devices"])


def test_perplexity_prints_the_same_numbers(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tokenizers", reason="needs the extra 'text'")
    words = f"perplexity -m FILE -f {folder / 'text.txt'} -c 32 --chunks 2"
    report = report_of(f"{words} --json", folder, capsys)
    assert main(words.replace("FILE", str(folder / "FILE")).split()) == 0
    text = capsys.readouterr().out
    first, last = report["chunks"]
    assert last == report["perplexity"]
    assert text.startswith(f"[1]{first:.4f},[2]{last:.4f},")
    assert text.endswith(f"PPL = {last:.4f} +/- {report['error']:.5f}\n")


def test_the_failures_of_a_fuzz_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    kernel = tmp_path / "wrong.py"
    kernel.write_text("def wrong(x, /):\n    return x + 1\n")
    words = f"parity -b numpy --mode fuzz -o relu --cases 3 --seed 1 --kernel {kernel}:wrong --json"
    assert main(words.split()) == 1
    (backend,) = json.loads(capsys.readouterr().out)["backends"]
    assert backend["backend"] == "numpy" and backend["failed"] and backend["failures"]
    assert set(backend["ops"]) == {"relu"} and sum(backend["kinds"].values()) == backend["failed"]

"""docs/cli.md: its examples run, and its tables match the parsers."""

from __future__ import annotations

import io
import re
import shlex
import warnings
from pathlib import Path

import pytest

from pyggml.cli import COMMANDS, main, parser_of
from tests import dot_syntax
from tools import cli_tables

TEXT = cli_tables.PAGE.read_text()


def examples() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_the_tables_match_the_parsers() -> None:
    """If this fails, run python tools/cli_tables.py"""
    assert cli_tables.page(TEXT) == TEXT


def test_every_command_has_a_section_an_example_and_a_table() -> None:
    for name in COMMANDS:
        section = re.search(rf"^## pyggml {name}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
        assert section and f"<!-- options: {name} -->" in section[1]
        assert f"\npyggml {name}" in section[1]
        for action in parser_of(name)._actions[1:]:
            for option in action.option_strings:
                assert f"`{option}`" in section[1], (name, option)


def test_every_option_has_a_help_text() -> None:
    for name in COMMANDS:
        for action in parser_of(name)._actions:
            assert action.help and len(action.help.split()) > 2, (name, action.dest)


def test_a_new_option_makes_the_page_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_new_option(name: str) -> object:
        parser = parser_of(name)
        parser.add_argument("--brand-new", help="a new option")
        return parser

    monkeypatch.setattr(cli_tables, "parser_of", with_new_option)
    assert cli_tables.page(TEXT) != TEXT and "`--brand-new`" in cli_tables.page(TEXT)


def test_the_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pyggml.parity.running.MEASURED", 0.01)
    Path("text.txt").write_text("a text with more than 128 bytes\n" * 8)
    pytest.importorskip("tokenizers", reason="needs the extra 'text'")
    assert len(examples()) >= 15
    for line in examples():
        command, *words = shlex.split(line)
        assert command == "pyggml"
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\nhow are you?\n"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            status = main(words)
        out, err = capsys.readouterr()
        doctor = words[0] == "doctor"  # its status depends on the machine
        assert (status == 0 or doctor) and out and "warning" not in err, (line, err)
    assert dot_syntax.read(Path("plan.dot").read_text()).boxes
    assert Path("k_pe.py").exists() and Path("k_pe.npz").exists()

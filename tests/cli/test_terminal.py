"""What a terminal sees: colours, errors and their tracebacks."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pyggml.cli import doctor, info, main
from pyggml.cli.terminal import coloured, print_json, verdict
from pyggml.errors import DTypeError

Streams = pytest.CaptureFixture[str]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminals_for(monkeypatch: pytest.MonkeyPatch) -> tuple[Terminal, Terminal]:
    """Stdout and stderr. Not a fixture: pytest replaces both again before the test."""
    out, err = Terminal(), Terminal()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return out, err


def fails_with(error: BaseException) -> Callable[[object], int]:
    def run(_: object) -> int:
        raise error

    return run


# -- colours ------------------------------------------------------------------------------------


COMMANDS = (
    ["doctor"],
    ["parity", "-b", "numpy", "-o", "relu(f32[3])"],
    ["parity", "-b", "numpy", "--case", "relu(f32[3])"],
    ["info", "missing"],
    ["info"],
    ["synth", "x", "--type", "q9"],
)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_colours_on_a_terminal_only(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = terminals = terminals_for(monkeypatch)

    def text() -> str:
        for stream in terminals:
            stream.seek(0)
            stream.truncate()
        main(words)
        return out.getvalue() + err.getvalue()

    coloured_text = text()
    assert re.search(r"\x1b\[[0-9;]+m(\+|OK|error:)\x1b\[0m", coloured_text)
    plain = re.sub(r"\x1b\[[0-9;]+m", "", coloured_text)
    with monkeypatch.context() as context:
        context.setenv("NO_COLOR", "1")
        assert text() == plain
    with monkeypatch.context() as context:
        context.setenv("TERM", "dumb")
        assert text() == plain
    monkeypatch.setattr(Terminal, "isatty", lambda _: False)
    assert text() == plain


def test_an_empty_no_color_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    terminals_for(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "")
    assert coloured("x", "bad") == "\x1b[1;31mx\x1b[0m"


def test_marks_and_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    terminals_for(monkeypatch)
    assert verdict(True) == "\x1b[32mOK\x1b[0m" and verdict(False) == "\x1b[1;31mFAIL\x1b[0m"
    assert {coloured(*mark)[-5] for mark in doctor.MARKS.values()} == {"+", "-", "!"}


def test_json_has_no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = terminals_for(monkeypatch)
    main(["parity", "-b", "numpy", "-o", "relu(f32[3])", "--json"])
    main(["doctor", "--json"])
    assert out.getvalue() and "\x1b" not in out.getvalue()


# -- JSON ---------------------------------------------------------------------------------------


def test_infinities_are_text_in_json(capsys: Streams) -> None:
    print_json({"a": [float("inf"), 1.5, (float("nan"), None)]})
    assert capsys.readouterr().out == '{"a": ["inf", 1.5, ["nan", null]]}\n'


# -- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--debug", "info", "x"], ["info", "x", "--debug"]])
def test_debug_shows_the_traceback(
    words: list[str], capsys: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, "run", fails_with(DTypeError("oh")))
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("Traceback (most recent call last):")
    assert "test_terminal.py" in err and err.endswith("pyggml: error: oh\n")


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("", False)])
def test_the_variable(
    value: str, shown: bool, capsys: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYGGML_DEBUG", value)
    assert main(["info", "missing"]) == 1
    err = capsys.readouterr().err
    assert ("Traceback" in err) == shown
    assert err.endswith("pyggml: error: missing: No such file or directory\n")


def test_wrong_usage_has_a_traceback_too(capsys: Streams) -> None:
    assert main(["parity", "-c", "5", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_one_line(capsys: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyggml.gguf.open", lambda *_, **__: 1 // 0)
    assert main(["info", "x"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("pyggml: error: ZeroDivisionError: ") and err.count("\n") == 1
    assert re.search(r"at pyggml/cli/info\.py:\d+; this is a bug in pyggml", err)
    assert "--debug" in err


def test_too_little_memory_is_not_a_bug(capsys: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "run", fails_with(MemoryError("Unable to allocate 3 TiB")))
    assert main(["info", "x"]) == 1
    expected = "pyggml: error: the host has too little memory: Unable to allocate 3 TiB\n"
    assert capsys.readouterr().err == expected


def test_an_error_in_a_chat_shows_its_traceback(
    tmp_path: Path, capsys: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers", reason="needs the extra 'text'")
    path = str(tmp_path / "tiny.gguf")
    assert main(["synth", path, "--preset", "tiny"]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("a message of many tokens\n"))
    assert main(["chat", "-m", path, "-c", "8", "--debug"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "pyggml: error: " in err.splitlines()[-1]

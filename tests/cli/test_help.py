"""`pyggml COMMAND --help`: its examples parse and run, and wrong usage is short."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from pyggml.cli import COMMANDS, examples_of, main, parser_of
from pyggml.cli.parser import command_in, documented, epilog

#: Examples with a file or a time that is too large for a test.
LARGE = ("--preset deepseek-v2-lite", "--mode fuzz")
#: Commands whose examples run on the files of `folder`. Others have tests with files of their own.
RUN = ("chat", "completion", "doctor", "graph", "info", "logits", "parity", "perplexity", "plan",
       "quantize", "run", "synth")  # fmt: skip
EXAMPLES = [(name, example) for name in COMMANDS for example in examples_of(name)]


def words_of(example: str) -> list[str]:
    """The words after `pyggml`, without a shell's pipes and redirections."""
    command = command_in(example).split(" | ")[-1].split(" > ")[0]
    first, *words = shlex.split(command)
    assert first == "pyggml"
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the examples name."""
    path = tmp_path_factory.mktemp("examples")
    assert main(["synth", str(path / "FILE"), "--preset", "tiny"]) == 0
    f16 = ["--preset", "tiny", "--type", "f16"]
    assert main(["synth", str(path / "model-f16.gguf"), *f16]) == 0
    (path / "wiki.test.raw").write_text("a text of some length\n" * 60)
    return path


def test_every_command_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert len(examples_of(name)) >= 2, name
        assert main([name, "--help"]) == 0
        out = capsys.readouterr().out
        description, _, end = out.partition("\nexamples:\n")
        assert all(command_in(example) in end for example in examples_of(name))
        assert f"pyggml {name} -" not in description and end.count("\n") == len(examples_of(name))


@pytest.mark.parametrize(("name", "example"), EXAMPLES, ids=[e for _, e in EXAMPLES])
def test_an_example_parses(name: str, example: str) -> None:
    command, *words = words_of(example)
    assert command == name
    parser_of(name).parse_args(words)


RUNNING = [
    (name, example)
    for name, example in EXAMPLES
    if name in RUN and not any(part in example for part in LARGE)
]


@pytest.mark.parametrize(("name", "example"), RUNNING, ids=[example for _, example in RUNNING])
def test_an_example_runs(
    name: str,
    example: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name in ("chat", "run", "perplexity", "logits"):
        pytest.importorskip("tokenizers", reason="needs the extra 'text'")
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    words = words_of(example)
    if name == "perplexity" and "-c" not in words:
        words += ["-c", "64"]  # the text is short
    if name in ("chat", "run"):
        words += ["-n", "2"]
    status = main(words)
    out, err = capsys.readouterr()
    assert out and "error" not in err and (status == 0 or name == "doctor"), err


def test_examples_are_lines_of_the_docstring() -> None:
    module = ModuleType("pyggml.cli.fly")
    module.__doc__ = """Fly a kite.

  pyggml fly --high
echo now | pyggml fly   on a pipe

`pyggml fly` needs wind. As
pyggml flies, it sings.
"""
    description, examples = documented(module)
    assert examples == ["pyggml fly --high", "echo now | pyggml fly   on a pipe"]
    assert description == "Fly a kite.\n\n`pyggml fly` needs wind. As\npyggml flies, it sings."
    assert epilog(examples).splitlines() == [
        "examples:",
        "  pyggml fly --high",
        "  echo now | pyggml fly   # on a pipe",
    ]


# -- wrong usage --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "error", "usage"),
    [
        ("run -m", "run: error: argument -m/--model: expected one argument",
         "run -p TEXT -m FILE [OPTIONS]"),
        ("logits -m x -o y",
         "logits: error: one of the arguments -p --tokens is required",
         "logits (-p TEXT | --tokens N,N,..) -o OUT -m FILE [OPTIONS]"),
        ("info x --jsn", "info: error: unrecognized arguments: --jsn; did you mean --json?",
         "info FILE [OPTIONS]"),
        ("run -m x -p y --ngl 3",
         "run: error: unrecognized arguments: --ngl 3; did you mean -ngl?",
         "run -p TEXT -m FILE [OPTIONS]"),
        ("doctor x", "doctor: error: unrecognized arguments: x", "doctor [OPTIONS]"),
    ],
)  # fmt: skip
def test_wrong_usage_is_two_lines(
    words: str, error: str, usage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"usage: pyggml {usage} (see --help)",
        f"pyggml {error}",
    ]


def test_the_closest_choice(capsys: pytest.CaptureFixture[str]) -> None:
    for words, close in (
        ("inf", "info"),
        ("synth x --preset tinny", "tiny"),
        ("parity --mode tes", "test"),
    ):
        assert main(words.split()) == 2
        err = capsys.readouterr().err
        assert re.search(rf"\); did you mean {close}\?\n", err), err
    assert main(["frobnicate"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def test_no_words_show_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert not out and all(name in err for name in COMMANDS)

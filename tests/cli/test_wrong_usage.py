"""Wrong usage of the command line: refused in one line, before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyggml.cli import COMMANDS, fuzz, main, parser_of


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x=f32[8]; y=reluu(x); plan(y)", "no op 'reluu'; did you mean 'relu'?"),
        ("x=f32[8]; y=relu(z); plan(y)", "no name z"),
        ("x=f32[8]; y=relu(x); plan(z)", "no name z"),
        ("x=f32[8]; y=relu(x); plan(y, amd=1)", "no attribute 'amd'"),
        ("x=f32[8]; y=relu(x)", "no plan"),
        ("x=f32[8]; y=chain(x); plan(y)", "expected times=N"),
        ("x=f32[8]; z=f32[3]; y=add(x, z); plan(y)", "does not repeat"),
        ("garbage", "'garbage' is not a case"),
        ("reluu(f32[8])", "no op 'reluu'; did you mean 'relu'?"),
        ("state(f32[8])", "no op 'state'"),
        ("relu(f32[8]?)", "is not a source"),
        ("add(f32[8], f32[3])", "does not repeat"),
    ],
)
def test_a_wrong_case_is_an_error_before_any_backend_runs(
    text: str, why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "Pool", None)
    assert main(["parity", "--case", text]) == 2
    out, err = capsys.readouterr()
    assert not out and why in err and err.startswith("pyggml: error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("graph -m x -ctk q9", "unknown type 'q9'"),
        ("graph -m x --backend cudaa", "no backend 'cudaa'"),
        ("graph -m x -ot foo", "expected REGEX=PLACE"),
        ("graph -m x -ot foo=nowhere", "no backend 'nowhere'"),
        ("graph -m x -ot (=numpy", "not a regular expression"),
        ("graph -m x -amb -1", "must be a number above 0, got '-1'"),
        ("graph -m x -amb many", "must be a number above 0, got 'many'"),
        ("graph -m x -c 0", "from 1 to 2,147,483,647, got '0'"),
        ("graph -m x -c 9999999999", "from 1 to 2,147,483,647, got '9999999999'"),
        ("run -m x -p y -c 9999999999", "from 1 to 2,147,483,647"),
        ("run -m x -p y --temp nan", "temperature=nan"),
        ("graph -m x --seed -1", "of at least 0, got '-1'"),
        ("parity -b cudaa", "no backend 'cudaa'"),
        ("parity -b null:0:1GiB", "description of a device"),
        ("parity -m x --a abacus", "no backend 'abacus'"),
        ("parity -p (", "not a regular expression"),
        ("parity --graphs", "--graphs needs --mode fuzz"),
        ("parity --mode fuzz --seconds 0", "must be a number above 0, got '0'"),
        ("parity --mode fuzz --graphs -o relu", "without -o and --kernel"),
        ("parity --markdown", "--markdown needs --mode support"),
        ("parity -m x -o relu", "does not work with a model"),
        ("parity -c 5", "needs a model"),
        ("parity -o nothing", "no cases of nothing"),
        ("parity -o relu --kernel nofile.py:f", "there is no file nofile.py"),
        ("parity --mode fuzz -o relu --kernel nofile.py:f", "there is no file nofile.py"),
        ("parity --case relu(f32[8]) --kernel nofile.py:f", "there is no file nofile.py"),
        ("synth x --layers 0", "from 1 to 10,000, got '0'"),
        ("synth x --layers 10001", "from 1 to 10,000, got '10001'"),
        ("synth x --type q9", "cannot draw random q9 weights; choose from f32, f16, bf16, q4_0"),
    ],
)
def test_wrong_usage_is_status_2_and_prints_nothing_else(
    words: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert not out and why in " ".join(err.split())


SHORT = {
    option
    for name in COMMANDS
    for option in parser_of(name)._option_string_actions
    if not option.startswith("--")
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_short_option_of_another_command_is_no_other_option(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`-ctv x` is never `-c tv`, and `-n 5` never `-ngl 5`: every command knows a short option or
    says that it does not."""
    parser = parser_of(name)
    own = parser._option_string_actions
    for part in (*parser._actions, *parser._mutually_exclusive_groups):
        part.required = False
    for option in sorted({*SHORT, "-ctx", "-mm", "-x"} - set(own)):
        for word in (option, f"{option}=x"):
            values, extra = parser.parse_known_args([word])
            assert extra == [word], (word, values)
    capsys.readouterr()


def test_a_number_may_follow_a_short_option_without_a_space() -> None:
    args = parser_of("graph").parse_args(["-m", "x", "-c64", "-ub=8", "-ctv=q8_0", "--backen=cpu"])
    assert (args.c, args.ub, args.ctv, args.backend) == (64, 8, "q8_0", ["cpu"])


def test_an_unknown_short_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "-m", "x", "-ctx", "5"]) == 2
    assert "unrecognized arguments: -ctx 5; did you mean -ct" in capsys.readouterr().err


def test_the_name_of_a_file_is_in_its_error_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "empty.gguf"
    path.touch()
    assert main(["info", str(path)]) == 1
    assert capsys.readouterr().err == f"pyggml: error: {path}: the file is empty\n"

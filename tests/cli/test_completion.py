"""`pyggml completion`: the scripts complete command lines in their shells."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pyggml import backends, cli
from pyggml.cli import COMMANDS, main, parser_of
from pyggml.cli.completion import commands, general
from pyggml.cli.shells import WRITERS, Argument, Command
from pyggml.models.presets import PRESETS

Complete = Callable[..., list[str]]


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def output_of(words: Sequence[str], folder: Path) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


@pytest.fixture
def bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Complete:
    """The completions of the last of some words."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    (tmp_path / "complete.bash").write_text(script("bash", capsys))

    def complete(*words: str) -> list[str]:
        quoted = " ".join(f"'{word}'" for word in ("pyggml", *words))
        lines = [
            "source ./complete.bash",
            f"COMP_WORDS=({quoted})",
            f"COMP_CWORD={len(words)}",
            "_pyggml",
            'printf "%s\\n" "${COMPREPLY[@]}"',
            "complete -p pyggml >&2",
        ]
        run = ["bash", "--norc", "-c", "\n".join(lines)]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stderr == "complete -F _pyggml pyggml\n"
        return done.stdout.split("\n")[:-1] if done.stdout.strip() else []

    return complete


def test_bash_completes_commands_and_general_options(bash: Complete) -> None:
    assert bash("") == list(COMMANDS)
    assert bash("p") == [name for name in COMMANDS if name.startswith("p")]
    assert set(bash("-")) == {"-h", "--help", "--version", "--debug"}
    assert bash("--debug", "synt") == ["synth"]


@pytest.mark.parametrize("name", COMMANDS)
def test_bash_completes_every_option(name: str, bash: Complete) -> None:
    options = {option for action in parser_of(name)._actions for option in action.option_strings}
    assert set(bash(name, "-")) == options | {"--debug", "--version"}


def test_bash_completes_values(bash: Complete) -> None:
    assert bash("synth", "--preset", "") == list(PRESETS)
    assert bash("synth", "--preset", "tiny-l") == ["tiny-llama"]
    assert bash("synth", "--preset", "=", "tiny-l") == ["tiny-llama"]
    assert bash("synth", "--preset", "=") == list(PRESETS)
    assert bash("run", "-fa", "") == ["on", "off"]
    assert bash("run", "--backend", "") == list(backends.available())
    assert bash("run", "--backend", "cuda,nu") == ["cuda,numpy", "cuda,null"]
    assert bash("run", "-ctk", "q8") == ["q8_0"]
    assert bash("parity", "-o", "relu,soft_max_") == ["relu,soft_max_ext"]
    assert bash("run", "-n", "") == [] and bash("run", "-p", "") == []
    assert bash("completion", "") == list(WRITERS)


def test_bash_completes_files(bash: Complete, tmp_path: Path) -> None:
    names = ["a model.gguf", "b.gguf"]
    for name in names:
        (tmp_path / name).touch()
    for words in (["run", "-m"], ["info"], ["info", "--json"], ["perplexity", "-f"], ["synth"],
                  ["synth", "--seed", "3"], ["quantize", "b.gguf"], ["logits", "-o"],
                  ["parity", "--model", "="]):  # fmt: skip
        assert set(names) <= set(bash(*words, "")), words
    assert bash("run", "-m", "a") == ["a model.gguf"]
    assert bash("quantize", "in", "out", "q8") == ["q8_0"]
    assert bash("quantize", "--allow-requantize", "in", "out", "q8") == ["q8_0"]
    assert bash("info", "b.gguf", "") == []


def test_fish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("fish") is None:
        pytest.skip("needs fish")
    (tmp_path / "complete.fish").write_text(script("fish", capsys))
    (tmp_path / "b.gguf").touch()

    def complete(line: str) -> list[str]:
        text = f"source complete.fish; complete -C 'pyggml {line}'"
        out = output_of(["fish", "--no-config", "-c", text], tmp_path)
        return [line.split("\t")[0] for line in out.splitlines()]

    assert complete("") == sorted(COMMANDS)
    assert complete("synth --preset tiny-l") == ["tiny-llama"]
    assert complete("run -m b") == ["b.gguf"] and complete("info b") == ["b.gguf"]
    assert complete("run -n ") == []
    assert {"--temp", "--top-k", "--top-p"} <= set(complete("run --t"))
    assert complete("run -ml") == ["-mla"]
    assert complete("run -ctk q8") == ["q8_0"]


def test_zsh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("needs zsh")
    (tmp_path / "_pyggml").write_text(script("zsh", capsys))
    (tmp_path / "b.gguf").touch()
    (tmp_path / "run.zsh").write_text(_ZSH)

    def complete(line: str) -> set[str]:
        out = output_of(["zsh", "-f", "run.zsh", f"pyggml {line}"], tmp_path)
        return set(out.split())

    assert complete("") == set(COMMANDS)
    assert complete("synth --preset tiny-l") == {"tiny-llama"}
    assert complete("run -m b") == {"b.gguf"} and complete("info b") == {"b.gguf"}
    assert complete("run --top") == {"--top-k", "--top-p"}
    assert complete("run --backend cuda,nu") == {"numpy", "null"}
    assert complete("--debug quantize in out q8") == {"q8_0"}


#: Presses Tab in an interactive shell. Its `compadd` also writes the matches to the file `hits`.
_ZSH = r"""
zmodload zsh/zpty
zpty shell zsh -f -i
send() { zpty -w shell $1; zpty -w shell 'print -r -- rea""dy'; zpty -r shell text '*ready*' }
send 'stty -echo; PS1= PS2= HISTFILE='
send 'fpath=($PWD $fpath); autoload -U compinit; compinit -u -d $PWD/dump; : > hits'
send 'compadd() {
    typeset -a hits
    if [[ " $* " != *" -"[OAD]" "* ]]; then
        builtin compadd -O hits "$@"
        print -rl -- $hits >> $PWD/hits
    fi
    builtin compadd "$@"
}'
send 'press-tab() { zle complete-word; print -r -- do""ne; }'
send 'zle -N press-tab; bindkey "^I" press-tab'
zpty -n -w shell "$1"$'\t'
zpty -r shell text '*done*'
zpty -d shell
cat hits
"""


def test_words_that_a_shell_could_expand_are_quoted() -> None:
    odd = Argument(("--odd",), "don't [expand] $HOME: `x` \\ ", "X:Y", ("a", "b"))
    for shell, write in WRITERS.items():
        text = write([Command("odd", "it's $odd", (odd,))], [])
        if shutil.which(shell):
            subprocess.run([shell, "-n"], input=text, text=True, check=True)


def test_every_argument_has_a_description() -> None:
    for command in commands():
        for argument in command.arguments:
            assert argument.help and "%(" not in argument.help
    assert [option.names[-1] for option in general()] == ["--help", "--version", "--debug"]
    assert cli.command_line([]).prog == "pyggml"

"""Print a script that completes commands, options, values and files in your shell.

pyggml completion bash > ~/.local/share/bash-completion/completions/pyggml
pyggml completion zsh > ~/.zfunc/_pyggml   ~/.zfunc must be in fpath
pyggml completion fish > ~/.config/fish/completions/pyggml.fish

Shells that start afterwards use the script. Print it again when you update pyggml. It needs Bash 4.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyggml import backends, cli
from pyggml.cli.shells import WRITERS, Argument, Command

#: Options of other classes collect several values.
_ONCE = (argparse._StoreAction, argparse._StoreConstAction, argparse._HelpAction,
         argparse._VersionAction)  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=tuple(WRITERS), help="the shell to write a script for")


def run(args: argparse.Namespace) -> int:
    print(WRITERS[args.shell](commands(), general()), end="")
    return 0


def commands() -> list[Command]:
    """All commands as their parsers describe them."""
    return [
        Command(name, summary, tuple(_arguments(cli.parser_of(name)._actions)))
        for name, summary in cli.COMMANDS.items()
    ]


def general() -> list[Argument]:
    """The options before a command."""
    actions = cli.command_line([])._actions
    return list(_arguments([action for action in actions if action.option_strings]))


def _arguments(actions: Sequence[argparse.Action]) -> Iterator[Argument]:
    for action in actions:
        value = action.metavar if isinstance(action.metavar, str) else action.dest
        yield Argument(
            names=tuple(action.option_strings),
            help=(action.help or "") % {**vars(action), "prog": "pyggml"},
            value="" if action.nargs == 0 else value,
            words=_words(action, value),
            files=_is_file(action, value),
            optional=action.nargs == "?",
            repeated=not isinstance(action, _ONCE),
        )


def _words(action: argparse.Action, value: str) -> tuple[str, ...]:
    """What the value can be: the choices, or what its name says."""
    if action.choices is not None:
        return tuple(map(str, action.choices))
    name = value.split(",")[0].rstrip("[")  # TYPE,.. and OP[,OP] are lists
    if name in ("PLACE", "PLACES"):
        return backends.available()
    if name == "TYPE":
        from pyggml.gguf.synth import DRAWN

        return tuple(DRAWN)
    if name == "OP":
        from pyggml.parity.oracle import ORACLE

        return tuple(sorted(ORACLE))
    return ()


def _is_file(action: argparse.Action, value: str) -> bool:
    """Whether the value is a file: by its type, or by its name, such as FILE.py or OUT."""
    named = re.match(r"(FILE|IN|OUT|DUMP|DIR)\b", value) is not None
    return action.choices is None and (action.type is Path or named)

"""The parser of a command: short errors, and help whose examples come from the docstring."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from pyggml.cli.processes import speaks
from pyggml.cli.terminal import error_head
from pyggml.runtime.mpi import launched

#: Between an example and the words about it.
_GAP = re.compile(r" {3,}")


class Parser(argparse.ArgumentParser):
    """After a wrong option, prints the arguments that are required, and the error as last line."""

    def error(self, message: str) -> NoReturn:
        said = launched() is not None and not speaks()  # by another process of this command
        text = f"{self.brief()}{error_head(self.prog)} {message}{self._hint(message)}\n"
        self.exit(2, None if said else text)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        values, extra = self.parse_known_args(words, namespace)
        command = values.__dict__.pop("parser", self)
        if extra:  # argparse would leave out the name of the command
            command.error(f"unrecognized arguments: {' '.join(extra)}")
        return values

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """The options that a word which is none itself may mean.

        Only long options can be shortened, and only what is no word can follow a short option
        without a space (`-c128`). argparse would take `-ctv q8_0` for `-c tv`, and `-n 5` for
        `-ngl 5`.
        """
        choices: list[Any] = super()._get_option_tuples(option_string)
        if option_string.startswith("--"):
            return choices
        short, rest = option_string[:2], option_string[2:]
        return [choice for choice in choices if choice[1] == short and not rest[:1].isalpha()]

    def brief(self) -> str:
        """The usage without the options that may be left out."""
        groups = [group for group in self._mutually_exclusive_groups if group.required]
        either = [action for group in groups for action in group._group_actions]
        actions = [a for a in self._actions if a.required or a in either]
        formatter = self._get_formatter()
        formatter.add_usage(None, actions, groups)
        usage = formatter.format_help().rstrip()
        if self._subparsers is None:
            usage += " [OPTIONS]"
        return f"{usage} (see --help)\n"

    def _hint(self, message: str) -> str:
        """`; did you mean ..?`, for an option or choice that is almost right."""
        unknown = re.match(r"unrecognized arguments: (-[^\s=]+)", message)
        if unknown:
            options = self._option_string_actions
            return _did_you_mean(unknown[1], {option: option.lstrip("-") for option in options})
        wrong = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message)
        if wrong:
            choices = wrong[2].replace("'", "").split(", ")
            return _did_you_mean(wrong[1], {choice: choice for choice in choices})
        return ""


def _did_you_mean(word: str, known: dict[str, str]) -> str:
    """The known spelling whose text is closest to that of `word`."""
    bare = word.lstrip("-")
    texts = list(known.values())
    near = difflib.get_close_matches(bare, texts, 1) or [t for t in texts if t.startswith(bare)]
    spelling = next((name for name, text in known.items() if near and text == near[0]), "")
    return f"; did you mean {spelling}?" if spelling and spelling != word else ""


def documented(module: Any) -> tuple[str, list[str]]:
    """The docstring of a command's module without its examples, and the examples.

    An example is a line that begins with `pyggml NAME`, or has it after a pipe; words about it may
    follow after three spaces or more.
    """
    name = module.__name__.rpartition(".")[2]
    example = re.compile(rf" *(?:[^`]*\| )?pyggml {name} ")
    text: list[str] = []
    examples: list[str] = []
    for line in inspect.cleandoc(module.__doc__).splitlines():
        (examples if example.match(f"{line} ") else text).append(line.rstrip())
    description = re.sub(r"\n{3,}", "\n\n", "\n".join(text)).strip()
    return description, [line.strip() for line in examples]


def command_in(example: str) -> str:
    """An example without the words about it."""
    return _GAP.split(example)[0]


def epilog(examples: Sequence[str]) -> str:
    """The examples as the end of the help."""
    lines = [_GAP.sub(lambda gap: f"{gap[0]}# ", line, count=1) for line in examples]
    return "\n  ".join(["examples:", *lines])

"""The `pyggml` command. Each subcommand is a module of this package and a row in COMMANDS.

The module has two functions: `configure(parser)` adds the arguments, and `run(args) -> int` returns
the exit status. Its docstring is the command's help; lines that begin with `pyggml NAME` are its
examples. Results go to stdout, progress and errors to stderr. Exit status: 0 done, 1 failed, 2
wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from typing import Any, NoReturn

from pyggml import __version__
from pyggml.cli import processes
from pyggml.cli.options import UsageError
from pyggml.cli.parser import Parser, documented, epilog
from pyggml.cli.progress import clear

COMMANDS = {
    "bench": "measure how fast a model reads prompts and generates tokens",
    "chat": "talk to a model",
    "completion": "print a script that completes command lines in your shell",
    "diff": "compare tensors with those of another engine",
    "doctor": "check what each backend needs on this machine",
    "graph": "show how a model's graph runs: splits, copies, steps and memory",
    "info": "print the keys and tensors of a GGUF file",
    "logits": "write the logits of a text to a NumPy file",
    "page": "write a page about how a model runs, for a browser",
    "parity": "test the ops of a backend against float64",
    "perplexity": "measure how well a model predicts a text",
    "plan": "show the memory that a model needs, or what fits in given devices",
    "quantize": "convert the weights of a GGUF file to another type",
    "run": "continue a text, or answer a message",
    "sweep": "measure speed and memory as the cache fills",
    "synth": "write a GGUF file with random weights",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (by default sys.argv) and return the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    if argv is None:
        signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may not be valid text
    debug = os.environ.get("PYGGML_DEBUG") == "1"
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            processes.begin()
            parser = command_line(words)
            if not words:
                parser.print_help(sys.stderr)
                return 2
            args = parser.parse_args(words)
            debug |= args.debug
            status = processes.start(args, words)
            print(end="", flush=True)  # raises here if stdout cannot be written
        except SystemExit as stop:  # --help, wrong usage, SIGTERM
            status = int(stop.code or 0)
            return processes.failed(stop, status, debug=debug) if status else 0
        except KeyboardInterrupt as stop:
            return processes.failed(stop, 130, debug=debug)
        except BrokenPipeError as error:  # for example `pyggml info | head`
            return processes.failed(error, 1, debug=debug)
        except UsageError as error:
            return processes.failed(error, 2, debug=debug)
        except Exception as error:
            return processes.failed(error, 1, debug=debug)
    return status


def command_line(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of this command line. Of the commands, only those in `words` have arguments."""
    top = Parser("pyggml", description="ggml-style compute graphs in Python")
    top.epilog = "`pyggml COMMAND --help` shows the options and examples of a command."
    top.add_argument("--version", action="version", version=f"pyggml {__version__}")
    _add_debug(top, False)
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name in words:  # import only the module of the requested command
            _configure(command, name)
            _add_debug(command, argparse.SUPPRESS)  # or it would undo --debug before the command
            command.set_defaults(parser=command)
    return top


def _add_debug(parser: argparse.ArgumentParser, default: object) -> None:
    parser.add_argument(
        "--debug", action="store_true", default=default, help="show the traceback of an error"
    )


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of one command; tools/cli_tables.py writes docs/cli.md from it.

    It lacks --debug, which every command has.
    """
    command = Parser(f"pyggml {name}")
    _configure(command, name)
    return command


def examples_of(name: str) -> list[str]:
    """The examples in the help of one command."""
    return documented(import_module(f"pyggml.cli.{name}"))[1]


def _configure(command: argparse.ArgumentParser, name: str) -> None:
    module = import_module(f"pyggml.cli.{name}")
    command.description, examples = documented(module)
    command.epilog = epilog(examples)
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.set_defaults(run=module.run)
    module.configure(command)


def _terminate(*_: Any) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)  # unwinds, so that half-written files are removed


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    clear()
    print("pyggml: warning:", message, file=sys.stderr)

"""The `pyggml` command. Each subcommand is a module of this package and a row in COMMANDS.

The module has two functions: `configure(parser)` adds the arguments, and `run(args) -> int` returns
the exit status. Results go to stdout, progress and errors to stderr. Exit status: 0 done, 1 failed,
2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from typing import Any, NoReturn

from pyggml import __version__
from pyggml.cli.options import UsageError
from pyggml.cli.progress import clear
from pyggml.errors import PyggmlError

COMMANDS = {
    "bench": "measure how fast a model reads prompts and generates tokens",
    "chat": "talk to a model",
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
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            args = _parser(words).parse_args(words)
            status: int = args.run(args)
            print(end="", flush=True)  # raises here if stdout cannot be written
        except SystemExit as stop:  # --help, wrong usage, SIGTERM
            clear()
            return int(stop.code or 0)
        except KeyboardInterrupt:
            clear()
            print("pyggml: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # for example `pyggml info | head`
            return 1
        except UsageError as error:
            _print_error(error)
            return 2
        except (PyggmlError, OSError) as error:
            _print_error(error)
            return 1
    return status


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("pyggml", description="ggml-style compute graphs in Python")
    parser.add_argument("--version", action="version", version=f"pyggml {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name in words:  # import only the module of the requested command
            _configure(command, name)
    return parser


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of one command; tools/cli_tables.py writes docs/cli.md from it."""
    command = argparse.ArgumentParser(f"pyggml {name}")
    _configure(command, name)
    return command


def _configure(command: argparse.ArgumentParser, name: str) -> None:
    module = import_module(f"pyggml.cli.{name}")
    command.description = module.__doc__
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.set_defaults(run=module.run)
    module.configure(command)


def _print_error(error: Exception) -> None:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    clear()
    print("pyggml: error:", " ".join(text.split()), file=sys.stderr)


def _terminate(*_: Any) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)  # unwinds, so that half-written files are removed


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    clear()
    print("pyggml: warning:", message, file=sys.stderr)

"""Talk to a model. Ctrl-C ends an answer, Ctrl-D the program.

pyggml chat -m FILE
pyggml chat -m FILE --system 'Answer in one sentence.' --temp 0
echo Hello | pyggml chat -m FILE   each line is a message
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import closing

from pyggml.cli import model_options, options
from pyggml.cli.progress import clear
from pyggml.cli.terminal import print_error
from pyggml.errors import PyggmlError


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-n", type=options.count, metavar="N",
        help="the most tokens of an answer (default: until the context is full)")  # fmt: skip
    add("--system", metavar="TEXT", default="", help="the system message, before the first one")
    model_options.add_text_options(parser)


def run(args: argparse.Namespace) -> int:
    with model_options.open_text(args, chat=True) as text:
        assert text.conversation is not None
        for message in _messages():
            answer = text.conversation.answer(message, **text.settings)
            try:
                with closing(answer):
                    for piece in answer:
                        print(piece, end="", flush=True)
            except KeyboardInterrupt:
                clear()
            except PyggmlError as error:  # for example, the context is full
                print_error(error, debug=args.debug)
                if not sys.stdin.isatty():
                    return 1
            print()
    return 0


def _messages() -> Iterator[str]:
    """What the user types, until Ctrl-D; with a prompt on a terminal."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  # input() can edit lines

        print("Ctrl-C ends an answer, Ctrl-D the program.", file=sys.stderr)
    while True:
        try:
            line = input("> " if terminal else "")
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            if terminal:
                print()
            return
        if line.strip():
            yield line

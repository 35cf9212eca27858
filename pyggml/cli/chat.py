"""Talk to a model. Ctrl-C ends an answer, Ctrl-D the program.

In several processes, rank 0 reads the messages. Ctrl-C and errors end the program, too.

pyggml chat -m FILE
pyggml chat -m FILE --system 'Answer in one sentence.' --temp 0
echo Hello | pyggml chat -m FILE   each line is a message
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import closing

from pyggml.cli import model_options, options
from pyggml.cli.processes import add_nproc
from pyggml.cli.progress import clear
from pyggml.cli.terminal import print_error
from pyggml.errors import PyggmlError
from pyggml.runtime.ranks import PeerError, Ranks


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-n", type=options.count, metavar="N",
        help="the most tokens of an answer (default: until the context is full)")  # fmt: skip
    add("--system", metavar="TEXT", default="", help="the system message, before the first one")
    model_options.add_text_options(parser)
    add_nproc(parser)


def run(args: argparse.Namespace) -> int:
    ranks: Ranks | None = getattr(args, "ranks", None)
    if ranks is not None and ranks.size == 1:
        ranks = None
    with model_options.open_text(args, chat=True) as text:
        assert text.conversation is not None
        for message in _messages() if ranks is None else _shared(ranks):
            answer = text.conversation.answer(message, **text.settings)
            try:
                with closing(answer):
                    for piece in answer:
                        print(piece, end="", flush=True)
            except KeyboardInterrupt:
                if ranks is not None:  # the others go on with the answer
                    raise
                clear()
            except PyggmlError as error:  # for example, the context is full
                if ranks is not None:
                    if isinstance(error, PeerError):
                        raise
                    ranks.agree("error", str(error))  # it is that of all
                    if ranks.rank:
                        return 1
                print_error(error, debug=args.debug)
                if ranks is not None or not sys.stdin.isatty():
                    return 1
            print()
    return 0


def _shared(ranks: Ranks) -> Iterator[str]:
    """What the user types at rank 0, on all ranks."""
    messages = _messages() if ranks.rank == 0 else iter(())
    while True:
        line = next(messages, None)
        text = json.loads(ranks.gather(json.dumps(line))[0])
        if text is None:
            return
        yield text


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

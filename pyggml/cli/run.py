"""Continue a text, or answer one message, and print the result as it comes.

pyggml run -m FILE -p TEXT -n 64
pyggml run -m FILE -p 'What is a tensor?' --chat
pyggml run -m FILE -p TEXT --temp 0   the most probable tokens
pyggml run -m FILE -p TEXT --backend auto -ngl 10 -ot exps=numpy   a part on the GPU
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from pyggml.cli import model_options, options
from pyggml.cli.processes import add_nproc


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-p", metavar="TEXT", required=True, help="the text to continue, or the message")
    add("-n", type=options.count, metavar="N", default=128,
        help="the most tokens to print (default: %(default)s)")  # fmt: skip
    add("--chat", action="store_true", help="use the model's chat template")
    add("--system", metavar="TEXT", default="", help="with --chat: the system message")
    model_options.add_text_options(parser)
    add_nproc(parser)


def run(args: argparse.Namespace) -> int:
    from pyggml.generate.text import continuation

    with model_options.open_text(args, chat=args.chat) as text:
        pieces: Iterator[str]
        if text.conversation is not None:
            pieces = text.conversation.answer(args.p, **text.settings)
        else:
            tokens = text.tokenizer.encode(args.p, parse_special=True)
            pieces = continuation(text.session, text.tokenizer, tokens, **text.settings)
        started = False
        try:
            for piece in pieces:
                started = True
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if started:
                print(file=sys.stderr)  # after the text so far
            raise
        print()
    return 0

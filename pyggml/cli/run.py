"""Continue a text, or answer one message, and print the result as it comes.

pyggml run -m FILE -p TEXT -n 64
pyggml run -m FILE -p 'What is a tensor?' --chat
pyggml run -m FILE -p TEXT --temp 0                 the most probable tokens
pyggml run -m FILE -p TEXT -ngl 10 -ot exps=numpy   a part on the GPU
"""

from __future__ import annotations

import argparse
import sys

from pyggml.cli import model_options, options
from pyggml.cli.progress import progress


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-p", metavar="TEXT", required=True, help="the text to continue, or the message")
    add("-n", type=options.count, metavar="N", default=128,
        help="the most tokens to print (default: %(default)s)")  # fmt: skip
    add("--chat", action="store_true", help="use the model's chat template")
    add("--system", metavar="TEXT", default="", help="with --chat: the system message")
    model_options.add_sampling_options(parser)
    model_options.add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    from pyggml.generate.chat import ChatTemplate
    from pyggml.generate.text import Conversation, continuation
    from pyggml.generate.tokenizer import Tokenizer

    sampler = model_options.sampler_of(args)
    with model_options.open_model(args) as model:
        fields = model.file.fields
        tokenizer = Tokenizer(fields)
        template = ChatTemplate(fields, tokenizer) if args.chat else None
        session = model_options.new_session(args, model)
        settings = {"n": args.n, "sampler": sampler}
        show = progress("prompt", "tokens")
        if template is None:
            tokens = tokenizer.encode(args.p, parse_special=True)
            pieces = continuation(session, tokenizer, tokens, progress=show, **settings)
        else:
            talk = Conversation(session, tokenizer, template, args.system)
            pieces = talk.answer(args.p, progress=show, **settings)
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

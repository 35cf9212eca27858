"""Write the logits of every token of a text to a NumPy file.

pyggml logits -m FILE -p TEXT -o out.npy
pyggml logits -m FILE --tokens 1,2,3 -o out.npy   needs no tokenizer

The file has one row a token: float32 (tokens, n_vocab). Row i belongs to the token after token i.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.cli import model_options, options
from pyggml.cli.processes import add_nproc, is_first
from pyggml.cli.progress import progress
from pyggml.cli.terminal import print_json
from pyggml.errors import ShapeError
from pyggml.gguf.replaced import put, replaced


def configure(parser: argparse.ArgumentParser) -> None:
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("-p", metavar="TEXT", help="the text to read")
    text.add_argument("--tokens", metavar="N,N,..", type=tokens_of, help="ids instead of a text")
    parser.add_argument(
        "-o", metavar="OUT", type=Path, required=True,
        help="the file to write; it appears when it is complete",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    model_options.add_model_options(parser)
    add_nproc(parser)


def run(args: argparse.Namespace) -> int:
    with model_options.open_model(args) as model:
        tokens = args.tokens
        if tokens is None:
            from pyggml.generate.tokenizer import Tokenizer

            tokens = Tokenizer(model.file.fields).encode(args.p, parse_special=True)
        if not tokens:
            raise ShapeError("-p: the text has no tokens")
        args.c = len(tokens)  # nothing is generated
        session = model_options.new_session(args, model)
        show = progress("prompt", "tokens")
        shape = (len(tokens), model.arch.n_vocab)
        header = BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": shape}
        )
        with ExitStack() as stack:
            write: Callable[[bytes | NDArray[Any]], object] = lambda data: None  # noqa: E731
            if is_first(args):
                nbytes = len(header.getvalue()) + 4 * math.prod(shape)
                write = partial(put, stack.enter_context(replaced(args.o, nbytes)))
            write(header.getvalue())
            if show is not None:
                show(0, len(tokens))
            for start in range(0, len(tokens), session.n_batch):
                part = tokens[start : start + session.n_batch]
                write(session.forward(part, outputs="all").astype("<f4"))
                if show is not None:
                    show(start + len(part), len(tokens))
    if args.json:
        print_json({"file": str(args.o), "type": "f32", "shape": shape})
    else:
        print(f"{args.o}: float32 {shape}")
    return 0


def tokens_of(text: str) -> list[int]:
    """The ids of `1,2,3`."""
    try:
        return [options.natural(word.strip()) for word in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be numbers such as 1,2,3, got {text!r}") from None

"""Measure how well a model predicts a text. Lower is better.

pyggml perplexity -m FILE -f wiki.test.raw
pyggml perplexity -m FILE -f wiki.test.raw -c 64 --chunks 2 --json

The method is that of llama-perplexity: the text is cut into chunks of -c tokens, and the second
half of each is predicted from all tokens before it in the chunk. The perplexity is exp of the mean
negative log-probability. It prints the value after each chunk, and at the end an error estimate.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pyggml.cli import model_options, options
from pyggml.cli.processes import add_nproc
from pyggml.cli.progress import progress
from pyggml.cli.terminal import print_json
from pyggml.errors import ShapeError

if TYPE_CHECKING:
    from pyggml.generate.session import Session


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", metavar="TEXT", type=Path, required=True, help="a file with the text")
    parser.add_argument(
        "--chunks", type=options.count, metavar="N", help="use only the first N chunks"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    model_options.add_model_options(parser, n_ctx=512)
    add_nproc(parser)


def run(args: argparse.Namespace) -> int:
    from pyggml.generate.tokenizer import Tokenizer

    text = args.f.read_text(encoding="utf-8", errors="replace")
    with model_options.open_model(args) as model:
        tokenizer = Tokenizer(model.file.fields)
        tokens = tokenizer.encode(text)
        if args.c < 4 or len(tokens) < 2 * args.c:
            raise ShapeError(
                f"{args.f}: {len(tokens)} tokens, but with chunks of -c {args.c} at least "
                f"{2 * max(args.c, 4)} are needed; use a longer text, or -c of at least 4"
            )
        session = model_options.new_session(args, model)
        losses: list[float] = []
        values: list[float] = []
        n_chunks = min(len(tokens) // args.c, args.chunks or len(tokens))
        # On a terminal, the values themselves show the progress.
        values_shown = sys.stdout.isatty() and not args.json
        show = None if values_shown else progress("perplexity", "chunks")
        for i in range(n_chunks):
            if show is not None:
                show(i, n_chunks)
            chunk = tokens[i * args.c : (i + 1) * args.c]
            first = tokenizer.bos if tokenizer.add_bos else chunk[0]
            losses += chunk_losses(session, chunk, first=first)
            if show is not None:
                show(i + 1, n_chunks)
            values.append(float(np.exp(np.mean(losses))))
            if not args.json:
                print(f"[{i + 1}]{values[-1]:.4f}", end=",", flush=True)
    value, error = estimate(losses)
    if args.json:
        print_json({"perplexity": value, "error": error, "n_ctx": args.c, "chunks": values})
        return 0
    print(f"\nFinal estimate: PPL = {value:.4f} +/- {error:.5f}")
    return 0


def chunk_losses(session: Session, chunk: list[int], *, first: int | None = None) -> list[float]:
    """-log p of each token of the chunk's second half but its first.

    first  replaces the chunk's first token, as BOS does; the losses do not include it
    """
    half = len(chunk) // 2
    session.truncate(0)
    session.forward([chunk[0] if first is None else first, *chunk[1:half]], outputs="none")
    losses: list[float] = []
    for start in range(half, len(chunk) - 1, session.n_batch):
        end = min(start + session.n_batch, len(chunk) - 1)
        logits = session.forward(chunk[start:end], outputs="all").astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(end - start), chunk[start + 1 : end + 1]]
        losses += (np.log(np.exp(logits).sum(axis=1)) - chosen).tolist()
    return losses


def estimate(losses: list[float]) -> tuple[float, float]:
    """The perplexity, and its standard error: that of the mean loss, times the perplexity."""
    value = float(np.exp(np.mean(losses)))
    return value, value * float(np.std(losses)) / np.sqrt(len(losses) - 1)

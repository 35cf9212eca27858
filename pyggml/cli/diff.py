"""Compare the tensors of a model's run with those of another engine, by label.

pyggml diff -m FILE --against dump.npz --tokens 1,2,3
pyggml diff -m FILE --against dump.gguf -p hello --node l_out-3
pyggml diff -m FILE --tokens 1,2,3 --dump ours.npz

The dump has tensors by name: names of llama.cpp's graph (l_out-0) or of modules in transformers
(model.layers.0). docs/comparing.md shows how to write one. Its tensor `tokens`, if it has one, is
what --tokens says. Each row has the NMSE, its bound and the largest difference; ! marks those
beyond the bound. The exit status is 1 if there is one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyggml.cli import model_options, options
from pyggml.cli.logits import tokens_of
from pyggml.cli.options import UsageError
from pyggml.words import counted

if TYPE_CHECKING:
    from pyggml.models.model import Model
    from pyggml.parity.against import Difference


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--against", metavar="DUMP", type=Path, help="an .npz or GGUF file")
    what.add_argument("--dump", metavar="OUT.npz", type=Path,
        help="write our tensors to a file, to compare other places or options")  # fmt: skip
    text = parser.add_mutually_exclusive_group()
    text.add_argument("-p", metavar="TEXT", help="the text that both engines read")
    text.add_argument("--tokens", metavar="N,N,..", type=tokens_of, help="ids instead of a text")
    add("--node", metavar="LABEL", help="show the worst elements of this tensor")
    add("--bound", metavar="NMSE", type=options.positive,
        help="allowed error of every tensor (default: from what both engines round)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object")
    model_options.add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    from pyggml.parity.against import against, details
    from pyggml.parity.dump import TOKENS, read_dump

    if args.dump is not None:
        return _dump(args)
    dump = read_dump(args.against)
    own = dump.pop(TOKENS, None)
    with model_options.open_model(args) as model:
        tokens = _tokens(args, model, own)
        result = against(model, tokens, dump, bound=args.bound)
    if args.node is not None:
        print("\n".join(details(result.pair(args.node))))
        return 0 if result.pair(args.node).ok else 1
    print(json.dumps(as_json(result), indent=1) if args.json else "\n".join(as_text(result)))
    return 0 if result.ok else 1


def _dump(args: argparse.Namespace) -> int:
    """Write our tensors and the tokens."""
    from pyggml.parity.against import Trace
    from pyggml.parity.dump import TOKENS, write_dump

    with model_options.open_model(args) as model:
        tokens = _tokens(args, model, None)
        trace = Trace(model, tokens)
        tensors = trace.run(trace.nodes)
    write_dump(args.dump, {TOKENS: np.array(tokens, np.int32), **tensors})
    print(f"{args.dump}: {counted(len(tensors), 'tensor')} of {counted(len(tokens), 'token')}")
    return 0


def _tokens(args: argparse.Namespace, model: Model, own: Any) -> list[int]:
    """The tokens of --tokens, -p or the dump, checked against the vocabulary."""
    if args.tokens is not None:
        tokens = args.tokens
    elif args.p is not None:
        from pyggml.generate.tokenizer import Tokenizer

        tokens = Tokenizer(model.file.fields).encode(args.p, parse_special=True)
    elif own is not None:
        tokens = [int(token) for token in own.reshape(-1)]
    else:
        raise UsageError("--tokens or -p must say what was read; there is no tensor `tokens`")
    n_vocab = model.arch.n_vocab
    if not tokens or not all(0 <= token < n_vocab for token in tokens):
        raise UsageError(f"there must be tokens, with ids from 0 to {n_vocab - 1}; got {tokens}")
    return list(tokens)


def as_text(result: Difference) -> Iterator[str]:
    """A line for each pair, then the first and the worst beyond their bounds."""
    wide = max(len(pair.label) for pair in result.pairs)
    theirs = max(len(pair.name) for pair in result.pairs)
    heads = f"{'NMSE':>9} {'bound':>9} {'largest':>9}"
    yield f"  {'ours':{wide}} {'theirs':{theirs}} {'shape':18} {heads}"
    for pair in result.pairs:
        shape = "x".join(map(str, pair.ours.shape))
        numbers = (
            f"does not fit {pair.theirs.shape}"
            if pair.comparison is None
            else f"{pair.comparison.error:9.2g} {pair.comparison.bound:9.2g} {pair.largest:9.2g}"
        )
        note = f"  {pair.note}" if pair.note else ""
        mark = " " if pair.ok else "!"
        yield f"{mark} {pair.label:{wide}} {pair.name:{theirs}} {shape:18} {numbers}{note}"
    beyond = [pair for pair in result.pairs if not pair.ok]
    yield f"{counted(len(result.pairs), 'tensor')} compared, {len(beyond)} beyond the bound"
    for what, names in (("the dump", result.only_theirs), ("the model", result.only_ours)):
        if names:
            yield f"only in {what}: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"
    first, worst = result.first, result.worst
    if first is not None and worst is not None:
        yield f"first: {first}"
        if worst is not first:
            yield f"worst: {worst}"


def as_json(result: Difference) -> Mapping[str, Any]:
    first, worst = result.first, result.worst
    return {
        "ok": result.ok,
        "first": first.label if first else None,
        "worst": worst.label if worst else None,
        "tensors": [pair.as_dict() for pair in result.pairs],
        "only_theirs": list(result.only_theirs),
        "only_ours": list(result.only_ours),
    }

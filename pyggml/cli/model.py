"""The graph of a model from a GGUF file, and the command-line options that shape it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np

from pyggml import gguf
from pyggml.cli.model_options import on_off
from pyggml.cli.options import UsageError, dtype, natural, rows
from pyggml.errors import GGUFError
from pyggml.gguf import GGUFFile
from pyggml.models.batch import Batch, Options
from pyggml.models.model import Model
from pyggml.node import Node
from pyggml.parity.alone import Array


@dataclass(frozen=True, slots=True)
class ModelGraph:
    """A model's outputs by name, for `n_tokens` tokens that fill up caches of `n_rows` rows."""

    outputs: dict[str, Node]
    states: Sequence[Node]
    n_vocab: int
    n_tokens: int
    n_rows: int

    def values(self, seed: int) -> tuple[dict[str, Array], dict[str, Array]]:
        """Values of the inputs and of the states: random tokens and earlier rows."""
        n, past = self.n_tokens, self.n_rows - self.n_tokens
        rng = np.random.default_rng(seed)
        inputs: dict[str, Array] = {"pos": np.arange(past, self.n_rows, dtype=np.int32)}
        inputs["tokens"] = rng.integers(0, self.n_vocab, n, dtype=np.int32)
        if n > 1:
            inputs["rows"], inputs["outputs"] = inputs["pos"], np.array([n - 1], np.int32)
        states: dict[str, Array] = {}
        for node in self.states:
            cache = rng.standard_normal(node.shape, dtype=np.float32)
            cache[..., past:, :] = 0.0
            states[node.attrs["name"]] = cache
        return inputs, states


def add_options(parser: argparse._ArgumentGroup) -> None:
    add = parser.add_argument
    add("-c", type=rows, metavar="N", default=128, help="rows of the KV cache (default: 128)")
    add("-ub", type=rows, metavar="N", default=16, help="tokens in the batch (default: 16)")
    add("-ctk", type=dtype, metavar="TYPE", default="f16",
        help="type of the K cache (default: f16)")  # fmt: skip
    add("-ctv", type=dtype, metavar="TYPE", default="f16",
        help="type of the V cache (default: f16)")  # fmt: skip
    add("-cti", type=dtype, metavar="TYPE", default="f16",
        help="type of the index keys of DeepSeek V3.2 and GLM-5 (default: f16)")  # fmt: skip
    add("-fa", **on_off("flash attention"))
    add("-mla", type=int, choices=range(4), default=1,
        help="attention: 0 standard, 1 latent, 2 or 3 expanded with -fa (default: 1)")  # fmt: skip
    add("-fmoe", **on_off("run experts' up, gate and activation as one op"))
    add("--seed", type=natural, metavar="N", default=0,
        help="seed of the random inputs (default: 0)")  # fmt: skip


def weighted(path: str | PathLike[str]) -> GGUFFile:
    """The open file; GGUFError if weights are missing."""
    file = gguf.open(path, allow_missing_data=True)
    if not file.complete:
        file.close()
        if file.missing:
            raise GGUFError(f"{path}: parts of the model are missing: {', '.join(file.missing)}")
        raise GGUFError(
            f"{path}: weights are missing; the file is truncated or only a header. `pyggml info` "
            "reads such a file, but a graph needs the weights"
        )
    return file


def model_graph(file: GGUFFile, args: argparse.Namespace) -> ModelGraph:
    """The whole model, for -ub tokens that fill up a cache of -c rows; the last one's logits."""
    if args.ub > args.c:
        raise UsageError(f"a batch of -ub {args.ub} tokens does not fit in -c {args.c} rows")
    options = Options(
        flash=args.fa == "on", fused=args.fmoe == "on", mla=3 if args.mla == 2 else args.mla,
        cache_k=args.ctk, cache_v=args.ctv, cache_i=args.cti, expand_from=1,
    )  # fmt: skip
    model = Model(file, options=options)
    batch, caches = Batch(args.ub, args.c, options), model.caches(args.c, args.ub)
    graph = model.graph(batch, caches)
    states = [node for cache in caches for node in cache.states]
    return ModelGraph(dict(graph.outputs), states, model.arch.n_vocab, args.ub, args.c)

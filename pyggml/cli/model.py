"""The graph of a model's layers from a GGUF file, and the command-line options that shape it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from os import PathLike

import numpy as np

from pyggml import gguf
from pyggml.cli.options import UsageError, count, dtype, natural
from pyggml.errors import GGUFError
from pyggml.gguf import GGUFFile
from pyggml.models.config import DeepSeek2Config
from pyggml.models.deepseek2 import AttentionOptions, Cache, Layer
from pyggml.models.feed_forward import layer_output
from pyggml.models.tensors import check_tensors
from pyggml.node import Node
from pyggml.ops import causal_mask, input
from pyggml.parity.alone import Array

#: -mla: the form of attention, by ik_llama.cpp's numbers. ik_llama.cpp treats 2 and 3 as 1 below
#: 128 tokens; here a number always means the same form, so that small graphs can use it too.
FORMS = ("standard", "latent", "expanded", "expanded")


@dataclass(frozen=True, slots=True)
class ModelGraph:
    """A model's outputs by name, and values for its inputs and states."""

    outputs: dict[str, Node]
    inputs: dict[str, Array]
    states: dict[str, Array]


def add_options(parser: argparse._ArgumentGroup) -> None:
    add = parser.add_argument
    add("-c", type=count, metavar="N", default=128, help="rows of the KV cache (default: 128)")
    add("-ub", type=count, metavar="N", default=16, help="tokens in the batch (default: 16)")
    add("-ctk", type=dtype, metavar="TYPE", default="f16",
        help="type of the KV cache (default: f16)")  # fmt: skip
    add("-fa", choices=("on", "off"), nargs="?", const="on", default="on",
        help="flash attention (default: on)")  # fmt: skip
    add("-mla", type=int, choices=range(len(FORMS)), default=1,
        help="attention: 0 standard, 1 latent, 2 or 3 expanded with -fa (default: 1)")  # fmt: skip
    add("-fmoe", choices=("on", "off"), nargs="?", const="on", default="on",
        help="run experts' up, gate and activation as one op (default: on)")  # fmt: skip
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
    """All layers of the model, for -ub tokens that fill up a cache of -c rows.

    x and the earlier cache rows are random numbers from --seed.
    """
    config = DeepSeek2Config.from_gguf(file.fields, file.tensors)
    check_tensors(config, file.tensors)
    options = _attention_options(args)
    past = args.c - args.ub
    if past < 0:
        raise UsageError(f"a batch of -ub {args.ub} tokens does not fit in -c {args.c} rows")
    x = y = input("x", "f32", ne=(config.n_embd, args.ub))
    pos = input("pos", "i32", ne=(args.ub,))
    mask = causal_mask(pos, n_kv=args.c)
    rng = np.random.default_rng(args.seed)
    inputs: dict[str, Array] = {"pos": np.arange(past, args.c, dtype=np.int32)}
    inputs["x"] = rng.standard_normal(x.shape, dtype=np.float32)
    states: dict[str, Array] = {}
    for il in range(config.n_layer):
        layer, cache = Layer.of(file, config, il), Cache.of(config, options, args.c, il)
        y = layer_output(y, pos, pos, mask, layer, cache, options, fused=args.fmoe == "on")
        for node in (cache.k, cache.v):
            if node is not None:
                rows = rng.standard_normal(node.shape, dtype=np.float32)
                rows[..., past:, :] = 0.0
                states[node.attrs["name"]] = rows
    return ModelGraph({"y": y}, inputs, states)


def _attention_options(args: argparse.Namespace) -> AttentionOptions:
    flash, form = args.fa == "on", FORMS[args.mla]
    if form == "expanded" and not flash:
        form = "latent"  # the expanded form needs flash attention
    return AttentionOptions(form, flash, args.ctk)

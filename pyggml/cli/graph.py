"""Show how a model's graph runs: splits, copies between devices, steps and memory.

pyggml graph -m FILE                                  the plan on NumPy; repeated layers once
pyggml graph -m FILE --backend null,numpy -ot 'attn=numpy'
pyggml graph -m FILE --backend cuda:0:24GiB,numpy -ot exps=numpy    for a GPU, installed or not
pyggml graph -m FILE --backend null:0:24GiB -amb 256  on a device of that size, with a budget
pyggml graph -m FILE --dot plan.dot                   a drawing, for `dot -Tsvg`
pyggml graph -m FILE --dot - | dot -Tsvg -o plan.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pyggml.cli import options
from pyggml.cli.model import add_options, model_graph, weighted
from pyggml.cli.model_options import pins_of
from pyggml.runtime.compile import compile
from pyggml.viz import dot


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("-m", metavar="FILE", type=Path, required=True, help="a DeepSeek-2 GGUF file")
    add("--backend", metavar="PLACES", type=options.places, default="numpy",
        help="places in order of preference, separated by commas (default: numpy)")  # fmt: skip
    add("-ot", metavar="REGEX=PLACE", type=options.pins, action="extend", default=[],
        help="put tensors with a matching label on PLACE; separate pairs by commas")  # fmt: skip
    add("-amb", metavar="MIB", type=options.positive,
        help="attention memory budget in MiB (default: none)")  # fmt: skip
    add("--dot", metavar="FILE", help="write a drawing for Graphviz instead of text; - is stdout")
    add_options(parser.add_argument_group("the graph"))


def run(args: argparse.Namespace) -> int:
    """Print or draw the plan, without allocating memory or reading weights."""
    with weighted(args.m) as file:
        graph = model_graph(file, args)
        pins = pins_of(args.ot)
        plan = compile(graph.outputs, backends=args.backend, amb=args.amb, pins=pins)
        if args.dot is None:
            print(f"{plan}\n\n{plan.memory}")
        elif args.dot == "-":
            print(dot(plan))
        else:
            Path(args.dot).write_text(dot(plan) + "\n", encoding="utf-8")
            print(f"wrote {args.dot}")
    return 0

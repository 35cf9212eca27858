"""Show how a model's graph runs: splits, copies between devices, steps and memory.

pyggml graph -m FILE
pyggml graph -m FILE --backend cuda:0:24GiB,numpy -ot exps=numpy   the GPU need not exist
pyggml graph -m FILE --backend null:0:24GiB -fa off -amb 256
pyggml graph -m FILE --dot plan.dot   a drawing, for `dot -Tsvg plan.dot -o plan.svg`

Repeated layers are shown once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pyggml.backends.step import Step
from pyggml.cli import options
from pyggml.cli.model import add_options, model_graph, weighted
from pyggml.cli.model_options import pins_of
from pyggml.cli.terminal import print_json
from pyggml.node import line_of
from pyggml.passes.work import Work
from pyggml.runtime.compile import compile
from pyggml.runtime.memory import Memory
from pyggml.runtime.report import name_of
from pyggml.viz import dot

_BYTES = (
    "weights", "states", "inputs", "compute", "workspace", "boxes", "staging", "messages",
    "total", "score_peak", "score_peak_plain", "size",
)  # fmt: skip


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
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--dot", metavar="FILE", help="write a drawing for Graphviz instead of text; - is stdout"
    )
    form.add_argument("--json", action="store_true", help="print one JSON object")
    add_options(parser.add_argument_group("the graph"))


def run(args: argparse.Namespace) -> int:
    """Print or draw the plan, without allocating memory or reading weights."""
    with weighted(args.m) as file:
        graph = model_graph(file, args)
        pins = pins_of(args.ot)
        plan = compile(graph.outputs, backends=args.backend, amb=args.amb, pins=pins)
        if args.json:
            print_json(as_json(plan._work, plan.memory), indent=1)
        elif args.dot is None:
            print(f"{plan}\n\n{plan.memory}")
        elif args.dot == "-":
            print(dot(plan))
        else:
            Path(args.dot).write_text(dot(plan) + "\n", encoding="utf-8")
            print(f"wrote {args.dot}")
    return 0


def as_json(work: Work, memory: Memory) -> dict[str, Any]:
    """The splits with their copies and steps, and the bytes on each device."""
    return {
        "splits": [
            {
                "place": split.backend.place,
                "waits": split.waits,
                "copies": [_step(work, step) for step in split.copies],
                "steps": [_step(work, step) for step in split.steps],
            }
            for split in work.splits
        ],
        "devices": [
            {name: getattr(row, name) for name in ("device", *_BYTES)} for row in memory.devices
        ],
        "amb": memory.amb,
        "peak_step": memory.peak_step,
        "peak_live": memory.peak_live,
    }


def _step(work: Work, step: Step) -> dict[str, Any]:
    """A step: what it computes from what, and where in the arena (or in which tensor) it is."""
    node, spot = step.node, work.placed.spots[step.node]
    return {
        "label": name_of(node),
        "op": node.op.name,
        "fused": [n.op.name for n in step.nodes],
        "reads": [name_of(n) for n in step.reads],
        "type": node.dtype.name,
        "ne": node.ne,
        "bytes": step.nbytes,
        "scratch": step.scratch,
        "offset": spot.offset,
        "in": None if spot.base is None else name_of(spot.base),
        "line": line_of(node),
    }

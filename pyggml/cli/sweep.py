"""Measure how speed and memory change as the cache fills, with sweep-bench's table.

pyggml sweep -m FILE -c 8192 -ub 512
pyggml sweep -m FILE -c 32768 -ub 2048 -n 32 -amb 256
pyggml sweep -m FILE -c 8192 --plot depth.svg --peers peers.json

At each depth N_KV, the command generates TG tokens, drops them again, and runs a prompt of PP
tokens, which stays. Both run once untimed before. Memory is what that depth needs: the arena of the
larger of the two plans, the caches of N_KV + PP tokens, and the most attention scores at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from pyggml.cli import measuring, model_options, options
from pyggml.cli.options import wrong_usage
from pyggml.cli.processes import add_nproc

if TYPE_CHECKING:
    from pyggml.bench.depth import Point


def configure(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the sweep")
    add = options.by_first_name(group.add_argument)
    add("-n", "--n-gen", type=options.count, metavar="N",
        help="tokens to generate at each depth (default: a quarter of -ub)")  # fmt: skip
    measuring.add_output_options(parser)
    model_options.add_model_options(parser)
    add_nproc(parser)


def run(args: argparse.Namespace) -> int:
    from pyggml.bench import panels
    from pyggml.bench.depth import depths
    from pyggml.bench.tables import SweepMarkdown

    measuring.check_together(args)
    with wrong_usage():
        depths(args.c, _n_ubatch(args), args.n)
    peers = measuring.peers_of(args)
    measuring.report(
        args,
        SweepMarkdown,
        measuring.with_threads(points, args),
        partial(panels.sweep_panels, peers=peers),
    )
    return 0


def points(args: argparse.Namespace) -> Iterator[Point]:
    from pyggml.bench.depth import depths, sweep
    from pyggml.bench.runs import WARMUPS

    n_ubatch = _n_ubatch(args)
    each = 1 + WARMUPS * (not args.no_warmup)
    runs = measuring.Runs("sweep", each * len(depths(args.c, n_ubatch, args.n)))
    with model_options.open_model(args) as model:
        yield from sweep(
            model,
            n_ctx=args.c,
            n_ubatch=n_ubatch,
            n_gen=args.n,
            warmup=not args.no_warmup,
            setting=measuring.unknown_to_models(args),
            begin=runs.begin,
            ran=runs.ran,
        )


def _n_ubatch(args: argparse.Namespace) -> int:
    n_ubatch: int = min(args.b, args.ub)
    return n_ubatch

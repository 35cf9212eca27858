"""Write a page about how a model runs: one HTML file for a browser, which needs no network.

It shows the graph by layer, with the type, size, device, kernel and line of every step; the memory
over the steps, and what holds it at the peak; what other options would change; the copies between
devices; and with --profile the time of every step.

FILE may be only a header (pyggml synth --header-only), and the devices need not exist, except for
--profile.

pyggml page -m model.gguf -o page.html
pyggml page -m v3.gguf -o v3.html -c 16384 --device cuda:80GiB --device host:512GiB -ot exps=numpy
pyggml page -m model.gguf -o page.html -c 2048 --profile
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pyggml import gguf
from pyggml.cli.model_options import add_model_options, graph_options, on_off
from pyggml.cli.plan import command_of, places_of, planner_of
from pyggml.cli.progress import progress
from pyggml.errors import GGUFError
from pyggml.generate.fit import Setup
from pyggml.models.batch import Options
from pyggml.models.model import Model

if TYPE_CHECKING:
    from pyggml.generate.session import Session
    from pyggml.page.document import View
    from pyggml.runtime.plan import Plan


def configure(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add = parser.add_argument_group("the page").add_argument
    add("-o", metavar="OUT", type=Path, required=True, help="the HTML file to write")
    add("--device", metavar="PLACE:SIZE", action="append",
        help="a device, such as cuda:24GiB or host:64GiB; the second cuda is cuda:1 "
        "(default: those of --backend, of any size)")  # fmt: skip
    add("--what-if", **on_off("plan what other options would change"))
    add("--profile", action="store_true",
        help="load the model, run random tokens, and show the time of each step")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from pyggml.generate.variants import variants
    from pyggml.page.document import Document, Variant
    from pyggml.page.html import write

    places = places_of(args)
    with gguf.open(args.m, allow_missing_data=True) as file:
        if args.profile and not file.complete:
            raise GGUFError(f"{args.m}: weights are missing, which --profile needs")
        options = Options(**graph_options(args))
        model = Model(
            file, decode_weights=args.decode_weights, read_ahead=args.read_ahead, options=options
        )
        planner = planner_of(model, places, args)
        setup = Setup(n_ctx=args.c, n_batch=min(args.ub, args.b, args.c), amb=args.amb)
        session = planner.session(setup)
        views = list(_views(session, args))
        what_if: list[Variant] = []
        if args.what_if == "on":
            what_if = list(variants(planner, setup, progress("planning", "variants")))
        document = Document(
            title=str(file.fields.get("general.name") or Path(args.m).name),
            views=views,
            memory=session.memory(),
            about=_about(model, setup),
            variants=what_if,
            command=command_of(args, planner, setup),
        )
        write(args.o, document)
    print(f"wrote {args.o}: {args.o.stat().st_size:,} bytes")
    return 0


def _views(session: Session, args: argparse.Namespace) -> Iterator[View]:
    """The plans of a batch and of one token, each over full caches."""
    from pyggml.page.document import View

    batch, token, *_ = session.plans.largest()
    plans = {f"a batch of {session.n_batch} tokens": batch, "one token": token}
    if session.n_batch == 1:
        del plans[next(iter(plans))]
    for name, plan in plans.items():
        profile = None
        if args.profile:
            plan.bind({}, progress("loading", "bytes"))
            profile = plan.profile(_inputs(session, plan))
        yield View(name, plan, profile)


def _inputs(session: Session, plan: Plan) -> dict[str, NDArray[np.int32]]:
    """Random tokens that fill up the caches."""
    n = plan.inputs["tokens"].ne[0]
    pos = np.arange(session.n_ctx - n, session.n_ctx, dtype=np.int32)
    tokens = np.random.default_rng(0).integers(0, session.model.arch.n_vocab, n, dtype=np.int32)
    last = np.array([n - 1], np.int32)
    arrays = {"tokens": tokens, "pos": pos, "rows": pos, "outputs": last}
    return {name: array for name, array in arrays.items() if name in plan.inputs}


def _about(model: Model, setup: Setup) -> list[str]:
    arch = model.arch
    return [
        arch.name,
        f"{arch.n_layer} layers",
        f"{setup.n_ctx} tokens of context",
        f"batches of {setup.n_batch}",
    ]

"""Show the memory that a session of a model needs on each device, without reading its weights.

FILE may be whole, split, or only a header (pyggml synth --header-only). The devices need not exist.
Layers are divided among several devices in order, in proportion to their sizes: a layer's weights
and cache are on one device. -ngl leaves the first layers on the host.

All figures are exact except the driver's own memory, which is an estimate. Exit status 1 if a
device is too small.

--fit chooses the largest context up to the file's (or -c), then the largest batch up to -b (or
-ub), then the largest attention budget, and then puts the experts of as few layers as possible on
the host. Over several devices it also chooses the cut: of those that fit, the one with the shortest
predicted time. It estimates each cut from a few layers, and plans the best with all. The last line
is the command that runs it.

With --shard the layers are not divided but cut: docs/scaling.md. The times that it then prints are
predictions from the ops' costs, at the rates of an H100.

pyggml plan -m FILE -c 16384 -ub 512
pyggml plan -m FILE --device cuda:80GiB --device cuda:80GiB --shard auto
pyggml plan -m FILE -c 4096 --device cuda:24GiB --device host:64GiB
pyggml plan -m FILE --device cuda:80GiB --device cuda:80GiB --device host:512GiB --fit
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyggml import backends, gguf
from pyggml.cli.model_options import (
    N_BATCH,
    N_CTX,
    add_model_options,
    graph_options,
    layer_pins,
    pins_of,
)
from pyggml.cli.options import wrong_usage
from pyggml.cli.trials import trial_json, trials_text
from pyggml.errors import DeviceError
from pyggml.generate.cuts import Search, Trial, Winner, candidates
from pyggml.generate.fit import BUDGETS, Line, Planner, Setup, fit, lines
from pyggml.models.batch import Options
from pyggml.models.model import Model
from pyggml.runtime.memory import Memory, mib
from pyggml.runtime.places import Place, parse
from pyggml.runtime.predict import Prediction
from pyggml.runtime.shards import Cuts, shard_text, with_shares

#: Options of `pyggml run` with these defaults, by their names here.
_SAME = {"ctk": "f16", "ctv": "f16", "cti": "f16", "fa": "on", "mla": 3, "fmoe": "on"}


def configure(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, fit=True)
    add = parser.add_argument_group("the plan").add_argument
    add("--device", metavar="PLACE:SIZE", action="append",
        help="a device, such as cuda:24GiB or host:64GiB; the second cuda is cuda:1 "
        "(default: those of --backend, of any size)")  # fmt: skip
    add("--fit", action="store_true",
        help="choose -c, -ub, -amb, --shard and the experts on the host")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object")


@dataclass(frozen=True, slots=True)
class Result:
    """What the command prints.

    table    a line for each device
    command  runs a session with this memory
    times    predictions for a prompt batch and for one token, of a model that is cut
    trials   the cuts that --fit has tried, best first
    """

    planner: Planner
    setup: Setup
    memory: Memory
    table: Sequence[Line]
    command: str
    times: Sequence[Prediction] = ()
    trials: Sequence[Trial] = ()

    @property
    def fits(self) -> bool:
        return all(line.free is None or line.free >= 0 for line in self.table)

    @property
    def pinned(self) -> int:
        """Bytes of pinned host memory for copies."""
        return sum(line.row.staging for line in self.table)


def run(args: argparse.Namespace) -> int:
    with wrong_usage():
        places = places_of(args)
    with gguf.open(args.m, allow_missing_data=True) as file:
        options = Options(**graph_options(args))
        model = Model(
            file, decode_weights=args.decode_weights, read_ahead=args.read_ahead,
            shard=args.shard, options=options,
        )  # fmt: skip
        planner = planner_of(model, places, args)
        trials: Sequence[Trial] = ()
        if args.fit and len(_devices(planner)) > 1:
            winner = _search(planner, args)
            planner, setup, trials = winner.planner, winner.setup, winner.trials
        else:
            setup = _setup(planner, args)
        memory = planner.memory(setup)
        times = planner.times(setup) if planner.model.shard is not None else ()
    command = command_of(args, planner, setup)
    result = Result(planner, setup, memory, lines(memory, places), command, times, trials)
    print(json.dumps(as_json(result), indent=1) if args.json else "\n".join(as_text(result)))
    return 0 if result.fits else 1


def _devices(planner: Planner) -> list[Place]:
    """The devices over which a model can be cut: those of the first place's kind."""
    first = planner.places[0]
    return [p for p in planner.places if p.name == first.name and p.name not in backends.HOSTS]


def _search(planner: Planner, args: argparse.Namespace) -> Winner:
    """The cut of --shard, or the best one, with the setup that `fit` chooses."""
    model, devices = planner.model, _devices(planner)
    cuts: list[Cuts] = [args.shard]
    if args.shard is None:
        cuts = list(candidates(model, len(devices)))
    if any(place.partition(":")[0] == devices[0].name for place in planner.pins.values()):
        cuts = [each for each in cuts if "layers" not in each]  # pins name devices of the whole
    model.shard = None
    search = Search(
        model, planner.places, planner.pins, planner.host_layers, **_limits(planner, args)
    )
    return search.run(cuts)


def places_of(args: argparse.Namespace) -> list[Place]:
    """The places of --device, or else of --backend."""
    if not args.device:
        return [parse(text) for text in args.backend]
    count: Counter[str] = Counter()
    places: list[Place] = []
    for text in args.device:
        name, _, rest = text.partition(":")
        name = backends.on_host() if name == "host" else name
        if rest and not rest.split(":")[0].isdecimal() and name not in backends.HOSTS:
            rest = f"{count[name]}:{rest}"
        place = parse(f"{name}:{rest}" if rest else name)
        if any(place.backend.device == other.backend.device for other in places):
            raise DeviceError(f"--device {text}: {place.backend.device} is there twice")
        count[name] += 1
        places.append(place)
    return places


def planner_of(model: Model, places: Sequence[Place], args: argparse.Namespace) -> Planner:
    n_layer, tied = model.arch.n_layer, model.arch.tied
    names = [place.name for place in places]
    pins = pins_of(args.ot) | layer_pins(args.ngl, n_layer, names, tied=tied)
    on_host = 0 if args.ngl is None else max(n_layer + 1 - args.ngl, 0) if args.ngl else n_layer
    return Planner(model, places, pins, range(min(on_host, n_layer)))


def _setup(planner: Planner, args: argparse.Namespace) -> Setup:
    if not args.fit:
        n_ctx = args.c or N_CTX
        return Setup(n_ctx=n_ctx, n_batch=min(args.ub or N_BATCH, args.b, n_ctx), amb=args.amb)
    return fit(planner, **_limits(planner, args))


def _limits(planner: Planner, args: argparse.Namespace) -> dict[str, Any]:
    """The most that --fit tries."""
    return {
        "n_ctx": args.c or planner.model.arch.n_ctx_train,
        "n_batch": min(args.ub or args.b, args.b),
        "budgets": BUDGETS if args.amb is None else (args.amb,),
    }


def command_of(args: argparse.Namespace, planner: Planner, setup: Setup) -> str:
    """The command that runs a session with this memory."""
    words = ["pyggml", "run", "-m", args.m, "-c", str(setup.n_ctx), "-ub", str(setup.n_batch)]
    if args.decode_weights:
        words.append("--decode-weights")
    if (ahead := planner.read_ahead(setup)) is not None:
        words += ["--read-ahead", "on" if ahead else "off"]
    if setup.amb is not None:
        words += ["-amb", f"{setup.amb:g}"]
    for name, default in _SAME.items():
        if (value := getattr(args, name)) != default:
            words += [f"-{name}", str(value)]
    words += ["--backend", ",".join(place.backend.place for place in planner.places)]
    if planner.model.shard is not None:
        words += ["--shard", shard_text(with_shares(planner.model.shard, planner.places))]
    for pattern, place in planner.pins_of(setup).items():
        words += ["-ot", f"{pattern}={place}"]
    return shlex.join(words)


# -- output -----------------------------------------------------------------------------------


def as_json(result: Result) -> dict[str, Any]:
    arch, setup = result.planner.model.arch, result.setup
    return {
        "architecture": arch.name,
        "layers": arch.n_layer,
        "n_ctx": setup.n_ctx,
        "n_batch": setup.n_batch,
        "amb": setup.amb,
        "host_experts": setup.host_experts,
        "shard": None if (cuts := result.planner.model.shard) is None else shard_text(cuts),
        "devices": [_device(line) for line in result.table],
        "pinned": result.pinned,
        "score_peak": result.memory.score_peak,
        "fits": result.fits,
        "plans": result.planner.n_plans,
        "command": result.command,
        "predicted": [
            {"seconds": time.total, "between_devices": time.between} for time in result.times
        ],
        "tried": [trial_json(trial) for trial in result.trials],
    }


def _device(line: Line) -> dict[str, Any]:
    row = line.row
    return {
        "device": row.device, "weights": row.weights, "caches": row.states, "inputs": row.inputs,
        "compute": row.compute, "workspace": row.workspace, "boxes": row.boxes,
        "driver_estimate": line.driver,
        "pinned": line.pinned, "messages": row.messages, "total": line.total, "size": row.size,
        "free": line.free,
    }  # fmt: skip


def as_text(result: Result) -> list[str]:
    setup, table = result.setup, result.table
    hidden = {"messages"} if any(t.row.boxes for t in table) else {"messages", "boxes"}
    rows = [
        {k: v if isinstance(v, str) else _mib(v) for k, v in _device(t).items() if k not in hidden}
        for t in table
    ]
    heads = {key: key.replace("driver_estimate", "driver (estimate)") for key in rows[0]}
    widths = {key: max(len(row[key]) for row in (heads, *rows)) for key in heads}
    text = ["  ".join(row[k].rjust(widths[k]) for k in heads).rstrip() for row in (heads, *rows)]
    amb = "none" if setup.amb is None else f"{setup.amb:g} MiB"
    text.append(
        f"MiB, for {setup.n_ctx} tokens of context in batches of {setup.n_batch}; attention "
        f"budget: {amb}, scores: {_mib(result.memory.score_peak)} MiB."
    )
    text.append(
        "Exact, except the driver's own memory (context, libraries, kernels). Pinned host memory "
        f"for copies: {_mib(result.pinned)} MiB."
    )
    if any(line.row.messages for line in table):
        most = max(line.row.messages for line in table)
        text.append(
            "In several processes (--nproc), messages pass through up to "
            f"{_mib(most)} MiB of host memory in each."
        )
    if setup.host_experts:
        text.append(f"The experts of layers 0 to {setup.host_experts - 1} are on the host.")
    text += [
        f"{line.row.device} is too small: {_mib(-line.free)} MiB are missing."
        for line in table
        if line.free is not None and line.free < 0
    ]
    if any(line.free is not None for line in table) and result.fits:
        text.append("It fits.")
    for what, time in zip((f"{setup.n_batch} tokens", "1 token"), result.times):
        text.append(
            f"Predicted, not measured: {time.total * 1e3:.3g} ms for {what}, "
            f"{time.between * 1e3:.3g} ms of it between devices."
        )
    text += trials_text(result.trials)
    text.append(f"Plans compiled: {result.planner.n_plans}.")
    return [*text, result.command]


def _mib(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{'-' * (nbytes < 0)}{mib(abs(nbytes))}"

"""`pyggml bench --ops`: what each step of a model's plan costs, inside a run of it.

-p 512            the batch of a prompt; if it has more tokens than -ub, its last batch
-n 1 -d 4096      a token after 4096 others

For each step or group: the time, launches, bytes and flops, their rates, and the share of the
device's ceilings, which a large copy and a large product measure in the same run. Then the steps
that do not take a fast kernel, with the reason. `*` stands for the number of a layer.

Caches are not filled before: times do not depend on the values in them.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyggml.cli import model_options, options
from pyggml.cli.options import UsageError
from pyggml.cli.processes import is_first
from pyggml.runtime.profile import Profile, Sum, Timing
from pyggml.words import counted

if TYPE_CHECKING:
    from pyggml.models.model import Model

GROUPS = ("step", "op", "label", "layer", "kernel", "place")
#: The most rows of a table of text; the last one is the sum of the others.
SHOWN = 40
HEADS = ("us", "%", "launches", "MiB", "GB/s", "GFLOP/s", "ceiling %")


def add_ops_options(parser: argparse.ArgumentParser) -> None:
    """The options that `ops` reads besides those of `pyggml bench`."""
    add = parser.add_argument_group("steps").add_argument
    add("--ops", action="store_true",
        help="print what each step costs, in place of t/s; -n is one token")  # fmt: skip
    add("--by", metavar="GROUP,..", type=_groups, default=["op", "label"],
        help=f"with --ops: sums by {', '.join(GROUPS)} (default: op,label)")  # fmt: skip
    add("--trace", metavar="OUT.json", type=Path,
        help="with --ops: also write a trace for Perfetto or Chromium's DevTools")  # fmt: skip


@options.option
def _groups(text: str) -> list[str]:
    words = text.split(",")
    for word in words:
        if word not in GROUPS:
            raise UsageError(f"--by {word!r} must be one of {', '.join(GROUPS)}")
    return words


@dataclass(frozen=True, slots=True)
class Case:
    """A plan of a model: `n_tokens` tokens after `depth` others."""

    name: str
    n_tokens: int
    depth: int


def ops(args: argparse.Namespace) -> int:
    """Print the profile of each case, for every combination of the model's options."""
    others = {
        "-pg": args.pg, "--loop": args.loop, "-t": args.t != [None], "--plot": args.plot,
        "--peers": args.peers,
    }  # fmt: skip
    for name, value in others.items():
        if value:
            raise UsageError(f"{name} does not go with --ops")
    settings = list(model_options.combinations(args))
    n_cases = sum(len(list(cases(setting))) for setting in settings)
    if n_cases != 1 and (args.o == "csv" or args.trace is not None):
        raise UsageError(f"-o csv and --trace need one case, for example -p 0; there are {n_cases}")
    results = []
    for name, case, profile in profiles(args, settings):
        if args.trace is not None and is_first(args):
            profile.write_trace(args.trace)
        if args.o == "md":
            print("\n".join(markdown(name, profile, args.by)), end="\n\n")
        elif args.o == "csv":
            _write_csv(profile, args.by[0])
        results.append(as_json(name, case, profile))
    if args.o == "json":
        print(json.dumps(results, indent=1))
    elif args.o == "jsonl":
        print("\n".join(map(json.dumps, results)))
    if args.trace is not None and is_first(args):
        print(f"wrote {args.trace}", file=sys.stderr)
    return 0


def profiles(
    args: argparse.Namespace, settings: Sequence[argparse.Namespace]
) -> Iterator[tuple[str, Case, Profile]]:
    """The name and the profile of each case with each setting."""
    for setting in settings:
        with model_options.open_model(setting) as model:
            for case in cases(setting):
                n_batch = min(setting.b, setting.ub)
                profile = profile_of(model, case, n_batch=n_batch, runs=args.r)
                yield case.name + _differing(setting, settings), case, profile


def _differing(setting: argparse.Namespace, settings: Sequence[argparse.Namespace]) -> str:
    """The options of a setting that differ between settings: `, -fa off`."""
    values = vars(setting)
    names = [n for n in values if any(vars(other)[n] != values[n] for other in settings)]
    return "".join(f", -{name} {values[name]}" for name in names)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The cases of -p, -n and -d."""
    n_batch = min(args.b, args.ub)
    for depth in args.d:
        at = f" @ d{depth}" if depth else ""
        for n in args.p:
            if n:
                last = (n - 1) % n_batch + 1
                yield Case(f"pp{n}{at}", last, depth + n - last)
        if any(args.n):
            yield Case(f"tg1{at}", 1, depth)


def profile_of(model: Model, case: Case, *, n_batch: int, runs: int) -> Profile:
    """The profile of a case, with ceilings. Its tokens are random."""
    import numpy as np

    session = model.session(case.depth + case.n_tokens, n_batch)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.arch.n_vocab, case.n_tokens).tolist()
    plan, arrays = session.prepared(case.depth, tokens, 1)
    return plan.profile(arrays, runs).with_ceilings(model.store.ranks)


# -- output -----------------------------------------------------------------------------------


def markdown(name: str, profile: Profile, by: Sequence[str]) -> Iterator[str]:
    """A heading, the ceilings, a table for each group, and the slow paths."""
    yield f"### {name}: {profile.head()}"
    yield ""
    for place, ceiling in profile.ceilings.items():
        yield (
            f"- {place}: copies {ceiling.copy / 1e9:.1f} GB/s, "
            f"products {ceiling.product / 1e9:.0f} GFLOP/s"
        )
    phases = profile.phases
    yield (
        f"- host: inputs {phases.upload * 1e6:.0f} us, issue {phases.issue * 1e6:.0f} us, "
        f"wait {phases.wait * 1e6:.0f} us"
    )
    for what in by:
        yield ""
        yield from _table(profile, what)
    if profile.expanded or profile.slow_paths():
        yield ""
    yield from (f"- {text}" for text in profile.expanded)
    for why, rows in profile.slow_paths():
        names = ", ".join(dict.fromkeys(row.op for row in rows))
        time = 1e6 * sum(row.seconds for row in rows)
        steps = counted(len(rows), "step")
        yield f"- not the fast kernel: {steps} of {names}, {time:.0f} us: {why}"


def _table(profile: Profile, what: str) -> Iterator[str]:
    rows: Sequence[Timing | Sum] = profile.rows if what == "step" else profile.by(what)
    yield f"| {what} | " + " | ".join(HEADS) + " |"
    yield "|---|" + "---:|" * len(HEADS)
    top = rows if what in ("step", "layer") else rows[:SHOWN]
    for row in top:
        yield f"| {_name(row)} | " + " | ".join(_cells(profile, row)) + " |"
    others = rows[len(top) :]
    if others:
        time = sum(row.seconds for row in others)
        percent = 100 * time / max(profile.seconds, 1e-9)
        empty = " |" * (len(HEADS) - 2)
        yield f"| {len(others)} more | {time * 1e6:.1f} | {percent:.1f} |{empty}"


def _name(row: Timing | Sum) -> str:
    text = row.text if isinstance(row, Timing) else f"{row.name or 'no layer'} x {row.steps}"
    return text.replace("|", r"\|")


def _cells(profile: Profile, row: Timing | Sum) -> tuple[str, ...]:
    time, share = max(row.seconds, 1e-9), profile.share(row)
    return (
        f"{row.seconds * 1e6:.1f}",
        f"{100 * row.seconds / max(profile.seconds, 1e-9):.1f}",
        str(row.launches),
        f"{row.nbytes / 2**20:.2f}",
        f"{row.nbytes / time / 1e9:.1f}",
        f"{row.flops / time / 1e9:.1f}",
        "" if share is None else f"{100 * share:.0f}",
    )


def _write_csv(profile: Profile, what: str) -> None:
    rows = profile.rows if what == "step" else profile.by(what)
    table = [_record(profile, row) for row in rows]
    writer = csv.DictWriter(sys.stdout, list(table[0]) if table else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)


def _record(profile: Profile, row: Timing | Sum) -> dict[str, Any]:
    """A row for JSON and CSV."""
    record: dict[str, Any] = {
        "name": row.text if isinstance(row, Timing) else row.name, "place": row.place,
        "steps": row.steps if isinstance(row, Sum) else 1, "launches": row.launches,
        "seconds": row.seconds, "bytes": row.nbytes, "flops": row.flops,
        "ceiling": profile.share(row),
    }  # fmt: skip
    if isinstance(row, Timing):
        record |= {
            "op": row.op, "label": row.label, "layer": row.layer, "result": row.spec,
            "line": row.line, "kernels": str(row.kernels), "why": row.kernels.why,
        }  # fmt: skip
    return record


def as_json(name: str, case: Case, profile: Profile) -> dict[str, Any]:
    """A case as an object of JSON: every step, and the sums."""
    phases = profile.phases
    return {
        "test": name, "n_tokens": case.n_tokens, "depth": case.depth,
        "seconds": profile.seconds, "whole": sum(profile.whole), "launches": profile.launches,
        "run": {"upload": phases.upload, "issue": phases.issue, "wait": phases.wait},
        "ceilings": {
            place: {"copy": c.copy, "product": c.product} for place, c in profile.ceilings.items()
        },
        "steps": [_record(profile, row) for row in profile.rows],
        "by": {
            what: [_record(profile, row) for row in profile.by(what)] for what in GROUPS[1:]
        },
        "expanded": list(profile.expanded),
        "slow": [
            {"why": why, "steps": len(rows), "seconds": sum(row.seconds for row in rows)}
            for why, rows in profile.slow_paths()
        ],
    }  # fmt: skip

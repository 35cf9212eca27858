"""`pyggml parity --mode fuzz`, --case and --ops: random and single cases in separate processes."""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from pyggml.cli.terminal import print_json, verdict
from pyggml.parity.fuzz import Failure, Tally, fuzz
from pyggml.parity.graph_case import is_graph
from pyggml.parity.own import own_cases
from pyggml.parity.running import Outcome, op_in
from pyggml.parity.worker import Pool, Setup
from pyggml.words import counted


def run(args: argparse.Namespace, names: list[str]) -> int:
    """Run random cases or graphs on each backend; status 1 if any failed."""
    tallies = {}
    for name in names:
        ops = frozenset(args.op.split(",")) if args.op else frozenset()
        setup = Setup(name, kernel=args.kernel, ops=ops)
        what = "graph" if args.graphs else "case"
        if not args.json:
            print(f"{name}: random {what}s from seed {args.seed}", flush=True)

        def show(failure: Failure, name: str = name) -> None:
            if not args.json:
                print(_failure(failure, name, args.kernel), flush=True)

        tally = fuzz(
            setup, args.seconds, args.seed, args.graphs, args.jobs, args.cases, report=show
        )  # fmt: skip
        tallies[name] = tally
        if not args.json:
            print(summary(tally, what))
    if args.json:
        rows = [{"backend": name, **_as_dict(tally)} for name, tally in tallies.items()]
        print_json({"mode": "fuzz", "backends": rows})
    return int(any(tally.failed for tally in tallies.values()))


def _as_dict(tally: Tally) -> dict[str, Any]:
    """The counts for JSON. Not by `asdict`: before Python 3.12 it counts a Counter's items."""
    counts = {field.name: getattr(tally, field.name) for field in fields(tally)}
    return counts | {"failures": [asdict(failure) for failure in tally.failures]}


def _failure(failure: Failure, name: str, kernel: str) -> str:
    option = f" --kernel {shlex.quote(kernel)}" if kernel else ""
    is_shrunk = failure.small != failure.case and len(failure.case) < 2000
    origin = f", shrunk from {failure.case}" if is_shrunk else ""
    lines = [
        f"  {failure.why} {verdict(False)}",
        f"    pyggml parity -b {name}{option} --case {shlex.quote(failure.small)}",
        f"    number {failure.number}{origin}",
    ]
    return "\n".join(lines)


def summary(tally: Tally, what: str) -> str:
    """How many cases ran, and how often each failure occurred."""
    rate = f"{tally.cases / max(tally.seconds, 1e-9):.0f} a second"
    cases, ops = counted(tally.cases, what), counted(len(tally.ops), "op")
    lines = [
        f"  {cases} of {ops} in {tally.seconds:.1f} s ({rate}): "
        f"{tally.failed} failed, {tally.unsupported} not supported, "
        f"{tally.deaths} ended the process"
    ]
    lines += [f"    {count} x {failure}" for failure, count in tally.kinds.most_common()]
    lines.append(f"  {verdict(not tally.failed)}")
    return "\n".join(lines)


def ops_of(args: argparse.Namespace, texts: Sequence[str]) -> frozenset[str]:
    """The ops of these cases; of a graph, those of -o."""
    named = frozenset(args.op.split(",")) if args.op else frozenset()
    return frozenset(op_in(text) for text in texts if not is_graph(text)) or named


def run_texts(args: argparse.Namespace, names: list[str]) -> int:
    """Run the case or graph of --case, or the ops of --ops, in a process that may die."""
    failed = False
    reports = []
    for name in names:
        texts = [args.case] if args.case else own_cases(args.ops, args.op)
        ops = ops_of(args, texts)
        setup = Setup(name, kernel=args.kernel, ops=ops, file=args.ops)
        counts: Counter[str] = Counter()
        rows: list[Outcome] = []
        with Pool(setup, args.jobs) as pool:
            for outcome in pool.run(texts):
                counts[outcome.status] += 1
                if args.json:
                    rows.append(outcome)
                elif args.case or outcome.status == "fail":
                    print(f"{name}: {outcome.case}: {_result(outcome)}")
                elif outcome.status == "unsupported" and counts["unsupported"] == 1:
                    print(f"{name}: {outcome.case}: {_result(outcome)} (not repeated)")
        failed |= counts["fail"] > 0
        reports.append({"backend": name, "cases": [asdict(row) for row in rows]})
        if args.ops and not args.json:
            cases = counted(len(texts), "case")
            print(
                f"{name}: {', '.join(sorted(ops))}: {cases}, {counts['fail']} failed, "
                f"{counts['unsupported']} not supported"
            )
    if args.json:
        print_json({"mode": "test", "backends": reports})
    return int(failed)


def _result(outcome: Outcome) -> str:
    if outcome.status == "unsupported":
        return f"not supported: {outcome.why}"
    return verdict(True) if outcome.status == "ok" else f"{outcome.why} {verdict(False)}"

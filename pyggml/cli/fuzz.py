"""`pyggml parity --mode fuzz`: random cases or graphs on a backend, and what became of them."""

from __future__ import annotations

import argparse
import json
import shlex
from collections import Counter
from dataclasses import asdict

from pyggml.errors import GraphError
from pyggml.parity.fuzz import Failure, Tally, fuzz
from pyggml.parity.own import own_cases
from pyggml.parity.running import Outcome
from pyggml.parity.worker import Pool, Setup


def run(args: argparse.Namespace, names: list[str]) -> int:
    """Every backend in turn; status 1 where a case failed."""
    if args.graphs and (args.op or args.kernel):
        raise GraphError("--graphs makes graphs of all ops: it does not go with -o or --kernel")
    told = {}
    for name in names:
        ops = frozenset(args.op.split(",")) if args.op else frozenset()
        setup = Setup(name, kernel=args.kernel, ops=ops)
        what = "graphs" if args.graphs else "cases"
        if not args.json:
            print(f"{name}: random {what} of seed {args.seed}", flush=True)

        def tell(failure: Failure, name: str = name) -> None:
            if not args.json:
                print(_failure(failure, name, args.kernel), flush=True)

        tally = fuzz(
            setup, args.seconds, args.seed, args.graphs, args.jobs, args.cases, told=tell
        )  # fmt: skip
        told[name] = tally
        if not args.json:
            print(summary(tally, what))
    if args.json:
        rows = [{"backend": name, **asdict(tally)} for name, tally in told.items()]
        print(json.dumps({"mode": "fuzz", "backends": rows}))
    return int(any(tally.failed for tally in told.values()))


def _failure(failure: Failure, name: str, kernel: str) -> str:
    own = f" --kernel {shlex.quote(kernel)}" if kernel else ""
    lines = [
        f"  {failure.why} FAIL",
        f"    pyggml parity -b {name}{own} --case {shlex.quote(failure.small)}",
    ]
    shrunk = failure.small != failure.case and len(failure.case) < 2000
    lines.append(
        f"    number {failure.number}" + (f", shrunk from {failure.case}" if shrunk else "")
    )
    return "\n".join(lines)


def summary(tally: Tally, what: str) -> str:
    """How much ran, and what failed how often."""
    rate = f"{tally.cases / max(tally.seconds, 1e-9):.0f} a second"
    lines = [
        f"  {tally.cases} {what} of {len(tally.ops)} ops in {tally.seconds:.1f} s ({rate}): "
        f"{tally.failed} failed, {tally.unsupported} not supported, "
        f"{tally.deaths} ended the process"
    ]
    lines += [f"    {count} x {kind}" for kind, count in tally.kinds.most_common()]
    lines.append("  FAIL" if tally.failed else "  OK")
    return "\n".join(lines)


def run_given(args: argparse.Namespace, names: list[str]) -> int:
    """One case or graph by its text, or the ops of a file; each in a process that may die."""
    failed = False
    for name in names:
        texts = [args.case] if args.case else own_cases(args.ops, args.op)
        ops = frozenset(text.partition("(")[0].removesuffix(".means") for text in texts)
        setup = Setup(name, kernel=args.kernel, ops=ops, file=args.ops)
        counts: Counter[str] = Counter()
        with Pool(setup, args.jobs) as pool:
            for outcome in pool.run(texts):
                counts[outcome.status] += 1
                if args.json:
                    print(json.dumps({"backend": name, **asdict(outcome)}, default=str))
                elif args.case or outcome.status == "fail":
                    print(f"{name}: {outcome.case}: {_given(outcome)}")
                elif outcome.status == "unsupported" and counts["unsupported"] == 1:
                    print(f"{name}: {outcome.case}: {_given(outcome)}, and others like it")
        failed |= counts["fail"] > 0
        if args.ops and not args.json:
            told = ", ".join(sorted(ops))
            print(
                f"{name}: {told}: {len(texts)} cases, {counts['fail']} failed, "
                f"{counts['unsupported']} not supported"
            )
    return int(failed)


def _given(outcome: Outcome) -> str:
    if outcome.status == "unsupported":
        return f"not supported: {outcome.why}"
    return "OK" if outcome.status == "ok" else f"{outcome.why} FAIL"

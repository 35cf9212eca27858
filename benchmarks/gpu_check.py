"""Is the CUDA backend right on this GPU? Parity cases, faults, whole plans, and a few speeds.

    python benchmarks/gpu_check.py                        everything, the small grid
    python benchmarks/gpu_check.py parity -o 'rope|cast'  cases of ops that match, all at once
    python benchmarks/gpu_check.py parity --grid all -j 8

Each worker is a process of its own. One whose GPU context is lost by a kernel reports the case
and begins again behind it. Prints a short table; the whole log goes to --log.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

from gpu_faults import faults
from gpu_plans import plans, speed

from pyggml.errors import DeviceError, PyggmlError

#: What a DeviceError says when the context is lost.
LOST = "can no longer use the GPU"


def _cases(grid: str, pattern: str, every: int = 1) -> list[str]:
    from pyggml.parity.cases import cases
    from pyggml.parity.grid import all_cases

    found = all_cases() if grid == "all" else cases()
    return [str(case) for case in found if re.fullmatch(pattern, case.op)][::every]


def worker(lines: Sequence[str]) -> int:
    """Check cases; an outcome a line as JSON. Ends after a case that lost the GPU."""
    from pyggml.parity.case import Case
    from pyggml.parity.running import tested

    for line in lines:
        try:
            outcome = tested(Case.parse(line), "cuda")
            status, why, error = outcome.status, outcome.why, outcome.error
        except DeviceError as fault:
            status, why, error = "fail", f"{type(fault).__name__}: {fault}", None
        print(json.dumps([line, status, why, error]), flush=True)
        if LOST in why:
            return 1
    return 0


def _run_worker(lines: Sequence[str], seconds: float) -> list[tuple[str, str, str, float | None]]:
    """Outcomes of cases, by as many processes as it takes."""
    done: list[tuple[str, str, str, float | None]] = []
    while len(done) < len(lines):
        rest = lines[len(done) :]
        command = [sys.executable, "-W", "ignore", __file__, "worker"]
        try:
            ran = subprocess.run(
                command, input="\n".join(rest), capture_output=True, text=True, timeout=seconds
            )
            out, err = ran.stdout, ran.stderr
        except subprocess.TimeoutExpired as late:
            out, err = (late.stdout or b"").decode(), f"no answer within {seconds} s"
        found = [tuple(json.loads(row)) for row in out.splitlines() if row.startswith("[")]
        done += found
        if len(found) < len(rest) and (not found or LOST not in str(found[-1][2])):
            done.append((lines[len(done)], "fail", f"the worker died: {err[-600:]}", None))
    return done


def parity(lines: list[str], jobs: int, log: list[str]) -> bool:
    parts = [lines[i::jobs] for i in range(jobs)]
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = [o for part in pool.map(lambda p: _run_worker(p, 400), parts) for o in part]
    table: dict[str, Counter[str]] = defaultdict(Counter)
    worst: dict[str, float] = defaultdict(float)
    shown: Counter[str] = Counter()
    for line, status, why, error in outcomes:
        op = line.partition("(")[0]
        table[op][status] += 1
        worst[op] = max(worst[op], error or 0.0)
        log.append(f"{status:12} {line}  {why}")
        if status == "fail" and shown[op] < 3:
            shown[op] += 1
            print(f"FAIL {line}\n     {why[:500]}")
    print(f"{'op':18} {'ok':>6} {'fail':>6} {'unsup':>6}  worst NMSE")
    for op, counts in sorted(table.items()):
        numbers = " ".join(f"{counts[s]:>6}" for s in ("ok", "fail", "unsupported"))
        print(f"{op:18} {numbers}  {worst[op]:.2g}")
    total: Counter[str] = sum(table.values(), Counter())
    print(f"{'all':18} " + " ".join(f"{total[s]:>6}" for s in ("ok", "fail", "unsupported")))
    return not total["fail"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {"faults": faults, "plans": plans, "speed": speed}
    parser.add_argument("part", nargs="*", default=["parity", *parts])
    parser.add_argument("-o", "--ops", default=".*", help="a pattern of whole op names")
    parser.add_argument("--grid", choices=["small", "all"], default="small")
    parser.add_argument("--every", type=int, default=1, help="only each so manieth case")
    parser.add_argument("--list", action="store_true", help="print the cases, for `worker`")
    parser.add_argument("-j", "--jobs", type=int, default=8)
    parser.add_argument("--log", type=Path)
    args = parser.parse_args()
    if args.part == ["worker"]:
        return worker(sys.stdin.read().splitlines())
    if args.list:
        print("\n".join(_cases(args.grid, args.ops, args.every)))
        return 0
    log: list[str] = []
    fine = True
    for part in args.part:
        start = perf_counter()
        try:
            if part == "parity":
                fine &= parity(_cases(args.grid, args.ops, args.every), args.jobs, log)
            else:
                fine &= parts[part](log)
        except PyggmlError as error:
            print(f"{part} FAIL {error}")
            fine = False
        print(f"-- {part}: {perf_counter() - start:.1f} s")
    if args.log:
        args.log.write_text("\n".join(log))
    print("gpu_check:", "ok" if fine else "FAIL")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())

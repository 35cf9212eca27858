"""Is the CUDA backend right on this GPU? Parity cases, faults, whole plans, large tensors, speeds.

    python benchmarks/gpu_check.py                        all of these, the small grid
    python benchmarks/gpu_check.py parity -o 'rope|cast'  cases of ops that match
    python benchmarks/gpu_check.py parity --grid all -j 16
    python benchmarks/gpu_check.py memcheck racecheck     a spread of the grid by compute-sanitizer

Prints a short table; the whole log goes to --log.
"""

from __future__ import annotations

import argparse
import re
import sys
from os import cpu_count
from pathlib import Path
from statistics import mean
from time import perf_counter

from gpu_bench import tell
from gpu_faults import faults
from gpu_fusions import fusions
from gpu_large import large
from gpu_parity import PARTS, checked, report
from gpu_plans import plans, speed
from gpu_sanitize import sanitized

from pyggml.errors import PyggmlError
from pyggml.parity.cases import cases
from pyggml.parity.grid import all_cases

#: Of compute-sanitizer, and the seconds that each is given.
TOOLS, SANITIZED = ("memcheck", "racecheck", "synccheck"), 60


def _cases(grid: str, pattern: str, every: int = 1) -> list[str]:
    found = all_cases() if grid == "all" else cases()
    return [str(case) for case in found if re.fullmatch(pattern, case.op)][::every]


def parity(args: argparse.Namespace, log: list[str]) -> bool:
    """Whether every case was reached and none failed."""
    lines = _cases(args.grid, args.ops, args.every)
    outcomes, spent = checked(lines, args.jobs, args.seconds, args.backend)
    total = report(outcomes, log)
    told = ", ".join(f"{part} {mean(s[part] for s in spent):.1f} s" for part in PARTS if spent)
    print(f"{args.jobs} workers, on average: {told} (kernels and runs are part of cases)")
    missing = len(lines) - len(outcomes)
    if missing:
        print(f"FAIL {missing} of {len(lines)} cases were not reached in {args.seconds:g} s")
    tell("parity_cases", "cases", [len(outcomes)])
    tell("parity_failed", "cases", [total["fail"] + missing])
    tell("parity_unsupported_share", "", [total["unsupported"] / max(1, len(outcomes))])
    return not total["fail"] and not missing


def sanitize(tool: str, args: argparse.Namespace, log: list[str]) -> bool:
    """Whether compute-sanitizer finds nothing, or cannot be run: 0 cases in the record."""
    lines = _cases(args.grid, args.ops, args.every)
    ran, errors, fine = sanitized(tool, lines, args.jobs, min(args.seconds, SANITIZED), log)
    tell(f"{tool}_cases", "cases", [ran])
    if ran:
        tell(f"{tool}_errors", "", [errors])
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {
        "faults": faults,
        "plans": plans,
        "fusions": fusions,
        "large": large,
        "speed": speed,
    }
    parser.add_argument("part", nargs="*", default=["parity", *parts])
    parser.add_argument("-o", "--ops", default=".*", help="a pattern of whole op names")
    parser.add_argument("--grid", choices=["small", "all"], default="small")
    parser.add_argument("--every", type=int, default=1, help="only each so manieth case")
    parser.add_argument("-j", "--jobs", type=int, default=cpu_count())
    parser.add_argument("--seconds", type=float, default=600, help="after which no case is begun")
    parser.add_argument("--backend", default="cuda", help="whose cases (to try this without a GPU)")
    parser.add_argument("--log", type=Path)
    args = parser.parse_args()
    log: list[str] = []
    fine = True
    for part in args.part:
        start = perf_counter()
        try:
            if part == "parity":
                fine &= parity(args, log)
            elif part in TOOLS:
                fine &= sanitize(part, args, log)
            else:
                right = parts[part](log)
                tell(f"{part}_failed", "", [float(not right)])
                fine &= right
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

"""The GPU's record: every row that docs/performance.md shows, measured in one run.

    python benchmarks/gpu.py                       all parts, into benchmarks/results/CARD/
    python benchmarks/gpu.py layer linear --out F  some parts
    python benchmarks/gpu.py --join A B --out F    the parts of two records of one kind of GPU
    python benchmarks/gpu.py --smoke --out F       all at once with few samples: does it all run?

Parts: layer (one V2-Lite MoE layer), linear (products, experts), attention, amb (the cost of an
attention memory budget), compile, examples (their errors), and the tests of tests/gpu: parity (the
whole grid, or --grid small), sanitize (a spread of the grid under compute-sanitizer; 0 cases where
that cannot run), checks (all others). Each runs in processes of its own, with a time limit. The
record is written after each part, and names the tests that were skipped. The status is 1 where a
part failed or left out a row that docs/performance.md needs; the other parts are measured all the
same.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.append(str(ROOT))

from benchmarks.gpu_bench import ROWS, SMOKE  # noqa: E402
from benchmarks.gpu_record import (  # noqa: E402
    NAMES,
    card,
    commit,
    example_rows,
    join,
    lines_of,
    machine,
    report_rows,
)
from tools.kernel_record import fingerprint  # noqa: E402
from tools.tables import BARS  # noqa: E402

#: The tests that run on a GPU.
TESTS = "tests/gpu"


@dataclass(frozen=True)
class Part:
    """What Python runs at the same time, and the seconds that it has."""

    commands: tuple[tuple[str, ...], ...]
    seconds: float


def parts(args: argparse.Namespace, folder: Path) -> dict[str, Part]:
    """What to run. Examples leave their rows as `folder`/examples_*.json, tests as *.xml."""
    small = ("--prompt", "32", "--decode", "1") if args.smoke else ()
    examples = tuple(
        (f"examples/{name}.py", "--backend", "cuda", "--prec", prec, *small,
         "--json", str(folder / f"examples_{name}_{prec}.json"))
        for name in ("deepseek_attention", "deepseek_moe_layer")
        for prec in ("default", "f32")
    )  # fmt: skip
    quick = ["--gpu-quick"] * (args.smoke or args.grid == "small")
    jobs = ["--gpu-jobs", "4"] * args.smoke

    def tests(name: str, *words: str) -> tuple[tuple[str, ...], ...]:
        report = ("-o", "junit_family=xunit1", f"--junitxml={folder / name}.xml")
        return (("-m", "pytest", "-m", "gpu", "-rs", *report, *jobs, *words),)

    grid, sanitizers = (f"{TESTS}/test_gpu_{name}.py" for name in ("parity", "sanitize"))
    others = (TESTS, f"--ignore={grid}", f"--ignore={sanitizers}")
    brief = ("-k", "not synccheck", "--gpu-sanitize", "5" if args.smoke else "10")
    seconds = ("--gpu-seconds", str(args.parity_seconds))
    return {
        "layer": Part((("benchmarks/gpu_layer.py",),), 120),
        "linear": Part((("benchmarks/gpu_linear.py",),), 120),
        "attention": Part((("benchmarks/gpu_attention.py",),), 150),
        "amb": Part((("benchmarks/gpu_attention.py", "amb"),), 60),
        "compile": Part((("benchmarks/gpu_layer.py", "compile"),), 150),
        "examples": Part(examples, 180),
        "parity": Part(tests("parity", grid, *quick, *seconds), args.parity_seconds + 60),
        "checks": Part(tests("checks", *others), 400),
        "sanitize": Part(tests("sanitize", sanitizers, *quick, *brief), 240),
    }


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """End it and its children. Tests stop what they started, and still write their report."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(10)
            return
        except subprocess.TimeoutExpired:
            continue


class Run:
    """A part that is running."""

    def __init__(self, name: str, part: Part, folder: Path, smoke: bool) -> None:
        self.name, self.part, self.begin = name, part, perf_counter()
        self.rows, self.log = folder / f"{name}.rows", folder / f"{name}.log"
        found = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ, ROWS: str(self.rows), SMOKE: "1" * smoke, "PYTHONPATH": ":".join(found)
        }  # fmt: skip
        self.processes = [self._started(words, environment) for words in part.commands]

    def _started(self, words: Sequence[str], environment: dict[str, str]) -> Any:
        command = [sys.executable, "-W", "ignore", *words]
        with self.log.open("a") as log:  # a session of its own: children end with it
            return subprocess.Popen(
                command, stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True
            )

    def finish(self) -> list[str]:
        """What went wrong; ends what is late. `ended`: whether all ended by themselves."""
        faults, self.ended = [], True
        for words, process in zip(self.part.commands, self.processes):
            left = self.part.seconds - (perf_counter() - self.begin)
            try:
                status = process.wait(max(left, 0.1))
            except subprocess.TimeoutExpired:
                interrupt(process)
                self.ended = False
                status = f"no end within {self.part.seconds:g} s"
            if status:
                program = words[1] if words[0] == "-m" else Path(words[0]).name
                faults.append(f"{self.name}: {program}: {status}")
        self.seconds = perf_counter() - self.begin
        return faults


def command(args: argparse.Namespace) -> str:
    """What measures the same, wherever its record is written."""
    some = [] if args.parts == list(NAMES) else args.parts
    grid = [] if args.grid == "all" else ["--grid", args.grid]
    return " ".join(["python benchmarks/gpu.py", *some, *grid, *["--smoke"] * args.smoke])


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(NAMES)}")
    add("--out", type=Path, help="default: benchmarks/results/CARD/DATE.json")
    add("--join", nargs=2, type=Path, metavar="RECORD", help="two records as one, into --out")
    add("--log", type=Path, help="everything that the parts print")
    add("--commit", help="where git cannot be asked")
    add("--grid", choices=("all", "small"), default="all", help="of parity (default: all)")
    add("--parity-seconds", type=float, default=270, metavar="S", help="(default: %(default)s)")
    add("--smoke", action="store_true", help="all parts at once, few samples; no record")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(NAMES):
        parser.error(f"no part {unknown.pop()!r}; there are {', '.join(NAMES)}")
    if (args.smoke or args.join) and not args.out:
        parser.error("give --out: only a run of parts has a place for its record")
    args.parts = [name for name in NAMES if not args.parts or name in args.parts]
    return args


def collect(run: Run, folder: Path, told: dict[str, Any], log: Path | None) -> list[str]:
    """What a part measured, into the record; what went wrong."""
    faults, found = run.finish(), lines_of(run.rows)
    rows = [row for row in found if "name" in row]
    if run.name == "examples":
        rows += example_rows(folder)
    report = folder / f"{run.name}.xml"
    if report.exists():
        counts, skipped = report_rows(report, run.ended)
        rows += counts
        told["skipped"] += skipped
    print(f"-- {run.name}: {run.seconds:.0f} s", flush=True)
    for row in rows:
        print(f"{row['name']:32} {row['value']:10.4g} {row['unit']}")
    text = run.log.read_text()
    if faults:
        print(f"!! {'; '.join(faults)}\n{text[-3000:]}", flush=True)
    if log is not None:
        with log.open("a") as file:
            file.write(f"== {run.name}\n{text}\n")
    told["rows"] += rows
    told["clocks"] += [line for line in found if "clocks" in line]
    told["seconds"][run.name] = round(run.seconds, 1)
    told["faults"] += faults
    return faults


def finish(told: dict[str, Any], out: Path) -> int:
    """Write the record, and say what is wrong with it."""
    if len(told["seconds"]) == len(NAMES):
        missing = BARS.keys() - {row["name"] for row in told["rows"]}
        told["faults"] += [f"no row {name}" for name in sorted(missing)]
    out.write_text(json.dumps(told, indent=1) + "\n")
    print(f"{sum(told['seconds'].values()):.0f} s in all; {out}")
    for skip in told["skipped"]:
        print(f"skipped: {skip}")
    for fault in told["faults"]:
        print(f"!! {fault}")
    return 1 if told["faults"] else 0


def main() -> int:
    args = parsed()
    if args.join:
        return finish(join(*(json.loads(path.read_text()) for path in args.join)), args.out)
    told: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": command(args),
        "commit": args.commit or commit(),
        "kernels": fingerprint(),
        "machine": machine(),
        "grid": args.grid,
        "clocks": [],
        "seconds": {},
        "skipped": [],
        "faults": [],
        "rows": [],
    }
    name = card(told["machine"]["gpu"])
    if not (args.out or name):
        raise SystemExit("nvidia-smi names no GPU here: give --out")
    out: Path = args.out or HERE / "results" / name / f"{told['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as name:
        folder = Path(name)
        wanted = {name: part for name, part in parts(args, folder).items() if name in args.parts}
        started = (Run(name, part, folder, args.smoke) for name, part in wanted.items())
        for run in list(started) if args.smoke else started:
            collect(run, folder, told, args.log)
            out.write_text(json.dumps(told, indent=1) + "\n")  # kept if a later part hangs
    return finish(told, out)


if __name__ == "__main__":
    sys.exit(main())

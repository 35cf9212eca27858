"""Measure every row of the GPU table in docs/performance.md, and write a record.

    python benchmarks/gpu.py                       all parts, into benchmarks/results/CARD/
    python benchmarks/gpu.py layer linear --out F  some parts
    python benchmarks/gpu.py --join A B --out F    join two records from GPUs of the same model
    python benchmarks/gpu.py --smoke --out F       all parts at once, few samples: do they run?

layer      one V2-Lite MoE layer
model      all of V2-Lite: loading, prompts, decoding
peers      V2-Lite beside llama.cpp, if PYGGML_LLAMA_BENCH names its llama-bench
linear     products and experts
attention  flash attention
amb        the cost of an attention memory budget
sparse     sparse attention: its parts, and layers of DeepSeek V4
v4_whole   all of DeepSeek-V4-Flash, if the GPU has room for it
compile    compiling and loading kernels
examples   errors of the examples
fuzz       random cases and random graphs (--fuzz-seconds)
parity     the whole parity grid, or the small one with --grid small
sanitize   cases of the grid under compute-sanitizer; 0 cases if it cannot run
checks     all other tests in tests/gpu

Each part runs in its own processes, with a time limit. The record is written after each part and
lists skipped tests. If a part fails, the others still run. The status is 1 if a part failed or a
row of docs/performance.md is missing.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.append(str(ROOT))

from benchmarks.bars import BARS, set_bars  # noqa: E402
from benchmarks.gpu_bench import ROWS, SMOKE  # noqa: E402
from benchmarks.gpu_record import (  # noqa: E402
    NAMES,
    card,
    example_rows,
    join,
    lines_of,
    machine,
    report_rows,
    versions,
)
from benchmarks.record import Record, Row, new, read, write  # noqa: E402

#: The folder of tests that need a GPU.
TESTS = "tests/gpu"


@dataclass(frozen=True)
class Part:
    """Python commands that run at the same time, and the time limit."""

    commands: tuple[tuple[str, ...], ...]
    seconds: float


def parts(args: argparse.Namespace, folder: Path) -> dict[str, Part]:
    """All parts by name. Examples write rows to `folder`/examples_*.json, tests to *.xml."""
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
    fuzz_time = () if args.smoke else ("--seconds", str(args.fuzz_seconds))
    return {
        "layer": Part((("benchmarks/gpu_layer.py",),), 120),
        "model": Part((("benchmarks/gpu_model.py", "--compare", "4"),), 360),
        "peers": Part((("benchmarks/gpu_peers.py",),), 300),
        "linear": Part((("benchmarks/gpu_linear.py",),), 120),
        "attention": Part((("benchmarks/gpu_attention.py",),), 150),
        "amb": Part((("benchmarks/gpu_attention.py", "amb"),), 60),
        "sparse": Part((("benchmarks/gpu_sparse.py",),), 180),
        "v4_whole": Part((("benchmarks/gpu_v4.py",),), 180),
        "compile": Part((("benchmarks/gpu_layer.py", "compile"),), 150),
        "examples": Part(examples, 180),
        "fuzz": Part((("benchmarks/gpu_fuzz.py", *fuzz_time),), args.fuzz_seconds + 60),
        "parity": Part(tests("parity", grid, *quick, *seconds), args.parity_seconds + 60),
        "checks": Part(tests("checks", *others), 900),
        "sanitize": Part(tests("sanitize", sanitizers, *quick, *brief), 240),
    }


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """Stop a process and its children. SIGINT first: pytest then still writes its report."""
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
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ, ROWS: str(self.rows), SMOKE: "1" * smoke, "PYTHONPATH": ":".join(path)
        }  # fmt: skip
        self.processes = [self._start(words, environment) for words in part.commands]

    def _start(self, words: Sequence[str], environment: dict[str, str]) -> Any:
        command = [sys.executable, "-W", "ignore", *words]
        with self.log.open("a") as log:
            # In a new session, so that `interrupt` reaches its children.
            return subprocess.Popen(
                command, stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True
            )

    def finish(self) -> list[str]:
        """Wait, stop processes that are late, and return faults. `ended`: whether none was late."""
        faults, self.ended = [], True
        for words, process in zip(self.part.commands, self.processes):
            remaining = self.part.seconds - (perf_counter() - self.begin)
            try:
                status = process.wait(max(remaining, 0.1))
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
    """The command that measures the same, without options for output."""
    parts = [] if args.parts == list(NAMES) else args.parts
    grid = [] if args.grid == "all" else ["--grid", args.grid]
    return " ".join(["python benchmarks/gpu.py", *parts, *grid, *["--smoke"] * args.smoke])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"one of {', '.join(NAMES)} (default: all)")
    add("--out", type=Path, help="default: benchmarks/results/CARD/DATE.json")
    add("--join", nargs=2, type=Path, metavar="RECORD", help="join two records into --out")
    add("--log", type=Path, help="file for the output of the parts")
    add("--commit", help="commit to record, if git is not there")
    add("--grid", choices=("all", "small"), default="all", help="cases of parity (default: all)")
    add(
        "--parity-seconds",
        type=float,
        default=270,
        metavar="S",
        help="time limit of parity (default: %(default)s)",
    )
    add("--fuzz-seconds", type=int, default=300, metavar="S", help="of fuzz (default: 300)")
    add("--smoke", action="store_true", help="all parts at once, with few samples")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(NAMES):
        parser.error(f"unknown part {unknown.pop()!r}; choose from {', '.join(NAMES)}")
    if (args.smoke or args.join) and not args.out:
        parser.error("--smoke and --join need --out")
    args.parts = [name for name in NAMES if not args.parts or name in args.parts]
    return args


def collect(run: Run, folder: Path, record: Record, log: Path | None) -> None:
    """Wait for a part, and add what it measured to the record."""
    faults, lines = run.finish(), lines_of(run.rows)
    rows = [row for row in lines if "name" in row]
    if run.name == "examples":
        rows += example_rows(folder)
    report = folder / f"{run.name}.xml"
    if report.exists():
        counts, skipped = report_rows(report, run.ended)
        rows += counts
        record["about"]["skipped"] += skipped
    print(f"-- {run.name}: {run.seconds:.0f} s", flush=True)
    for row in rows:
        print(f"{row['name']:32} {row['value']:10.4g} {row['unit']}")
    text = run.log.read_text()
    if faults:
        print(f"!! {'; '.join(faults)}\n{text[-3000:]}", flush=True)
    if log is not None:
        with log.open("a") as file:
            file.write(f"== {run.name}\n{text}\n")
    record["rows"] = merged(record["rows"], rows)
    record["clocks"] += [line for line in lines if "clocks" in line]
    record["about"]["skipped"] += [line["skipped"] for line in lines if "skipped" in line]
    record["about"]["seconds"][run.name] = round(run.seconds, 1)
    record["about"]["faults"] += faults


def merged(rows: list[Row], more: list[Row]) -> list[Row]:
    """Both; of two rows with one name, the later one."""
    return list({row["name"]: row for row in (*rows, *more)}.values())


def finish(record: Record, out: Path) -> int:
    """Write the record, print its faults, and return the exit status."""
    about = record["about"]
    set_bars(record["rows"])
    if len(about["seconds"]) == len(NAMES):
        skipped = tuple(text.partition(":")[0] for text in about["skipped"])
        missing = BARS.keys() - {row["name"] for row in record["rows"]}
        missing = {name for name in missing if not name.startswith(skipped)}
        about["faults"] += [f"no row {name}" for name in sorted(missing)]
    write(out, record)
    print(f"{sum(about['seconds'].values()):.0f} s in all; {out}")
    for skip in about["skipped"]:
        print(f"skipped: {skip}")
    for fault in about["faults"]:
        print(f"!! {fault}")
    return 1 if about["faults"] else 0


def main() -> int:
    args = arguments()
    if args.join:
        return finish(join(*map(read, args.join)), args.out)
    about: dict[str, Any] = {"grid": args.grid, "seconds": {}, "skipped": [], "faults": []}
    record = new(command(args), machine=machine(), versions=versions(), about=about)
    record["commit"] = args.commit or record["commit"]
    name = card(record["machine"]["gpu"])
    if not (args.out or name):
        raise SystemExit("nvidia-smi finds no GPU; give --out")
    out: Path = args.out or HERE / "results" / name / f"{record['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as name:
        folder = Path(name)
        selection = {name: part for name, part in parts(args, folder).items() if name in args.parts}
        runs = (Run(name, part, folder, args.smoke) for name, part in selection.items())
        for run in list(runs) if args.smoke else runs:  # a list starts all of them at once
            collect(run, folder, record, args.log)
            write(out, record)  # kept if a later part hangs
    return finish(record, out)


if __name__ == "__main__":
    sys.exit(main())

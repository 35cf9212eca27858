"""The GPU's record: every row that docs/performance.md shows, measured in one run.

    python benchmarks/gpu.py                       all parts, into benchmarks/results/h200/
    python benchmarks/gpu.py layer linear --out F  some parts
    python benchmarks/gpu.py --smoke --out F       all at once with few samples: does it all run?

Parts: layer (one V2-Lite MoE layer), linear (products, experts), attention, amb (the cost of an
attention memory budget), compile, examples (their errors), parity (the whole grid, or --grid
small), checks (faults, whole plans, fused steps, tensors past 2^31 elements), sanitize (a spread of
the grid under compute-sanitizer; 0 cases where that cannot run). Each runs in processes of its own
with a time limit; what lies behind each row says its own file, gpu_*.py. The record is written
after each part. The status is 1 where a part failed or gave no row that is wanted; the other parts
are measured all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.append(str(ROOT))

from benchmarks.gpu_bench import ROWS, SMOKE, smi  # noqa: E402
from pyggml.backends.cuda.device.compiler import nvrtc_version  # noqa: E402
from pyggml.errors import DeviceError  # noqa: E402
from tools.kernel_record import fingerprint  # noqa: E402
from tools.tables import BARS  # noqa: E402

Row = dict[str, Any]
PACKAGES = ("numpy", "pycuda", "cupy-cuda13x", "cuda-bindings", "torch")


@dataclass(frozen=True)
class Part:
    """Scripts that run beside each other, and the seconds that they have."""

    commands: tuple[tuple[str, ...], ...]
    seconds: float


def parts(args: argparse.Namespace, folder: Path) -> dict[str, Part]:
    """What to run. Examples leave their rows as `folder`/examples_*.json."""
    small = ("--prompt", "32", "--decode", "1") if args.smoke else ()
    examples = tuple(
        (f"../examples/{name}.py", "--backend", "cuda", "--prec", prec, *small,
         "--json", str(folder / f"examples_{name}_{prec}.json"))
        for name in ("deepseek_attention", "deepseek_moe_layer")
        for prec in ("default", "f32")
    )  # fmt: skip
    grid: tuple[str, ...] = ("--grid", args.grid, "--seconds", str(args.parity_seconds))
    if args.smoke:
        grid = ("--grid", "small", "--every", "20", "-j", "4")
    brief = ("--seconds", "5" if args.smoke else "10")
    return {
        "layer": Part((("gpu_layer.py",),), 120),
        "linear": Part((("gpu_linear_times.py",),), 120),
        "attention": Part((("gpu_attention_times.py",),), 150),
        "amb": Part((("gpu_amb.py",),), 60),
        "compile": Part((("gpu_compile.py",),), 150),
        "examples": Part(examples, 180),
        "parity": Part((("gpu_check.py", "parity", *grid),), args.parity_seconds + 60),
        "checks": Part((("gpu_check.py", "faults", "plans", "fusions", "large"),), 240),
        "sanitize": Part((("gpu_check.py", "memcheck", "racecheck", *brief),), 240),
    }


NAMES = (
    "layer",
    "linear",
    "attention",
    "amb",
    "compile",
    "examples",
    "parity",
    "checks",
    "sanitize",
)


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
        script, *rest = words
        command = [sys.executable, "-W", "ignore", str((HERE / script).resolve()), *rest]
        with self.log.open("a") as log:  # a session of its own: children end with it
            return subprocess.Popen(
                command, stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True
            )

    def finish(self) -> list[str]:
        """What went wrong; ends what is late."""
        faults = []
        for words, process in zip(self.part.commands, self.processes):
            left = self.part.seconds - (perf_counter() - self.begin)
            try:
                status = process.wait(max(left, 0.1))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = f"no end within {self.part.seconds:g} s"
            if status:
                faults.append(f"{self.name}: {words[0]}: {status}")
        self.seconds = perf_counter() - self.begin
        return faults


def lines_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def example_rows(folder: Path) -> Iterator[Row]:
    """The worst error of a cache type and precision over both examples; samples are all of them."""
    found: dict[str, list[float]] = {}
    for path in sorted(folder.glob("examples_*.json")):
        tail = "_prec_f32" if path.stem.endswith("_f32") else ""
        for row in json.loads(path.read_text())["rows"]:
            errors = [value for key, value in row.items() if key.endswith("error")]
            found.setdefault(f"example_worst_error_{row['cache']}{tail}", []).extend(errors)
    for name, errors in found.items():
        yield {"name": name, "value": max(errors), "unit": "", "samples": errors}


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def nvrtc() -> str:
    try:
        return ".".join(map(str, nvrtc_version()))
    except DeviceError:
        return "not installed"


def machine() -> dict[str, str]:
    return {
        "gpu": smi("name"),
        "driver": smi("driver_version"),
        "highest clocks": smi("clocks.max.sm,clocks.max.mem"),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "nvrtc": nvrtc(),
        **{name: version(name) for name in PACKAGES},
    }


def commit() -> str:
    """Of the checkout, with a + where files differ from it; "unknown" where git cannot be asked."""
    try:
        words = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


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
    add("--out", type=Path, help="default: benchmarks/results/h200/DATE.json")
    add("--log", type=Path, help="everything that the parts print")
    add("--commit", help="where git cannot be asked")
    add("--grid", choices=("all", "small"), default="all", help="of parity (default: all)")
    add("--parity-seconds", type=float, default=270, metavar="S", help="(default: %(default)s)")
    add("--smoke", action="store_true", help="all parts at once, few samples; no record")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(NAMES):
        parser.error(f"no part {unknown.pop()!r}; there are {', '.join(NAMES)}")
    if args.smoke and not args.out:
        parser.error("--smoke makes no record: give --out")
    args.parts = [name for name in NAMES if not args.parts or name in args.parts]
    return args


def collect(run: Run, folder: Path, told: dict[str, Any], log: Path | None) -> list[str]:
    """What a part measured, into the record; what went wrong."""
    faults, found = run.finish(), lines_of(run.rows)
    rows = [row for row in found if "name" in row]
    if run.name == "examples":
        rows += example_rows(folder)
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


def main() -> int:
    args = parsed()
    told: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": command(args),
        "commit": args.commit or commit(),
        "kernels": fingerprint(),
        "machine": machine(),
        "grid": args.grid,
        "clocks": [],
        "seconds": {},
        "faults": [],
        "rows": [],
    }
    out = args.out or HERE / "results" / "h200" / f"{told['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as name:
        folder = Path(name)
        wanted = {name: part for name, part in parts(args, folder).items() if name in args.parts}
        started = (Run(name, part, folder, args.smoke) for name, part in wanted.items())
        for run in list(started) if args.smoke else started:
            collect(run, folder, told, args.log)
            if len(told["seconds"]) == len(NAMES):
                missing = BARS.keys() - {row["name"] for row in told["rows"]}
                told["faults"] += [f"no row {name}" for name in sorted(missing)]
            out.write_text(json.dumps(told, indent=1) + "\n")  # kept if a later part hangs
    print(f"{sum(told['seconds'].values()):.0f} s in all; {out}")
    for fault in told["faults"]:
        print(f"!! {fault}")
    return 1 if told["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())

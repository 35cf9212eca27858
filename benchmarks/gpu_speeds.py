"""V2-Lite by prompt length and by cache depth, and amb beside time, by `pyggml bench` and, in the
same hour on the same file, by llama-bench.

    PYGGML_LLAMA_BENCH=build/llama/bin/llama-bench python benchmarks/gpu_speeds.py --out RECORD
    python benchmarks/gpu_speeds.py --smoke --out RECORD      a tiny model on the host

The record has the rows of both as they print them (`-o json`). benchmarks/report.py makes the
tables and plots of docs/performance.md from it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from benchmarks.gpu_record import commit, machine  # noqa: E402
from pyggml.models.presets import TINY, V2_LITE  # noqa: E402
from pyggml.models.synth import synth  # noqa: E402

BATCH = ("-b", "2048", "-ub", "2048")
LENGTHS = ("-p", "512,1024,2048,4096,8192,16384", "-n", "0", "-fa", "0,1")
DEPTHS = ("-p", "0", "-n", "32", "-d", "128,1024,4096,8192,16384", "-fa", "1")
#: name -> arguments of both engines, arguments of pyggml only; None: pyggml alone
TESTS: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {
    "prompts": (LENGTHS, ()),
    "decoding": (DEPTHS, ("--loop",)),
    "standard decoding": ((*DEPTHS, "-mla", "0"), None),
    "q8_0 decoding": ((*DEPTHS, "-ctk", "q8_0", "-ctv", "q8_0"), None),
    "budgets": (("-p", "8192", "-n", "0", "-fa", "0", "-amb", "64,256,1024"), None),
    "forms": (("-p", "8192", "-n", "0", "-fa", "0,1", "-mla", "0,1,3"), None),
}
#: What --smoke takes in place of a list, and its model, whose rows q8_0 caches can hold.
SMALL = {"512,1024,2048,4096,8192,16384": "32,64", "128,1024,4096,8192,16384": "32", "8192": "64"}
SMOKE = replace(TINY, n_rot=32)


def rows(command: Sequence[str]) -> list[dict[str, Any]]:
    """The rows that a command prints as JSON. CalledProcessError if it fails."""
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    print(" ".join(command), flush=True)
    results: list[dict[str, Any]] = json.loads(result.stdout)
    for row in results:
        name = row.get("test") or f"{row['n_prompt']} {row['n_gen']}"
        print(f"  fa {row['flash_attn']} {name} d{row['n_depth']}: {row['avg_ts']:.1f} t/s")
    return results


def measured(path: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """For each of TESTS: the commands and the rows of pyggml and of llama.cpp."""
    llama = os.environ.get("PYGGML_LLAMA_BENCH")
    common = ["-m", str(path), *BATCH, "-r", str(args.repeats), "-o", "json"]
    for name, (words, own) in TESTS.items():
        if args.smoke:
            words = tuple(SMALL.get(word, word) for word in words)
        ours = [sys.executable, "-W", "ignore", "-m", "pyggml", "bench", *common]
        result = {"name": name, "pyggml": rows([*ours, *words, *(own or ())])}
        if llama and own is not None:
            result["llama.cpp"] = rows([llama, *common, "-ngl", "99", *words])
        yield {"options": " ".join(words), **result}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, help="a V2-Lite file (default: write one)")
    parser.add_argument("--out", type=Path, required=True, help="the record")
    parser.add_argument("--commit", help="commit to record, if git is not there")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each test (default: 3)")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, few tokens")
    args = parser.parse_args()
    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": "python benchmarks/gpu_speeds.py",
        "commit": args.commit or commit(),
        "machine": {} if args.smoke else machine(),
        "tests": [],
    }
    with TemporaryDirectory() as folder:
        path = args.file or Path(folder) / "lite.gguf"
        if not args.file:
            synth(path, SMOKE if args.smoke else V2_LITE, dtype="iq4_nl")
        for test in measured(path, args):
            record["tests"].append(test)
            args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

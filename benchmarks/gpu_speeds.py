"""V2-Lite by prompt length and by cache depth, and amb beside time, by `pyggml bench` and, in the
same hour on the same file, by llama-bench.

    PYGGML_LLAMA_BENCH=build/llama/bin/llama-bench python benchmarks/gpu_speeds.py --out RECORD
    python benchmarks/gpu_speeds.py --smoke --out RECORD      a tiny model on the host

A row's value is the mean of its samples; `setting` has the other fields that the engines print
(`-o json`). benchmarks/report.py makes the tables and plots of docs/performance.md from the record.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from benchmarks.gpu_record import machine, versions  # noqa: E402
from benchmarks.record import Row, new, row, write  # noqa: E402
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
    for each in results:
        name = each.get("test") or f"{each['n_prompt']} {each['n_gen']}"
        print(f"  fa {each['flash_attn']} {name} d{each['n_depth']}: {each['avg_ts']:.1f} t/s")
    return results


#: Fields of a row of llama-bench that say what was timed; those that name a row; its samples.
TIMED = ("n_prompt", "n_gen", "n_depth", "loop")
NAMING = ("flash_attn", "mla", "amb", "type_k")
SAMPLES = ("avg_ts", "samples_ts")


def record_row(test: str, engine: str, fields: dict[str, Any]) -> Row:
    """A row of llama-bench's JSON as a row of the record."""
    timed = {name: fields[name] for name in TIMED if name in fields}
    words = [f"pp{timed['n_prompt']}" if timed["n_prompt"] else f"tg{timed['n_gen']}"]
    words += ["loop"] * bool(timed.get("loop"))
    words += [f"@ d{timed['n_depth']}"] if timed["n_depth"] else []
    words += [f"{name} {fields[name]}" for name in NAMING if name in fields]
    return row(
        f"{test}, {engine}: {' '.join(words)}", "t/s", fields["avg_ts"], fields["samples_ts"],
        engine=engine, path=test, test=timed,
        setting={k: v for k, v in fields.items() if k not in (*TIMED, *SAMPLES)},
    )  # fmt: skip


def measured(path: Path, args: argparse.Namespace) -> Iterator[tuple[str, str, list[Row]]]:
    """For each of TESTS: its name, the options, and the rows of pyggml and of llama.cpp."""
    llama = os.environ.get("PYGGML_LLAMA_BENCH")
    common = ["-m", str(path), *BATCH, "-r", str(args.repeats), "-o", "json"]
    for name, (words, own) in TESTS.items():
        if args.smoke:
            words = tuple(SMALL.get(word, word) for word in words)
        ours = [sys.executable, "-W", "ignore", "-m", "pyggml", "bench", *common]
        results = {"pyggml": rows([*ours, *words, *(own or ())])}
        if llama and own is not None:
            results["llama.cpp"] = rows([llama, *common, "-ngl", "99", *words])
        of_record = [
            record_row(name, engine, fields) for engine, each in results.items() for fields in each
        ]
        yield name, " ".join(words), of_record


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
    record = new("python benchmarks/gpu_speeds.py", about={"options": {}}, versions=versions())
    record["commit"] = args.commit or record["commit"]
    if not args.smoke:
        record["machine"] = machine()
    with TemporaryDirectory() as folder:
        path = args.file or Path(folder) / "lite.gguf"
        if not args.file:
            synth(path, SMOKE if args.smoke else V2_LITE, dtype="iq4_nl")
        for name, options, of_test in measured(path, args):
            record["about"]["options"][name] = options
            record["rows"] += of_test
            write(args.out, record)


if __name__ == "__main__":
    main()

"""Run the CPU benchmarks and the example, and write their records to benchmarks/results/.

    python benchmarks/run.py            both records, then the tables in the documents
    python benchmarks/run.py kernels    only the kernels

kernels.json             every benchmark: median seconds and samples
deepseek_attention.json  the rows of the example's table
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from benchmarks.record import RESULTS, Record, Row, new, row, write  # noqa: E402


def begin(command: Sequence[str]) -> Record:
    """A record of this command, with the number of BLAS's threads."""
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return new(" ".join(command), about={"threads": threads})


def kernels() -> None:
    """Record every pytest benchmark, with its samples."""
    command = ["python", "-m", "pytest", "benchmarks", "--benchmark-enable", "--benchmark-only"]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "raw.json"
        full = [sys.executable, *command[1:], f"--benchmark-json={path}", "-q"]
        subprocess.run(full, cwd=ROOT, check=True)
        raw = json.loads(path.read_text())["benchmarks"]
    result = begin(command)
    result["about"]["value"] = "median of the samples"
    result["rows"] = [
        row(
            benchmark["name"], "s", benchmark["stats"]["median"], benchmark["stats"]["data"],
            group=benchmark["group"], side=(benchmark["params"] or {}).get("side", ""),
        )
        for benchmark in raw
    ]  # fmt: skip
    _write("kernels", result)


def example() -> None:
    """Record the rows of examples/deepseek_attention.py with its defaults."""
    command = ["python", "examples/deepseek_attention.py"]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        full = [sys.executable, *command[1:], "--json", str(path)]
        subprocess.run(full, cwd=ROOT, check=True)
        result = json.loads(path.read_text())
    record = begin(command)
    record["about"]["header"] = result["header"]
    record["rows"] = [example_row(case) for case in result["rows"]]
    _write("deepseek_attention", record)


def example_row(case: dict[str, Any]) -> Row:
    """A row of the example's table: its value is the error, which has a bound."""
    attention = "flash" if case["flash"] else "softmax"
    amb = "none" if case["amb"] is None else f"{case['amb']:g}"
    name = f"{case['form']}, {attention}, {case['cache']}, amb {amb}"
    return row(name, "", case["error"], bar=case["bound"], case=case)


def _write(name: str, record: Record) -> None:
    path = RESULTS / f"{name}.json"
    write(path, record)
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    for name in sys.argv[1:] or ["kernels", "example"]:
        {"kernels": kernels, "example": example}[name]()
    subprocess.run([sys.executable, "tools/tables.py"], cwd=ROOT, check=True)

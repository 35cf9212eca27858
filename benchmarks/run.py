"""Run the CPU benchmarks and the examples, and write their records to benchmarks/results/.

    python benchmarks/run.py            all records, then the tables in the documents
    python benchmarks/run.py kernels    only the kernels; others: example, sparse

kernels.json             every benchmark: median seconds and samples
deepseek_attention.json  the rows of the example's table
sparse_attention.json    the same; draws docs/sparse.svg, too (needs the extra `plot`)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
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
    _example("deepseek_attention", example_row)


def sparse() -> None:
    """Record the rows of examples/sparse_attention.py with its defaults, and draw them."""
    _example("sparse_attention", sparse_row, "--plot", "docs/sparse.svg")


def example_row(case: dict[str, Any]) -> Row:
    """A row of the example's table: its value is the error, which has a bound."""
    attention = "flash" if case["flash"] else "softmax"
    amb = "none" if case["amb"] is None else f"{case['amb']:g}"
    name = f"{case['form']}, {attention}, {case['cache']}, amb {amb}"
    return row(name, "", case["error"], bar=case["bound"], case=case)


def sparse_row(case: dict[str, Any]) -> Row:
    """The same of the example of sparse attention."""
    name = f"{case['model']} {case['form']}, {case['cache']}, depth {case['depth']}"
    return row(name, "", case["error"], bar=case["bounds"][0], case=case)


def _example(name: str, row_of: Callable[[dict[str, Any]], Row], *more: str) -> None:
    command = ["python", f"examples/{name}.py"]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        full = [sys.executable, *command[1:], "--json", str(path), *more]
        subprocess.run(full, cwd=ROOT, check=True)
        result = json.loads(path.read_text())
    record = begin(command)
    record["about"]["header"] = result["header"]
    record["rows"] = [row_of(case) for case in result["rows"]]
    _write(name, record)


def _write(name: str, record: Record) -> None:
    path = RESULTS / f"{name}.json"
    write(path, record)
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    records = {"kernels": kernels, "example": example, "sparse": sparse}
    for name in sys.argv[1:] or records:
        records[name]()
    subprocess.run([sys.executable, "tools/tables.py"], cwd=ROOT, check=True)

"""Run the CPU benchmarks and the example, and write their records to benchmarks/results/.

    python benchmarks/run.py            both records, then the tables in the documents
    python benchmarks/run.py kernels    only the kernels

kernels.json             every benchmark: median seconds and samples
deepseek_attention.json  the rows of the example's table
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def conditions(command: Sequence[str]) -> dict[str, Any]:
    """What the numbers depend on: machine, versions, commit and command."""
    return {
        "date": date.today().isoformat(),
        "command": " ".join(command),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "changed": bool(_output("git", "status", "--porcelain", "--", "*.py")),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"],
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def kernels() -> None:
    """Record every pytest benchmark, with its samples."""
    command = ["python", "-m", "pytest", "benchmarks", "--benchmark-enable", "--benchmark-only"]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "raw.json"
        full = [sys.executable, *command[1:], f"--benchmark-json={path}", "-q"]
        subprocess.run(full, cwd=ROOT, check=True)
        raw = json.loads(path.read_text())["benchmarks"]
    rows = [
        {
            "group": benchmark["group"],
            "name": benchmark["name"],
            "side": (benchmark["params"] or {}).get("side", ""),
            "median": benchmark["stats"]["median"],
            "unit": "s",
            "samples": benchmark["stats"]["data"],
        }
        for benchmark in raw
    ]
    _write("kernels", {**conditions(command), "rows": rows})


def example() -> None:
    """Record the rows of examples/deepseek_attention.py with its defaults."""
    command = ["python", "examples/deepseek_attention.py"]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        full = [sys.executable, *command[1:], "--json", str(path)]
        subprocess.run(full, cwd=ROOT, check=True)
        result = json.loads(path.read_text())
    _write("deepseek_attention", {**conditions(command), "result": result})


def _write(name: str, record: dict[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    for name in sys.argv[1:] or ["kernels", "example"]:
        {"kernels": kernels, "example": example}[name]()
    subprocess.run([sys.executable, "tools/tables.py"], cwd=ROOT, check=True)

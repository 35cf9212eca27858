"""Check that the newest record of the GPU was made from the current kernels.

    python tools/kernel_record.py

If not, the numbers in docs/performance.md are of older kernels, and this prints a warning. The
status is always 0, because only a machine with the GPU can make a new record. Needs only Python.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "backends" / "cuda" / "kernels"
RECORDS = ROOT / "benchmarks" / "results"


def fingerprint(folder: Path = KERNELS) -> str:
    """A hash of the kernels' sources; a record has it under "kernels"."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.cu*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def newest(folder: Path = RECORDS) -> Path | None:
    """The last record of benchmarks/gpu.py by date, which is its name; each card has a folder of
    them."""
    command = "python benchmarks/gpu.py"
    records = (path for path in folder.glob("*/*.json") if command in _content(path)["command"])
    return max(records, key=lambda path: path.name, default=None)


def _content(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def verdict(record: Path | None, kernels: str) -> str:
    """The problem with the record, or "" if there is none."""
    fix = "run `python benchmarks/gpu.py` on a machine with the GPU"
    if record is None:
        return f"there is no record of the GPU; {fix}"
    recorded = _content(record)["kernels"]
    if recorded == kernels:
        return ""
    return f"{record.name} was made from kernels {recorded}, not from the current {kernels}; {fix}"


def main() -> int:
    problem = verdict(newest(), fingerprint())
    print(f"WARNING: {problem}" if problem else "the newest record of the GPU is of these kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main())

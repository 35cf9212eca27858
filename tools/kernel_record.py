"""Say whether the newest record of the GPU was made from the kernels as they are now.

    python tools/kernel_record.py

Prints a warning where it was not: the numbers of docs/performance.md are then of other kernels.
The status is 0 either way, as only a machine with the GPU can mend it. Needs nothing but Python.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "backends" / "cuda" / "kernels"
RECORDS = ROOT / "benchmarks" / "results" / "h200"


def fingerprint(folder: Path = KERNELS) -> str:
    """What the kernels' sources are: a record holds it under "kernels"."""
    told = hashlib.sha256()
    for path in sorted(folder.rglob("*.cu*")):
        told.update(path.name.encode() + path.read_bytes())
    return told.hexdigest()[:16]


def newest(folder: Path = RECORDS) -> Path | None:
    """The last record by date, which is its name."""
    return max(folder.glob("*.json"), default=None)


def verdict(record: Path | None, kernels: str) -> str:
    """What is wrong with the record, or an empty string."""
    again = "run `python benchmarks/gpu.py` on a machine with the GPU"
    if record is None:
        return f"there is no record of the GPU: {again}"
    found = json.loads(record.read_text()).get("kernels")
    if found == kernels:
        return ""
    return f"{record.name} was made from kernels {found}, not from the present {kernels}: {again}"


def main() -> int:
    wrong = verdict(newest(), fingerprint())
    print(f"WARNING: {wrong}" if wrong else "the newest record of the GPU is of these kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main())

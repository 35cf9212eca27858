"""What a record of the GPU is made of: the machine, rows of scripts and of tests, two as one."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu_bench import smi
from pyggml.backends.cuda.device.compiler import nvrtc_version
from pyggml.errors import DeviceError

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]
PACKAGES = ("numpy", "pycuda", "cupy-cuda13x", "cuda-bindings", "torch")
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


# -- rows -----------------------------------------------------------------------------------------


def lines_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def row(name: str, unit: str, value: float) -> Row:
    return {"name": name, "value": value, "unit": unit, "samples": [value]}


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


def report_rows(path: Path, ended: bool = True) -> tuple[list[Row], list[str]]:
    """Rows of a report of pytest, and the tests that were skipped, with their reasons.

    Rows: what tests recorded; if pytest came to its end (a test that was interrupted has not
    passed), how many tests of every file failed of those that ran, and how many passed in all.
    """
    failed: dict[str, int] = {}
    values: dict[str, float] = {}
    skipped: dict[str, list[str]] = {}
    passed = 0
    for case in ElementTree.parse(path).iter("testcase"):
        file = case.get("classname", "").rpartition("test_gpu_")[2]
        for one in case.iter("property"):
            values[one.get("name", "")] = float(one.get("value", "nan"))
        skip = case.find("skipped")
        if skip is not None:
            skipped.setdefault(skip.get("message", ""), []).append(case.get("name", ""))
            continue
        wrong = case.find("failure") is not None or case.find("error") is not None
        failed[file] = failed.get(file, 0) + wrong
        passed += not wrong
    rows = [row(name, unit(name), value) for name, value in values.items()]
    texts = [f"{few(names)}: {reason}" for reason, names in skipped.items()]
    if not ended:
        return rows, texts
    counts = {f"{file}_failed": number for file, number in failed.items()}
    rows += [row(name, "tests", n) for name, n in counts.items() if name not in values]
    rows.append(row(f"{path.stem}_passed", "tests", passed))
    return rows, texts


def few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def unit(name: str) -> str:
    """Of what a test recorded."""
    return "cases" if name == "parity_failed" or name.endswith("_cases") else ""


# -- the machine ----------------------------------------------------------------------------------


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


def card(name: str) -> str:
    """What the folder of a GPU's records is called: h200 for "NVIDIA H200"."""
    own = re.sub(
        r"NVIDIA|GeForce|Tesla|\b(SXM\d*|PCIE|HBM\w*|NVL|\d+GB)\b", " ", name, flags=re.IGNORECASE
    )
    return "-".join(re.findall(r"[a-z0-9]+", own.lower()))


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


# -- two records ----------------------------------------------------------------------------------


def join(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """The parts of both; of a part that both have, the second's. SystemExit if they do not fit."""
    for key in ("kernels", "commit", "grid"):
        if one[key] != two[key]:
            raise SystemExit(f"they differ in {key}: {one[key]} and {two[key]}")
    if one["machine"]["gpu"] != two["machine"]["gpu"]:
        raise SystemExit(f"two cards: {one['machine']['gpu']} and {two['machine']['gpu']}")
    again = {row["name"] for row in two["rows"]}
    seconds = {**one["seconds"], **two["seconds"]}
    lists = {key: one[key] + two[key] for key in ("clocks", "skipped", "faults")}
    rows = [row for row in one["rows"] if row["name"] not in again] + two["rows"]
    command = " ".join(
        ["python benchmarks/gpu.py", *([] if len(seconds) == len(NAMES) else seconds)]
    )
    return {**two, **lists, "command": command, "seconds": seconds, "rows": rows}

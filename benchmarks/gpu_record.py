"""Parts of a GPU record: the machine, rows of scripts and tests, and joining two records."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu_bench import smi
from benchmarks.record import Row, row
from pyggml.backends.cuda.device.compiler import nvrtc_version
from pyggml.backends.processors import n_processors
from pyggml.errors import DeviceError

PACKAGES = ("numpy", "pycuda", "cupy-cuda13x", "cuda-bindings", "torch")
NAMES = (
    "layer",
    "model",
    "peers",
    "linear",
    "attention",
    "amb",
    "sparse",
    "v4_whole",
    "compile",
    "examples",
    "fuzz",
    "parity",
    "checks",
    "sanitize",
)


# -- rows -----------------------------------------------------------------------------------------


def lines_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def example_rows(folder: Path) -> Iterator[Row]:
    """The largest error for each cache type and precision; the samples are all errors."""
    errors: dict[str, list[float]] = {}
    for path in sorted(folder.glob("examples_*.json")):
        tail = "_prec_f32" if path.stem.endswith("_f32") else ""
        for case in json.loads(path.read_text())["rows"]:
            values = [value for key, value in case.items() if key.endswith("error")]
            errors.setdefault(f"example_worst_error_{case['cache']}{tail}", []).extend(values)
    for name, values in errors.items():
        yield row(name, "", max(values), values)


def report_rows(path: Path, ended: bool = True) -> tuple[list[Row], list[str]]:
    """Rows of a pytest report, and the tests that were skipped, with reasons.

    The rows are what tests recorded. If pytest ended by itself, there are also the number of failed
    tests in each file with tests that ran, and of passed tests. Otherwise they would be wrong: an
    interrupted test looks as if it had passed.
    """
    failures: dict[str, int] = {}
    values: dict[str, float] = {}
    skipped: dict[str, list[str]] = {}
    passed = 0
    for case in ElementTree.parse(path).iter("testcase"):
        file = case.get("classname", "").rpartition("test_gpu_")[2]
        for item in case.iter("property"):
            values[item.get("name", "")] = float(item.get("value", "nan"))
        skip = case.find("skipped")
        if skip is not None:
            skipped.setdefault(skip.get("message", ""), []).append(case.get("name", ""))
            continue
        has_failed = case.find("failure") is not None or case.find("error") is not None
        failures[file] = failures.get(file, 0) + has_failed
        passed += not has_failed
    rows = [row(name, unit(name), value) for name, value in values.items()]
    texts = [f"{shortened(names)}: {reason}" for reason, names in skipped.items()]
    if not ended:
        return rows, texts
    counts = {f"{file}_failed": number for file, number in failures.items()}
    rows += [row(name, "tests", n) for name, n in counts.items() if name not in values]
    rows.append(row(f"{path.stem}_passed", "tests", passed))
    return rows, texts


def shortened(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def unit(name: str) -> str:
    """The unit of a value that a test recorded."""
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
    """The folder name for records of a GPU: h200 for "NVIDIA H200"."""
    short = re.sub(
        r"NVIDIA|GeForce|Tesla|\b(SXM\d*|PCIE|HBM\w*|NVL|\d+GB)\b", " ", name, flags=re.IGNORECASE
    )
    return "-".join(re.findall(r"[a-z0-9]+", short.lower()))


def machine() -> dict[str, str]:
    return {
        "gpu": smi("name"),
        "driver": smi("driver_version"),
        "highest clocks": smi("clocks.max.sm,clocks.max.mem"),
        "cores": str(n_processors()),
    }


def versions() -> dict[str, str]:
    packages = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "nvrtc": nvrtc(), **packages}


# -- two records ----------------------------------------------------------------------------------


def join(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both records as one. Rows in both come from the second. SystemExit if they do not match."""
    for key in ("kernels", "commit"):
        if first[key] != second[key]:
            raise SystemExit(f"they differ in {key}: {first[key]} and {second[key]}")
    about, other = second["about"], first["about"]
    if about["grid"] != other["grid"]:
        raise SystemExit(f"they differ in grid: {other['grid']} and {about['grid']}")
    cards = [record["machine"]["gpu"] for record in (first, second)]
    if cards[0] != cards[1]:
        raise SystemExit(f"two cards: {cards[0]} and {cards[1]}")
    replaced = {row["name"] for row in second["rows"]}
    seconds = {**other["seconds"], **about["seconds"]}
    lists = {key: other[key] + about[key] for key in ("skipped", "faults")}
    rows = [row for row in first["rows"] if row["name"] not in replaced] + second["rows"]
    command = " ".join(
        ["python benchmarks/gpu.py", *([] if len(seconds) == len(NAMES) else seconds)]
    )
    return {
        **second, "clocks": first["clocks"] + second["clocks"], "command": command,
        "about": {**about, **lists, "seconds": seconds}, "rows": rows,
    }  # fmt: skip

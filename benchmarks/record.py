"""The form of all records in benchmarks/results/, and what writes and reads them.

A record is one JSON object:

    schema    2
    date      "2026-11-26"
    command   measures the same again
    commit    of the checkout; with a + if sources were changed
    kernels   hash of the CUDA kernels' sources (tools/kernel_record.py)
    machine   hardware and driver: {"gpu": .., "driver": .., "cores": ..}
    versions  of Python, packages and other engines
    clocks    clocks during the run, one object for each reading
    about     anything else that the numbers depend on or that a reader should know
    rows      what was measured

A row has these fields, and may have more:

    name      different for all rows
    value     a number
    unit      "t/s"; "" for a ratio
    better    "more" or "less"
    bar       what the value must reach; null if there is no such limit
    goal      what we hope for; null if there is none
    peer      the same of another engine; null if it was not measured
    samples   what `value` was computed from: numbers, or an object of lists of numbers

A field that should have a value, but was not kept when it was measured, is "not recorded".
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from pyggml.backends.processors import n_processors
from tools.kernel_record import fingerprint

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = 2
NOT_RECORDED = "not recorded"
#: Units for which more is better.
RATES = ("TFLOP/s", "TB/s", "of copy", "of llama.cpp", "of read bandwidth", "t/s")
#: Ends of names of counts of which more are better.
COUNTS = ("_passed", "_cases", "_graphs")

Row = dict[str, Any]
Record = dict[str, Any]
#: Field -> the type of its value.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema": int, "date": str, "command": str, "commit": str, "kernels": str, "machine": dict,
    "versions": dict, "clocks": list, "about": dict, "rows": list,
}  # fmt: skip
ROW_FIELDS: dict[str, type | tuple[type, ...]] = {
    "name": str, "value": (int, float), "unit": str, "better": str,
    "bar": (int, float, type(None)), "goal": (int, float, type(None)),
    "peer": (int, float, type(None)), "samples": (list, dict),
}  # fmt: skip


# -- writing --------------------------------------------------------------------------------------


def row(name: str, unit: str, value: float, samples: Any = None, **more: Any) -> Row:
    """A row. samples: default the value alone. `better` follows from unit and name unless given."""
    more_is_better = unit in RATES or name.endswith(COUNTS)
    fields: Row = {
        "name": name, "value": value, "unit": unit, "better": "more" if more_is_better else "less",
        "bar": None, "goal": None, "peer": None,
        "samples": [value] if samples is None else samples,
    }  # fmt: skip
    return fields | more


def new(command: str, **fields: Any) -> Record:
    """A record of this checkout on this machine, without rows."""
    record: Record = {
        "schema": SCHEMA, "date": date.today().isoformat(), "command": command,
        "commit": commit(), "kernels": fingerprint(), "machine": host(), "versions": versions(),
        "clocks": [], "about": {}, "rows": [],
    }  # fmt: skip
    return record | fields


def host() -> dict[str, Any]:
    return {"cpu": _cpu(), "cores": n_processors()}


def versions() -> dict[str, str]:
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    return {"python": platform.python_version(), "numpy": np.__version__, "blas": blas}


def commit() -> str:
    """The commit of the checkout, with a + if files were changed; without git, not recorded."""
    try:
        words = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return NOT_RECORDED
    return result.stdout.strip() or NOT_RECORDED


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write(path: Path, record: Record) -> None:
    """Write a record. ValueError if it does not have this form. An interrupt leaves no half."""
    _check(path, record)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# -- reading --------------------------------------------------------------------------------------


def read(path: Path) -> Record:
    record: Record = json.loads(path.read_text())
    _check(path, record)
    return record


def newest(folder: str) -> Record:
    """The newest record of a folder of benchmarks/results/; their names end with the date."""
    return read(max((RESULTS / folder).glob("*.json"), key=lambda path: path.name))


def _check(path: Path, record: Record) -> None:
    if faults := list(problems(record)):
        raise ValueError(f"{path.name}: {'; '.join(faults)}")


def problems(record: Any) -> Iterator[str]:
    """What keeps an object from being a record."""
    if not isinstance(record, dict):
        yield "not an object"
        return
    yield from _wrong_fields("the record", record, FIELDS, exact=True)
    if record.get("schema") != SCHEMA:
        yield f"schema {record.get('schema')} is not {SCHEMA}"
    rows = record.get("rows")
    names: set[str] = set()
    for number, each in enumerate(rows if isinstance(rows, list) else ()):
        where = f"row {number}"
        if not isinstance(each, dict):
            yield f"{where} is not an object"
            continue
        where += f" ({each.get('name')})"
        yield from _wrong_fields(where, each, ROW_FIELDS)
        if each.get("better") not in ("more", "less"):
            yield f"{where}: better is {each.get('better')!r}"
        if each.get("name") in names:
            yield f"{where}: another row has this name"
        names.add(str(each.get("name")))
        if not _are_samples(each.get("samples")):
            yield f"{where}: samples are not numbers"


def _wrong_fields(
    where: str, values: Row, fields: dict[str, type | tuple[type, ...]], *, exact: bool = False
) -> Iterator[str]:
    for name, kind in fields.items():
        value = values.get(name)
        if name not in values:
            yield f"{where} has no {name}"
        elif value == NOT_RECORDED and name not in ("schema", "rows", "name", "value"):
            continue
        elif not isinstance(value, kind) or isinstance(value, bool):
            yield f"{where}: {name} is {value!r}"
    if exact and (more := values.keys() - fields.keys()):
        yield f"{where} has {', '.join(sorted(more))}, which belong into about"


def _are_samples(samples: Any) -> bool:
    if samples == NOT_RECORDED:
        return True
    lists: Sequence[Any] = list(samples.values()) if isinstance(samples, dict) else [samples]
    numbers = [n for each in lists if isinstance(each, list) for n in each]
    return (
        bool(lists)
        and all(isinstance(each, list) and each for each in lists)
        and all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers)
    )

"""Check what each backend needs on this machine, and show how to install what is missing.

pyggml doctor
pyggml doctor --json

+ marks what works, - what is absent and not needed, ! what is broken. The status is 1 if something
is broken: a driver that is too old, a package that does not load, a GPU without the packages it
needs. A machine without a GPU needs none of those packages.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module, metadata

from pyggml import __version__, backends
from pyggml.backends.base import Finding
from pyggml.cli.terminal import coloured

#: A state's mark and its colour.
MARKS = {"ok": ("+", "good"), "absent": ("-", "faint"), "broken": ("!", "bad")}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    findings = {"python": _basics(), **{name: _of(name) for name in backends.available()}}
    if args.json:
        rows = {name: [asdict(row) for row in rows] for name, rows in findings.items()}
        print(json.dumps(rows, indent=1))
    else:
        print("\n".join(line for name, rows in findings.items() for line in _lines(name, rows)))
    return int(any(row.state == "broken" for rows in findings.values() for row in rows))


def _basics() -> list[Finding]:
    system = f"{platform.system()} {platform.machine()}"
    return [
        Finding("python", f"{platform.python_version()} on {system}"),
        Finding("pyggml", __version__),
        Finding("numpy", metadata.version("numpy")),
    ]


def _of(name: str) -> list[Finding]:
    """The findings of a backend. A backend without a function `findings` needs nothing."""
    findings = getattr(import_module(f"pyggml.backends.{name}"), "findings", None)
    return [Finding("backend", "ready")] if findings is None else list(findings())


def _lines(name: str, rows: Sequence[Finding]) -> list[str]:
    width = max(len(row.what) for row in rows)
    lines = [name]
    last = {row.fix: row.what for row in rows}  # print a fix once, after the last row it helps
    for row in rows:
        lines.append(f"  {coloured(*MARKS[row.state])} {row.what:{width}}  {row.text}")
        if row.fix and last[row.fix] == row.what:
            lines.append(f"    {'':{width}}  to fix it: {row.fix}")
    return lines

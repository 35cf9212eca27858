"""Says what each backend finds on this machine, what it lacks, and the command that mends it.

pyggml doctor
pyggml doctor --json

The status is 1 where something is missing.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from importlib import import_module, metadata
from importlib.util import find_spec

from pyggml import __version__, backends

Finding = tuple[str, str, str]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    found = {"python": _basics(), **{name: _of(name) for name in backends.available()}}
    if args.json:
        told = {
            name: [dict(zip(("what", "found", "mend"), row)) for row in rows]
            for name, rows in found.items()
        }
        print(json.dumps(told, indent=1))
    else:
        print("\n".join(line for name, rows in found.items() for line in _lines(name, rows)))
    return int(any(mend for rows in found.values() for _, _, mend in rows))


def _basics() -> list[Finding]:
    system = f"{platform.system()} {platform.machine()}"
    return [
        ("python", f"{platform.python_version()} on {system}", ""),
        ("pyggml", __version__, ""),
        ("numpy", metadata.version("numpy"), ""),
    ]


def _of(name: str) -> list[Finding]:
    """What the backend's own module `doctor` says; one without it needs nothing."""
    if find_spec(f"pyggml.backends.{name}.doctor") is None:
        return [("backend", "ready", "")]
    return list(import_module(f"pyggml.backends.{name}.doctor").findings())


def _lines(name: str, rows: Sequence[Finding]) -> list[str]:
    width = max(len(what) for what, _, _ in rows)
    lines = [name]
    last = {mend: what for what, _, mend in rows}  # said once, though it may mend several
    for what, text, mend in rows:
        lines.append(f"  {'-' if mend else '+'} {what:{width}}  {text}")
        if mend and last[mend] == what:
            lines.append(f"    {'':{width}}  to mend it: {mend}")
    return lines

"""What commands print: errors, JSON, and colours, which only appear on a terminal."""

from __future__ import annotations

import json
import os
import sys
import traceback
from math import isfinite
from pathlib import Path
from typing import Any, TextIO

from pyggml.cli.progress import clear
from pyggml.errors import PyggmlError

_CODES = {"good": "32", "bad": "1;31", "faint": "2"}
_PACKAGE = Path(__file__).parents[1]


def coloured(text: str, tone: str, stream: TextIO | None = None) -> str:
    """`text` in the colour of `tone` (good, bad or faint) if the stream, stdout by default, shows
    colours.
    """
    stream = stream or sys.stdout
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{_CODES[tone]}m{text}\x1b[0m" if stream.isatty() else text


def verdict(ok: bool) -> str:
    """OK or FAIL."""
    return coloured("OK", "good") if ok else coloured("FAIL", "bad")


def print_json(report: object, indent: int | None = None) -> None:
    """Print `report` as JSON, inf and NaN as text."""
    print(json.dumps(_finite(report), indent=indent, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def print_error(error: BaseException, *, debug: bool = False, whose: str = "") -> None:
    """Print an error as one line on stderr; with `debug` its traceback first.

    whose  the rank, as the beginning of the line
    """
    clear()
    if debug:
        traceback.print_exception(error)
    print(error_head("pyggml"), whose + " ".join(text_of(error).split()), file=sys.stderr)


def error_head(prog: str) -> str:
    """`PROG: error:`, with which every error begins."""
    return f"{prog}: {coloured('error:', 'bad', sys.stderr)}"


def text_of(error: BaseException) -> str:
    """What is printed about an error."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (PyggmlError, OSError)):
        return str(error)
    if isinstance(error, MemoryError):
        return f"the host has too little memory: {error}"
    return (
        f"{type(error).__name__}: {error}{_place(error)}; this is a bug in pyggml: please report "
        "it, with the traceback that --debug prints"
    )


def _place(error: BaseException) -> str:
    """` at FILE:LINE`, the last line of pyggml that the error passed through."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(_PACKAGE):
            return f" at {path.relative_to(_PACKAGE.parent)}:{frame.lineno}"
    return ""

"""A progress bar on the last line of a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable

WIDTH = 24
#: What is on the line now; "" if there is no bar.
_shown = ""


def progress(what: str, unit: str) -> Callable[[int, int], None] | None:
    """A function that shows (done, total) on stderr; None if stderr is not a terminal.

    The bar goes away when it is done. Call `clear` before anything else is printed.
    """
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        global _shown
        if done >= total:
            clear()
            return
        text = f"{what} [{'#' * (WIDTH * done // total):{WIDTH}}] {_part(done, total, unit)}"
        if text != _shown:
            _shown = text  # before it shows: Ctrl-C may come in between
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)

    return show


def clear() -> None:
    """Clear the line if there is a bar on it."""
    global _shown
    if _shown:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        _shown = ""


def _part(done: int, total: int, unit: str) -> str:
    if unit != "bytes":
        return f"{done:,} of {total:,} {unit}"
    power, name = (9, "GB") if total >= 10**9 else (6, "MB")
    return f"{done / 10**power:.1f} of {total / 10**power:.1f} {name}"

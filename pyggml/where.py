"""The line of the user's code, which errors and warnings name."""

from __future__ import annotations

import sys
import warnings

from pyggml.errors import PyggmlError


def user_line(depth: int = 2) -> tuple[str, int]:
    """File and line of the innermost frame outside the library. pyggml.models counts as outside.

    depth  the first frame to look at; those between it and this function are the library's
    """
    frame = sys._getframe(depth)
    while frame.f_back is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith("pyggml.") or module.startswith("pyggml.models."):
            break
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def at_line(error: PyggmlError, text: str) -> PyggmlError:
    """`error` with `text` and the user's line as its message."""
    file, number = user_line()
    line = f"; at {file}:{number}"
    error.args = (text if line in text else text + line, *error.args[1:])
    return error


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """A warning at the innermost line outside the library."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("pyggml."):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)

"""Files of compiled kernels in the user's cache folder."""

from __future__ import annotations

import os
import tempfile
import threading
import warnings
from pathlib import Path

_warned = threading.Event()


def folder(backend: str) -> Path:
    """The folder of a backend's kernels: in PYGGML_CACHE, else in the user's cache folder."""
    chosen = os.environ.get("PYGGML_CACHE")
    if chosen:
        return Path(chosen) / backend
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "pyggml" / backend


def write(path: Path, data: bytes) -> None:
    """Write a temporary file and rename it, so that readers see all of it or nothing.

    If that fails, a warning says so once in a process.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        if not _warned.is_set():
            _warned.set()
            warnings.warn(
                f"cannot cache compiled kernels in {path.parent}: {error}; every process will "
                "compile them again. Set PYGGML_CACHE to a writable folder",
                stacklevel=2,
            )

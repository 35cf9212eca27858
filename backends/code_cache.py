"""Files of compiled kernels in the user's cache folder."""

from __future__ import annotations

import os
import secrets
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
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
        try:  # the name is known before the file exists: an interrupt can come at any line
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        if not _warned.is_set():
            _warned.set()
            warnings.warn(
                f"cannot cache compiled kernels in {path.parent}: {error}; every process will "
                "compile them again. Set PYGGML_CACHE to a writable folder",
                stacklevel=2,
            )

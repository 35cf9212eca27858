"""The cache of compiled kernels: one file of object code each, in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import warnings
from pathlib import Path

_warned = threading.Event()


def folder() -> Path:
    """PYGGML_CACHE/cpu, else pyggml/cpu in the user's cache folder."""
    chosen = os.environ.get("PYGGML_CACHE")
    if chosen:
        return Path(chosen) / "cpu"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyggml" / "cpu"


def read(key: str) -> bytes | None:
    """The code stored under a key; None if it is absent or damaged."""
    try:
        digest, code = (folder() / f"{key}.o").read_bytes().split(b"\n", 1)
    except (OSError, ValueError):
        return None
    return code if hashlib.sha256(code).hexdigest().encode() == digest else None


def write(key: str, code: bytes) -> None:
    """Store code by renaming a temporary file, so that readers see all of it or nothing."""
    path = folder() / f"{key}.o"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(code).hexdigest().encode() + b"\n" + code)
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

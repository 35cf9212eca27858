"""The cache of compiled kernels: one file of object code each, with its hash in front."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pyggml.backends import code_cache


def _path(key: str) -> Path:
    return code_cache.folder("cpu") / f"{key}.o"


def read(key: str) -> bytes | None:
    """The code stored under a key; None if it is absent or damaged."""
    try:
        digest, code = _path(key).read_bytes().split(b"\n", 1)
    except (OSError, ValueError):
        return None
    return code if hashlib.sha256(code).hexdigest().encode() == digest else None


def write(key: str, code: bytes) -> None:
    """Store code under a key."""
    code_cache.write(_path(key), hashlib.sha256(code).hexdigest().encode() + b"\n" + code)

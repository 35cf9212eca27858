"""The cache of compiled kernels: an interrupt leaves the old file or the new one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pyggml.backends import code_cache
from tests.interrupts import everywhere


def test_an_interrupt_at_any_line_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "kernel"

    def begin() -> Callable[[], object]:
        path.write_bytes(b"old")
        return lambda: code_cache.write(path, b"new")

    for where in everywhere(begin):
        assert path.read_bytes() in (b"old", b"new"), where
        assert list(tmp_path.iterdir()) == [path], where
    code_cache.write(path, b"new")
    assert path.read_bytes() == b"new"

"""Files that appear when they are complete: an interrupt leaves the old file or the new one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pyggml.gguf.replaced import put, replaced
from tests.interrupts import everywhere


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_interrupt_at_any_line_leaves_no_other_file(tmp_path: Path) -> None:
    target = tmp_path / "x"

    def begin() -> Callable[[], object]:
        target.write_bytes(b"old")

        def write() -> None:
            with replaced(target, 3) as file:
                put(file, b"new")

        return write

    for where in everywhere(begin):
        assert target.read_bytes() in (b"old", b"new"), where
        assert list(tmp_path.iterdir()) == [target], where

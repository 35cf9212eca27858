"""How much Python a function runs: a measure of its time that a busy machine does not change."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def work(function: Callable[[], object]) -> int:
    """The lines and calls, of Python and C functions, that this thread runs in `function`.

    Garbage is not collected meanwhile: that runs Python too, more of it in a larger process.
    """
    count = 0

    def line(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        count += 1
        return line

    def call(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal count
        count += 1

    before, collects = (sys.gettrace(), sys.getprofile()), gc.isenabled()
    gc.disable()
    sys.settrace(line)
    sys.setprofile(call)
    try:
        function()
    finally:
        sys.settrace(before[0])
        sys.setprofile(before[1])
        if collects:
            gc.enable()
    return count

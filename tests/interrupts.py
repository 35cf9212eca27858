"""Press Ctrl-C at every point where Python handles signals, one point at a time.

CPython handles signals after a call, at the start of a function and at a backward jump, but not
between other instructions. `everywhere` runs a scenario once to count these points in the library,
then once per point, raising KeyboardInterrupt there.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FrameType
from typing import Any

#: Parts of the paths of files to interrupt: the library and modules that it relies on.
FILES = ("/pyggml/", "/backends/", "/fake_pycuda/", "/contextlib.py", "/weakref.py", "_weakrefset")

Action = Callable[[], object]


@cache
def _points(code: CodeType) -> frozenset[int]:
    """Offsets of the instructions before which Python handles signals.

    A tracer raises at the instruction after a call, Python at the call itself. A point is left out
    if these two are not in the same `try` or `with`.
    """
    instructions = dis.Bytecode(code)
    tries = instructions.exception_entries

    def handler(offset: int) -> int | None:
        return next((e.target for e in tries if e.start <= offset < e.end), None)

    points: set[int] = set()
    previous, offset = "", 0
    for step in instructions:
        if step.opname in ("CACHE", "EXTENDED_ARG"):
            continue
        handles = previous.startswith("CALL") or previous in ("RESUME", "JUMP_BACKWARD")
        if handles and handler(offset) == handler(step.offset):
            points.add(step.offset)
        previous, offset = step.opname, step.offset
    return frozenset(points)


class Injector:
    """Raises KeyboardInterrupt at point `number`; with None, only counts the points."""

    def __init__(self, number: int | None) -> None:
        self.number, self.count, self.where = number, 0, ""

    def _trace(self, frame: FrameType, event: str, arg: object) -> Any:
        if not any(part in frame.f_code.co_filename for part in FILES):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and frame.f_lasti in _points(frame.f_code):
            self.count += 1
            if self.count - 1 == self.number:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._trace

    def __call__(self, action: Action) -> bool:
        """Run the action. Returns whether it was interrupted."""
        previous = sys.gettrace()
        try:
            sys.settrace(self._trace)
            action()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(previous)
        return False


def everywhere(begin: Callable[[], Action], stride: int = 1) -> Iterator[str]:
    """Interrupt an action at each of its points; yields the interrupted line each time.

    begin   sets up a scenario and returns the action
    stride  use only every stride-th point
    """
    count = Injector(None)
    count(begin())
    assert count.count
    for number in range(0, count.count, stride):
        injector = Injector(number)
        if injector(begin()):
            yield f"{injector.where} (point {number} of {count.count})"

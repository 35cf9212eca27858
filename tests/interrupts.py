"""Ctrl-C at every point where Python looks for a signal, one after another.

CPython looks after a call, at the start of a function and at a jump back, not between any two
instructions. `everywhere` counts these points in the library while a scenario runs, then runs the
scenario once for each of them and raises KeyboardInterrupt there.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FrameType
from typing import Any

#: Files in which signals come: the library's and what it stands on.
HERE = ("/pyggml/", "/backends/", "/fake_pycuda/", "/contextlib.py", "/weakref.py", "_weakrefset")

Action = Callable[[], object]


@cache
def _looks(code: CodeType) -> frozenset[int]:
    """Offsets of the instructions before which a signal that came by then has been raised.

    A tracer raises at the instruction behind the call, Python at the call itself: where the two
    are not in the same `try` or `with`, the point is left out.
    """
    instructions = dis.Bytecode(code)
    tries = instructions.exception_entries

    def handler(offset: int) -> int | None:
        return next((e.target for e in tries if e.start <= offset < e.end), None)

    points: set[int] = set()
    before, call = "", 0
    for step in instructions:
        if step.opname in ("CACHE", "EXTENDED_ARG"):
            continue
        looks = before.startswith("CALL") or before in ("RESUME", "JUMP_BACKWARD")
        if looks and handler(call) == handler(step.offset):
            points.add(step.offset)
        before, call = step.opname, step.offset
    return frozenset(points)


class Injector:
    """Raises KeyboardInterrupt at point `number`; counts them where it is None."""

    def __init__(self, number: int | None) -> None:
        self.number, self.count, self.where = number, 0, ""

    def _trace(self, frame: FrameType, event: str, arg: object) -> Any:
        if not any(part in frame.f_code.co_filename for part in HERE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and frame.f_lasti in _looks(frame.f_code):
            self.count += 1
            if self.count - 1 == self.number:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._trace

    def __call__(self, action: Action) -> bool:
        """Run it; whether it was interrupted."""
        before = sys.gettrace()
        try:
            sys.settrace(self._trace)
            action()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


def everywhere(begin: Callable[[], Action], stride: int = 1) -> Iterator[str]:
    """Interrupt what `begin` returns at each point of it; a line of the library for each.

    begin   sets up a scenario and returns what is to be interrupted
    stride  of so many points next to each other one is taken
    """
    count = Injector(None)
    count(begin())
    assert count.count
    for number in range(0, count.count, stride):
        inject = Injector(number)
        if inject(begin()):
            yield f"{inject.where} (point {number} of {count.count})"

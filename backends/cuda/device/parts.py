"""Parts of a block of pinned memory, each taken for as long as an object refers to it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_FREE, _TAKEN = b"\1", b"\0"


class Parts:
    """Hands out parts of `memory`, in units of `grain` bytes. `free` has a byte for each unit."""

    def __init__(self, memory: NDArray[np.uint8], grain: int) -> None:
        self.memory, self.grain = memory, grain
        self.free = bytearray(_FREE * (len(memory) // grain))

    def room(self, nbytes: int) -> bytes:
        """What `free` is from the first unit of a part on, before it is taken."""
        return _FREE * -(-nbytes // self.grain)

    def part(self, nbytes: int) -> Part | None:
        """A part that is free again when the object is gone; None if there is no room."""
        first = self.free.find(self.room(nbytes))
        return None if first < 0 else self.part_at(nbytes, first)

    def part_at(self, nbytes: int, first: int) -> Part:
        """The part from unit `first` on, which is free."""
        return Part(self, first, len(self.room(nbytes)), nbytes)


class Part:
    """A part of the memory, from unit `first` on. An array of it (`np.asarray`) refers to it, and
    so keeps it taken; its own `memory` does not."""

    _count = 0  # an interrupt can end __init__ at any line

    def __init__(self, parts: Parts, first: int, count: int, nbytes: int) -> None:
        self._parts, self.first = parts, first
        start = first * parts.grain
        self.memory = parts.memory[start : start + nbytes]
        self._count = count
        self._mark(_TAKEN)

    def _mark(self, state: bytes) -> None:
        self._parts.free[self.first : self.first + self._count] = state * self._count

    @property
    def address(self) -> int:
        return int(self.memory.ctypes.data)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self.memory.__array_interface__

    def __del__(self) -> None:
        if self._count:
            self._mark(_FREE)

"""Parts of a block of pinned memory, each taken for as long as an object refers to it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_FREE, _TAKEN = b"\1", b"\0"


class Parts:
    """Hands out parts of `memory`, in units of `grain` bytes."""

    def __init__(self, memory: NDArray[np.uint8], grain: int) -> None:
        self.memory, self.grain = memory, grain
        self.free = bytearray(_FREE * (len(memory) // grain))

    def is_free(self, nbytes: int, first: int) -> bool:
        """Whether there is room from unit `first` on."""
        return self.free.startswith(self._room(nbytes), first)

    def part(self, nbytes: int, first: int | None = None) -> Part | None:
        """A part that is free again when the object is gone; None if there is no room.

        first  the unit where it begins, which is free
        """
        room = self._room(nbytes)
        if first is None:
            first = self.free.find(room)
        return None if first < 0 else Part(self, first, len(room), nbytes)

    def _room(self, nbytes: int) -> bytes:
        return _FREE * -(-nbytes // self.grain)


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

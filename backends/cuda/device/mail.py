"""Pinned memory for small tensors that cross between the host and a GPU in every run."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Bytes of pinned memory for them; the unit in which they are handed out; the most of one tensor.
#: 27 layers of DeepSeek-V2-Lite take 0.4 MiB for each plan of one token.
MAIL, GRAIN, LARGEST = 8 << 20, 256, 32 << 10

_FREE, _TAKEN = b"\1", b"\0"


class Mail:
    """Hands out parts of `memory`, of `MAIL` bytes."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self.address = int(memory.ctypes.data)
        self._memory = memory  # keeps it alive
        self._free = bytearray(_FREE * (MAIL // GRAIN))

    def part(self, nbytes: int) -> Part | None:
        """A part that is free again when the object is gone; None if there is no room."""
        count = -(-nbytes // GRAIN)
        first = self._free.find(_FREE * count)
        return None if first < 0 else Part(self, first, count)

    def mark(self, first: int, count: int, state: bytes) -> None:
        self._free[first : first + count] = state * count


class Part:
    """A part of the pinned memory, from `address` on."""

    _count = 0  # an interrupt can end __init__ at any line

    def __init__(self, mail: Mail, first: int, count: int) -> None:
        self._mail, self._first = mail, first
        self.address = mail.address + first * GRAIN
        self._count = count
        mail.mark(first, count, _TAKEN)

    def __del__(self) -> None:
        if self._count:
            self._mail.mark(self._first, self._count, _FREE)

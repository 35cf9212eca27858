"""Memory of a null device: bytes that only it can reach, and its private layout of weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

#: Name of the private layout.
PRIVATE = "reversed"
#: Bytes in front of a private weight: nothing may take its first byte for the weight's.
HEADER = 64


class NullBuffer:
    """A block of a null device's memory. It is no array: kernels of others cannot read it."""

    __slots__ = ("__weakref__", "data", "owner")

    def __init__(self, owner: str, data: Bytes) -> None:
        self.owner = owner
        self.data = data

    def __repr__(self) -> str:
        return f"<{len(self.data)} bytes of {self.owner}>"


def private(data: NDArray[Any]) -> Bytes:
    """A weight as the device keeps it: a header, then its bytes back to front and inverted."""
    raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return np.concatenate([np.full(HEADER, 0xAA, np.uint8), ~raw[::-1]])


def plain(kept: Bytes, into: Bytes) -> None:
    """The bytes of a weight that is kept in the private layout."""
    np.invert(kept[HEADER : HEADER + len(into)][::-1], out=into)

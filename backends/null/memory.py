"""Memory of a null device, and its private layout of weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

#: Name of the private layout.
PRIVATE = "reversed"
#: Bytes before a private weight: a reader that ignores the layout gets wrong values at once.
HEADER = 64


class NullBuffer:
    """A block of a null device's memory. It is not an array, so no other backend can read it."""

    __slots__ = ("__weakref__", "data", "owner")

    def __init__(self, owner: str, data: Bytes) -> None:
        self.owner = owner
        self.data = data

    def __repr__(self) -> str:
        return f"<{len(self.data)} bytes of {self.owner}>"


def private(data: NDArray[Any]) -> Bytes:
    """A weight in the private layout: a header, then its bytes inverted and in reverse order."""
    raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return np.concatenate([np.full(HEADER, 0xAA, np.uint8), ~raw[::-1]])


def plain(weight: Bytes, out: Bytes) -> None:
    """Write the plain bytes of a weight in the private layout to `out`."""
    np.invert(weight[HEADER : HEADER + len(out)][::-1], out=out)

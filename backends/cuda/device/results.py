"""Results that stay in pinned memory, so that the host does not copy them once more.

The copy of a decode step's logits, 400 kB into memory that the system has yet to provide, takes the
host longer than all else that it does for the step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.cuda.device.context import Context
from pyggml.backends.cuda.device.driver import guarded
from pyggml.backends.cuda.device.parts import Part, Parts

#: Bytes of pinned memory for results; the unit in which they are handed out; the sizes of results
#: that live there. Smaller ones are copied in no time, and a larger one would take all the room.
ROOM, GRAIN = 4 << 20, 64 << 10
LEAST, MOST = GRAIN // 2, ROOM // 4


class Results:
    """Pinned memory for results. A part is free again once no array refers to it any more.

    `memory` has `ROOM` bytes. The device writes to a part in the order of its stream, so a part may
    be handed out again while an earlier copy to it, which nobody waits for, is still queued.
    """

    def __init__(self, context: Context, memory: NDArray[np.uint8]) -> None:
        self._context, self.parts = context, Parts(memory, GRAIN)

    def receive(
        self, ptr: int, nbytes: int, dtype: np.dtype[Any], shape: tuple[int, ...]
    ) -> NDArray[Any] | None:
        """Queue a copy from a device address into a new array, which is complete once the copy has
        been waited for.

        None if there is no room, because the caller still has earlier results.
        """
        part = self.parts.part(nbytes)
        if part is None:
            return None
        context = self._context
        with guarded("downloading"):
            context.driver.memcpy_dtoh_async(part.memory, ptr, context.stream)
        return array_in(part, dtype, shape)


def array_in(part: Part, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The caller's array of a part, which stays taken as long as the array exists."""
    return np.asarray(part).view(dtype).reshape(shape)

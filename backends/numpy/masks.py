"""The mask of an attention: ALiBi slopes, and its addition to scores."""

from __future__ import annotations

import numpy as np

from pyggml.backends.host_memory import Floats, Raw, raw_of
from pyggml.backends.numpy.arrays import Work, decoded

#: What hides a key.
HIDDEN = np.float16(-np.inf)


def alibi_slopes(heads: int, head0: int, n_head: int, max_bias: float) -> list[float] | None:
    """What the mask is multiplied by for each head, or None where that is 1."""
    if max_bias <= 0:
        return None
    power = 1 << (n_head.bit_length() - 1)
    exponents = (g + 1 if g < power else g - power + 0.5 for g in range(head0, head0 + heads))
    return [2.0 ** (-max_bias * e / power) for e in exponents]


class Mask:
    """The mask of one tile of scores; decoded once where all heads share it.

    part    [m2, rows, keys] f16 or f32; head h reads part[h % m2]
    memory  rows * keys f32 elements
    """

    def __init__(self, part: Raw, slopes: list[float] | None, memory: Floats, work: Work) -> None:
        self.part, self.slopes, self.memory, self.work = part, slopes, memory, work
        self.kind = raw_of(part)[0]
        self.shared = self._decoded(0) if len(part) == 1 and slopes is None else None

    def _decoded(self, head: int) -> Raw:
        return decoded(self.kind, self.part[head % len(self.part)], self.memory, self.work)

    def add_to(self, scores: Floats, head: int) -> None:
        """scores [heads, rows, keys] += slope * mask; `head` is the number of the first."""
        if self.shared is not None:
            scores += self.shared
            return
        for h, tile in enumerate(scores, head):
            bias = self._decoded(h)
            if self.slopes is not None:
                bias *= np.float32(self.slopes[h])
            tile += bias

    def hide(self, scores: Floats, head: int, row: int) -> None:
        """scores [some, keys] become -inf where a key is hidden, NaN or not.

        The first is query `row` of `head`, counted on through the queries of the heads after it.
        """
        queries = self.part.shape[1]
        for n, x in enumerate(scores, head * queries + row):
            h, i = divmod(n, queries)
            np.copyto(x, HIDDEN, where=self.part[h % len(self.part), i] == HIDDEN)

    def seeing(self, heads: range, key: int) -> Raw:
        """Whether a row of scores sees a key, for the rows of these heads one below the other."""
        columns = [self.part[h % len(self.part), :, key] != HIDDEN for h in heads]
        return np.concatenate(columns)

"""Masks of attention: the causal mask, and how a mask is added to scores."""

from __future__ import annotations

import numpy as np

from pyggml import ops
from pyggml.backends.host_memory import Floats, Raw, Scratch, raw_of
from pyggml.backends.numpy.arrays import Work, decoded
from pyggml.backends.numpy.table import kernel
from pyggml.backends.numpy.tiling import PIECE, scratch_bytes, shaped, split
from pyggml.backends.step import check_position

#: The mask of a hidden key.
HIDDEN = np.float16(-np.inf)


def alibi_slopes(heads: int, head0: int, n_head: int, max_bias: float) -> list[float] | None:
    """The factor of the mask for each head; None if all are 1."""
    if max_bias <= 0:
        return None
    power = 1 << (n_head.bit_length() - 1)
    exponents = (g + 1 if g < power else g - power + 0.5 for g in range(head0, head0 + heads))
    return [2.0 ** (-max_bias * e / power) for e in exponents]


class Mask:
    """The mask of one tile of scores. If all heads share it, it is decoded once.

    part    f16 or f32 [m2, rows, keys]; head h reads part[h % m2]
    slopes  see `alibi_slopes`
    memory  rows * keys f32 elements
    """

    def __init__(self, part: Raw, slopes: list[float] | None, memory: Floats, work: Work) -> None:
        self.part, self.slopes, self.memory, self.work = part, slopes, memory, work
        self.dtype = raw_of(part)[0]
        self.shared = self._decoded(0) if len(part) == 1 and slopes is None else None

    def _decoded(self, head: int) -> Raw:
        return decoded(self.dtype, self.part[head % len(self.part)], self.memory, self.work)

    def add_to(self, scores: Floats, head: int) -> None:
        """scores [heads, rows, keys] += slope * mask; `head` is the number of the first head."""
        if self.shared is not None:
            scores += self.shared
            return
        for h, tile in enumerate(scores, head):
            bias = self._decoded(h)
            if self.slopes is not None:
                bias *= np.float32(self.slopes[h])
            tile += bias

    def hide(self, scores: Floats, head: int, row: int) -> None:
        """Set the scores [rows, keys] of hidden keys to -inf, even if they are NaN.

        The first row is query `row` of `head`, counted through the queries of the next heads too.
        """
        queries = self.part.shape[1]
        for n, x in enumerate(scores, head * queries + row):
            h, i = divmod(n, queries)
            np.copyto(x, HIDDEN, where=self.part[h % len(self.part), i] == HIDDEN)

    def visible(self, heads: range, key: int) -> Raw:
        """Whether each query sees the key: all queries of the first of these heads, then the
        next."""
        columns = [self.part[h % len(self.part), :, key] != HIDDEN for h in heads]
        return np.concatenate(columns)


def _mask_piece(n_kv: int, n_tokens: int) -> int:
    """Elements of a piece of the causal mask."""
    return min(n_kv * n_tokens, max(PIECE, n_kv))


@kernel(ops.causal_mask, scratch=lambda node: scratch_bytes(*(_mask_piece(*node.ne[:2]),) * 2))
def causal_mask(
    out: Raw,
    pos: Raw,
    kv_end: Raw | None,
    *,
    scratch: Scratch,
    n_kv: int,
    window: int | None,
    stride: int,
) -> None:
    if kv_end is None:
        check_position(int(pos.max()), n_kv, stride)
    piece = _mask_piece(n_kv, out.shape[2])
    memory, flags = scratch.array(piece, np.int32), scratch.array(piece, np.bool_)
    for t in split(out.shape[2], max(1, PIECE // n_kv)):
        rows = out[0, 0, t]
        ahead = shaped(memory, *rows.shape)  # the last position of row j, - pos[i]
        if kv_end is not None:
            np.maximum(kv_end[0, 0, 0], 0, out=ahead[0])
            ahead[:] = ahead[0] - np.int32(1)
        else:
            for j in split(n_kv, 4096):
                ends = np.arange(j.start + 1, j.stop + 1, dtype=np.int32)
                ends *= stride
                np.subtract(ends, 1, out=ahead[:, j])
        # A position below 0 sees nothing. All become -1, because j + 2^31 does not fit an int32.
        ahead -= np.maximum(pos[0, 0, 0, t, None], -1)
        hidden = shaped(flags, *rows.shape)
        np.greater(ahead, 0, out=hidden)
        rows.fill(0)
        np.copyto(rows, HIDDEN, where=hidden)
        if window is not None:
            np.less_equal(ahead, -window, out=hidden)
            np.copyto(rows, HIDDEN, where=hidden)
        if kv_end is not None:
            np.less_equal(kv_end[0, 0, 0], 0, out=hidden[0])
            np.copyto(rows, HIDDEN, where=hidden[:1])

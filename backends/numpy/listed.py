"""Fused attention to a list of keys for each query: rows are gathered a block at a time."""

from __future__ import annotations

import numpy as np

from pyggml.backends.host_memory import Array, Floats, Raw, Scratch, aligned, raw_of, shape_of
from pyggml.backends.numpy.arrays import codec_bytes, work_of
from pyggml.backends.numpy.gather import IDS, gather
from pyggml.backends.numpy.masks import HIDDEN, Mask
from pyggml.backends.numpy.online_softmax import Blocks, OnlineSoftmax, Parts
from pyggml.backends.numpy.tiling import scratch_bytes, shaped, split
from pyggml.node import Node


def _blocks(heads: int, heads_kv: int, n_ids: int, d_k: int, d_v: int) -> Blocks:
    """A pass is one query with all its heads."""
    return Blocks(heads // heads_kv, 1, heads_kv, min(n_ids, IDS), 1, d_k, d_v)


def _counts(blocks: Blocks, mask_heads: int) -> tuple[int, int]:
    """Numbers of f16 for the listed masks, and of int32 for a list."""
    return mask_heads * blocks.keys, blocks.keys


def listed_scratch(node: Node) -> int:
    q, k, v, mask = node["q"], node["k"], node["v"], node.get("mask")
    blocks = _blocks(q.ne[2], k.ne[2], node["ids"].ne[0], k.ne[0], v.ne[0])
    bias, list_ = _counts(blocks, 1 if mask is None else mask.ne[2])
    rows = blocks.keys * max(s.dtype.row_bytes(s.ne[0]) for s in (k, v))
    return (
        scratch_bytes(*blocks.sizes()) + aligned(2 * bias) + aligned(4 * list_) + aligned(rows)
        + codec_bytes(k, v, node["ids"], mask)
    )  # fmt: skip


class Lists:
    """Keys, values and masks of the listed keys, block by block.

    v_start  the column of k's rows at which the values begin; None if they are elsewhere
    live     keys from this one on are hidden
    """

    def __init__(
        self,
        k: Array,
        v: Array,
        v_start: int | None,
        mask: Raw | None,
        slopes: list[float] | None,
        ids: Raw,
        live: int,
        scratch: Scratch,
        heads: int,
    ) -> None:
        _, self.heads_kv, _, self.d_k = shape_of(k)
        self.d_v = shape_of(v)[3]
        self.k, self.v, self.v_start, self.mask = raw_of(k), raw_of(v), v_start, mask
        self.slopes, self.ids, self.live = slopes, ids, live
        self.blocks = _blocks(heads, self.heads_kv, ids.shape[3], self.d_k, self.d_v)
        self.memory = Parts(*(scratch.array(n) for n in self.blocks.sizes()))
        bias, list_ = _counts(self.blocks, 1 if mask is None else mask.shape[1])
        self.bias, self.list = scratch.array(bias, np.float16), scratch.array(list_, np.int32)
        row_bytes = max(raw[0, 0, 0].nbytes for _, raw in (self.k, self.v))
        self.spare = scratch.array(self.blocks.keys * row_bytes, np.uint8)
        self.work = work_of(scratch, k, v, mask)

    def attend(
        self, out: Raw, q: Raw, sinks: Raw | None, scale: float, cap: float, lse: bool
    ) -> None:
        n3, heads, n_q, _ = q.shape
        softmax = OnlineSoftmax(self.blocks, self.memory, (heads, 1))
        for i3, i in np.ndindex(n3, n_q):
            softmax.begin(q[i3, :, i : i + 1], scale, None if sinks is None else sinks[0, 0, 0])
            for part in split(self.ids.shape[3], self.blocks.keys):
                ids = self.list[: part.stop - part.start]
                np.copyto(ids, self.ids[i3, 0, i, part])
                hidden = (ids < 0) | (ids >= self.live)
                if hidden.all():
                    continue
                tile = self._mask(i3, i, ids, hidden)
                for h in range(self.heads_kv):
                    keys, values = self._rows(i3, h, ids)
                    softmax.add(slice(h, h + 1), keys, values, cap, tile, h * self.blocks.ratio)
            softmax.end(out[i3, i : i + 1].swapaxes(0, 1), lse)

    def _mask(self, i3: int, i: int, ids: Raw, hidden: Raw) -> Mask | None:
        """The mask of the listed keys; None if it is 0 everywhere."""
        if self.mask is None:
            if not hidden.any():
                return None
            rows = shaped(self.bias, 1, 1, len(ids))
            rows.fill(0)
        else:
            rows = shaped(self.bias, self.mask.shape[1], 1, len(ids))
            for row, mask in zip(rows[:, 0], self.mask[i3 % len(self.mask), :, i]):
                np.take(mask, ids, out=row, mode="clip")
        rows[..., hidden] = HIDDEN
        return Mask(rows, self.slopes, self.memory.bias, self.work)

    def _rows(self, i3: int, h: int, ids: Raw) -> tuple[Floats, Floats]:
        """Keys and values [1, len(ids), d]; zeros for negative ids."""
        keys = shaped(self.memory.keys, len(ids), self.d_k)
        gather(*self.k, (i3, h, ids), keys, self.work, self.spare)
        if self.v_start is not None:
            return keys[None], keys[None, :, self.v_start : self.v_start + self.d_v]
        values = shaped(self.memory.values, len(ids), self.d_v)
        gather(*self.v, (i3, h, ids), values, self.work, self.spare)
        return keys[None], values[None]

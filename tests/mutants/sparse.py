"""Mutants of sparse attention: the indexer, the choice of rows, attention to the chosen."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyggml import ops
from pyggml.node import Node
from tests.mutants.mutant import Mutant, instead, maker, without

MUTANTS: list[Mutant] = []
mutant = maker(MUTANTS)
meaning = maker(MUTANTS, "meaning")

# -- the indexer ----------------------------------------------------------------------------------

INDEXER = "lightning_indexer"
mutant(INDEXER, "weights without sign")(instead(2, np.abs))
mutant(INDEXER, "the first token's weights")(
    instead(2, lambda w: np.broadcast_to(w[:, :, :1], w.shape))
)
mutant(INDEXER, "the weights of the next head")(instead(2, lambda w: np.roll(w, 1, axis=3)))
mutant(INDEXER, "without the last head")(
    instead(2, lambda w: np.where(np.arange(w.shape[3]) == w.shape[3] - 1, np.float32(0), w))
)
mutant(INDEXER, "ignores the mask")(without(3))
mutant(INDEXER, "the mask off by one token")(instead(3, lambda m: np.roll(m, 1, axis=2)))
mutant(INDEXER, "the first sequence's mask")(instead(3, lambda m: m[:1]))
mutant(INDEXER, "only the signs of the mask")(instead(3, lambda m: np.where(m < -9, m, 0 * m)))
mutant(INDEXER, "ignores kv_len")(without(4))
mutant(INDEXER, "kv_len one too large")(instead(4, lambda n: n + 1))
mutant(INDEXER, "q in f16")(instead(0, lambda q: q.astype(np.float16).astype(q.dtype)))


@mutant(INDEXER, "quantizes q to 8 bits")
def _(right: Any, out: Any, q: Any, *sources: Any, **attrs: Any) -> None:
    step = np.abs(q).max(axis=-1, keepdims=True) / np.float32(127) + np.float32(1e-30)
    right(out, np.rint(q / step) * step, *sources, **attrs)


@mutant(INDEXER, "without relu")
def _(right: Any, out: Any, q: Any, *sources: Any, **attrs: Any) -> None:
    right(out, q, *sources, **attrs)
    if sources[2:] == (None, None):
        negative = np.empty_like(out)
        attrs["scratch"].used = 0
        right(negative, -q, *sources, **attrs)
        out -= negative


@mutant(INDEXER, "NaN of a hidden row stays")
def _(right: Any, out: Any, q: Any, k: Any, weights: Any, *hidden: Any, **attrs: Any) -> None:
    right(out, q, k, weights, None, None, **attrs)
    spoiled = np.isnan(out)
    attrs["scratch"].used = 0
    right(out, q, k, weights, *hidden, **attrs)
    out[spoiled] = np.nan


@mutant(INDEXER, "0 for the NaN of a visible row")
def _(right: Any, out: Any, *sources: Any, **attrs: Any) -> None:
    right(out, *sources, **attrs)
    out[np.isnan(out)] = 0


@meaning(INDEXER, "a plain sum with the mask")
def _(right: Any, q: Node, k: Node, weights: Node, *hidden: Node | None) -> Node:
    y: Node = right(q, k, weights)
    mask = hidden[0] if hidden else None
    if mask is None or (len(hidden) > 1 and hidden[1] is not None):
        return right(q, k, weights, *hidden)  # type: ignore[no-any-return]
    rows = ops.view(mask, ne=(*y.ne[:2], 1, mask.ne[3]))
    return ops.add(y, ops.cast(rows, dtype="f32"))


@meaning(INDEXER, "without kv_len")
def _(right: Any, *sources: Node | None) -> Node:
    return right(*sources[:4])  # type: ignore[no-any-return]


@mutant("add_mask", "a plain sum")
def _(right: Any, out: Any, a: Any, b: Any) -> None:
    out[...] = a + np.tile(b, [n // m for n, m in zip(a.shape, b.shape)])


# -- the choice -----------------------------------------------------------------------------------


@mutant("top_k", "the last of equals")
def _(right: Any, out: Any, a: Any, **attrs: Any) -> None:
    right(out, a[..., ::-1], **attrs)
    np.subtract(a.shape[3] - 1, out, out=out)


@mutant("top_k", "the last of those equal to the k-th")
def _(right: Any, out: Any, a: Any, *, k: int, **attrs: Any) -> None:
    right(out, a, k=k, **attrs)
    for at in np.ndindex(out.shape[:3]):
        row, ids = a[at], out[at]
        ties = np.flatnonzero(row == row[ids[-1]])
        chosen = ids[row[ids] == row[ids[-1]]]
        if len(chosen) < len(ties):
            ids[-1] = ties[-1]


@mutant("top_k", "in order of ids")
def _(right: Any, out: Any, a: Any, **attrs: Any) -> None:
    right(out, a, **attrs)
    out.sort(axis=3)


# -- attention to the chosen ----------------------------------------------------------------------

FLASH = "flash_attn_ext"
mutant(FLASH, "the first query's list for all")(
    instead(6, lambda ids: np.broadcast_to(ids[:, :, :1], ids.shape))
)
mutant(FLASH, "a negative id as 0")(instead(6, lambda ids: np.maximum(ids, 0)))
mutant(FLASH, "without the last of each list")(
    instead(6, lambda ids: np.where(np.arange(ids.shape[3]) == ids.shape[3] - 1, -1, ids))
)
mutant(FLASH, "the next list's sequence")(instead(6, lambda ids: np.roll(ids, 1, axis=0)))


@mutant(FLASH, "a row without listed keys is NaN")
def _(right: Any, out: Any, *sources: Any, **attrs: Any) -> None:
    right(out, *sources, **attrs)
    if sources[6] is not None:
        empty = (sources[6] < 0).all(axis=3)[:, 0]
        out[empty] = np.nan


@mutant(FLASH, "masks by place in the list")
def _(right: Any, out: Any, q: Any, k: Any, v: Any, mask: Any, *others: Any, **attrs: Any) -> None:
    ids = others[2]
    if mask is not None and ids is not None and ids.shape[3] <= mask.shape[3]:
        moved = mask.copy()
        for at in np.ndindex(mask.shape[:2]):
            for i in range(ids.shape[2]):
                for place, number in enumerate(ids[at[0] % len(ids), 0, i]):
                    moved[at][i, max(number, 0)] = mask[at][i, place]
        mask = moved
    right(out, q, k, v, mask, *others, **attrs)


def _other(**changes: Any) -> Any:
    """The meaning with some sources left out or attributes changed."""

    def run(right: Any, q: Node, k: Node, v: Node, *others: Node | None, **attrs: Any) -> Node:
        names = ("mask", "sinks", "kv_len", "ids")
        sources = dict(zip(names, others)) | {n: changes[n] for n in names if n in changes}
        attrs |= {key: value for key, value in changes.items() if key not in names}
        return right(q, k, v, **sources, **attrs)  # type: ignore[no-any-return]

    return run


meaning(FLASH, "without the mask")(
    lambda right, *src, **attrs: _other(mask=None)(right, *src, **(attrs | {"max_bias": 0.0}))
)
meaning(FLASH, "without kv_len")(_other(kv_len=None))
meaning(FLASH, "without sinks")(_other(sinks=None))
meaning(FLASH, "ignores kv0")(_other(kv0=0))

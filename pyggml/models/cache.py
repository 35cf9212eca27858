"""The caches of attention layers, as states of a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pyggml.gguf.format import padded
from pyggml.node import Node
from pyggml.ops import set_rows, state, view

if TYPE_CHECKING:
    from pyggml.models.batch import Batch


#: Rows of a window cache come in steps, so that kernels read whole tiles.
RING_STEP = 64


@dataclass(frozen=True, slots=True)
class Cache:
    """The states of a layer. `write` adds the rows of a batch, and `mask` hides rows from it.

    states  the states, without the rows of this graph
    """

    states: tuple[Node, ...]

    @property
    def n_rows(self) -> int:
        return self.states[0].ne[1]

    def used(self, n: int) -> tuple[int, ...]:
        """The number of rows of each state that `n` tokens fill."""
        return (n,) * len(self.states)

    def reaches(self, n: int, past: int) -> bool:
        """Whether a cache that had `past` tokens still has all rows that token number n sees."""
        return True

    def contents(self, n: int) -> dict[str, NDArray[np.int32]]:
        """Other states after `n` tokens: name -> array."""
        return {}

    def mask(self, batch: Batch) -> Node:
        """f16 [n_kv, n_tokens]."""
        return batch.mask(batch.n_kv)

    def write(self, number: int, rows: Node, batch: Batch) -> Node:
        """Write [d, n_tokens, n_head] to a state; the rows that the batch may read."""
        handle = set_rows(self.states[number], rows, batch.rows)
        batch.writes.append(handle)
        return view(handle, ne=(handle.ne[0], batch.n_kv, handle.ne[2]))


@dataclass(frozen=True, slots=True)
class WindowCache(Cache):
    """K and V of the last tokens: position p is in row p % n_rows.

    A batch must overwrite only rows that its first token no longer sees, so
    n_rows >= window + n_batch - 1.

    window  how many tokens a token sees, itself included
    """

    window: int

    def used(self, n: int) -> tuple[int, ...]:
        return (min(n, self.n_rows),) * len(self.states)

    def reaches(self, n: int, past: int) -> bool:
        return past - self.n_rows <= max(0, n - self.window + 1)

    def contents(self, n: int) -> dict[str, NDArray[np.int32]]:
        first = np.arange(self.n_rows)
        last = first + (n - 1 - first) // self.n_rows * self.n_rows  # below 0: an empty row
        return {ring_state(self.n_rows).attrs["name"]: np.maximum(last + 1, 0)[:, None]}

    def mask(self, batch: Batch) -> Node:
        return batch.ring(self.n_rows).mask(self.window)

    def write(self, number: int, rows: Node, batch: Batch) -> Node:
        handle = set_rows(self.states[number], rows, batch.ring(self.n_rows).rows)
        batch.writes.append(handle)
        return handle


def ring_state(n_rows: int) -> Node:
    """cache_end_N, i32 [1, n_rows]: 1 + the position in each row of window caches; 0: empty."""
    return state(f"cache_end_{n_rows}", "i32", ne=(1, n_rows))


def ring_rows(window: int, n_ctx: int, n_batch: int) -> int:
    """The rows of a ring from which a batch of up to `n_batch` tokens needs the last `window`."""
    return min(padded(window + n_batch - 1, RING_STEP), n_ctx)


def latent_cache(
    il: int, n_ctx: int, d: int, dtype: str, *, index: tuple[int, str] | None = None
) -> Cache:
    """cache_kv_lIL [d, n_ctx], and with `index` cache_index_lIL of this row size and type."""
    latent = state(f"cache_kv_l{il}", dtype, ne=(d, n_ctx))
    if index is None:
        return Cache((latent,))
    return Cache((latent, state(f"cache_index_l{il}", index[1], ne=(index[0], n_ctx))))


def kv_cache(
    il: int,
    n_ctx: int,
    *,
    d_k: int,
    d_v: int,
    n_head_kv: int,
    types: tuple[str, str],
    window: int | None = None,
    n_batch: int = 0,
) -> Cache:
    """cache_k_lIL [d_k, n_rows, n_head_kv] and cache_v_lIL [d_v, n_rows, n_head_kv].

    n_rows is n_ctx, or fewer if only a window is needed.
    """
    n_rows = n_ctx if window is None else ring_rows(window, n_ctx, n_batch)
    states = (
        state(f"cache_k_l{il}", types[0], ne=(d_k, n_rows, n_head_kv)),
        state(f"cache_v_l{il}", types[1], ne=(d_v, n_rows, n_head_kv)),
    )
    if window is None:
        return Cache(states)
    return WindowCache(states, window)

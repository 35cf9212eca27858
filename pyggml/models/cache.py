"""The caches of attention layers, as states of a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyggml.node import Node
from pyggml.ops import set_rows, state, view

if TYPE_CHECKING:
    from pyggml.models.batch import Batch


@dataclass(frozen=True, slots=True)
class Cache:
    """The states of a layer. `write` adds the rows of a batch, and `mask` hides rows from it.

    states  the states, without the rows of this graph
    """

    states: tuple[Node, ...]

    @property
    def n_rows(self) -> int:
        return self.states[0].ne[1]

    def used(self, n: int) -> int:
        """The number of rows that `n` tokens fill."""
        return n

    def mask(self, batch: Batch) -> Node:
        """f16 [n_kv, n_tokens]."""
        return batch.mask(batch.n_kv)

    def write(self, number: int, rows: Node, batch: Batch) -> Node:
        """Write [d, n_tokens, n_head] to a state; the rows that the batch may read."""
        handle = set_rows(self.states[number], rows, batch.rows)
        batch.writes.append(handle)
        return view(handle, ne=(handle.ne[0], batch.n_kv, handle.ne[2]))


def latent_cache(il: int, n_ctx: int, d: int, dtype: str) -> Cache:
    """cache_kv_lIL [d, n_ctx]."""
    return Cache((state(f"cache_kv_l{il}", dtype, ne=(d, n_ctx)),))


def kv_cache(
    il: int, n_ctx: int, *, d_k: int, d_v: int, n_head_kv: int, types: tuple[str, str]
) -> Cache:
    """cache_k_lIL [d_k, n_ctx, n_head_kv] and cache_v_lIL [d_v, n_ctx, n_head_kv]."""
    return Cache(
        (
            state(f"cache_k_l{il}", types[0], ne=(d_k, n_ctx, n_head_kv)),
            state(f"cache_v_l{il}", types[1], ne=(d_v, n_ctx, n_head_kv)),
        )
    )

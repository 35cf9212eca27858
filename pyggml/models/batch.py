"""The options of a model's graphs, and the inputs and masks that the layers of one graph share."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from pyggml.dtypes import dtype
from pyggml.errors import ShapeError
from pyggml.models.cache import ring_state
from pyggml.node import Node
from pyggml.ops import cast, causal_mask, div, fill, input, reshape, scale, set_rows, sub


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How the graphs of a model are built. The names in brackets are the command line's.

    flash    flash attention; False computes scores and a softmax instead         [-fa]
    fused    up, gate and activation as one op                                    [-fmoe]
    mla      attention of DeepSeek models: 0 standard, 1 latent, 3 latent cache,  [-mla]
             which prompts expand to K and V. Other architectures ignore it
    expand_from  tokens of a batch from which mla=3 expands
    prec     "f32": products and attention compute in f32, not in the backend's fastest type
    cache_k, cache_v   types of the caches; a latent cache has cache_k's          [-ctk -ctv]
    cache_i  type of the index keys of sparse attention                           [-cti]
    """

    flash: bool = True
    fused: bool = True
    mla: int = 3
    expand_from: int = 128
    prec: str = "default"
    cache_k: str = "f16"
    cache_v: str = "f16"
    cache_i: str = "f16"

    def __post_init__(self) -> None:
        if self.mla not in (0, 1, 3):
            raise ShapeError(f"mla={self.mla!r} must be 0, 1 or 3")
        if self.prec not in ("default", "f32"):
            raise ShapeError(f"prec={self.prec!r} must be 'default' or 'f32'")
        dtype(self.cache_k), dtype(self.cache_v), dtype(self.cache_i)


class Batch:
    """The tokens of one graph: its inputs, and the masks that layers share.

    tokens   i32 [n_tokens]   ids
    pos      i32 [n_tokens]   positions
    rows     i32 [n_tokens]   cache rows to write; -1 for padding, whose row is not written.
                              If `padded` is False, row p is for position p: rows is pos
    outputs  i32 [n_outputs]  the tokens whose logits are computed; None: all, or none
    n_kv     rows of each full cache that attention reads
    writes   handles of the caches that the layers write
    chosen   i32 [k, n_tokens]: the cache rows that an earlier layer chose for each token, for
             layers that use the same; None: none yet
    shared   what layers of one kind compute once for all of them, by a key of their choice
    """

    def __init__(
        self,
        n_tokens: int,
        n_kv: int,
        options: Options,
        n_outputs: int = 1,
        *,
        padded: bool = True,
    ) -> None:
        self.n_tokens, self.n_kv, self.options = n_tokens, n_kv, options
        self.n_outputs = n_outputs
        self.writes: list[Node] = []
        self.chosen: Node | None = None
        self.shared: dict[Hashable, Any] = {}
        self.tokens = input("tokens", "i32", ne=(n_tokens,))
        self.pos = input("pos", "i32", ne=(n_tokens,))
        padded = padded and n_tokens > 1
        self.rows = input("rows", "i32", ne=(n_tokens,)) if padded else self.pos
        some = 0 < n_outputs < n_tokens
        self.outputs = input("outputs", "i32", ne=(n_outputs,)) if some else None
        self._masks: dict[tuple[int, int | None], Node] = {}
        self._rings: dict[int, Ring] = {}
        self._modulo: dict[int, Node] = {}

    def ring(self, n_rows: int) -> Ring:
        """The rows of window caches with `n_rows` rows; one object for all layers."""
        if n_rows not in self._rings:
            self._rings[n_rows] = Ring(self, n_rows)
        return self._rings[n_rows]

    def modulo(self, n: int) -> Node:
        """rows mod n, i32 [n_tokens]; -1 for padding. Exact for rows below 2^23."""
        if n not in self._modulo:
            rows = cast(self.rows, dtype="f32")
            laps = cast(cast(div(rows, fill(rows, value=float(n))), dtype="i32"), dtype="f32")
            self._modulo[n] = cast(sub(rows, scale(laps, s=float(n))), dtype="i32")
        return self._modulo[n]

    def mask(self, n_kv: int, window: int | None = None) -> Node:
        """causal_mask(pos); one node for all layers that ask for the same."""
        if (n_kv, window) not in self._masks:
            self._masks[n_kv, window] = causal_mask(self.pos, n_kv=n_kv, window=window)
        return self._masks[n_kv, window]


class Ring:
    """Rows that position p shares with p + n_rows, p + 2 n_rows, ...: row p % n_rows.

    rows    i32 [n_tokens]  rows that the batch writes; -1 for padding
    kv_end  i32 [n_rows]    1 + the position in each row; 0 for an empty row
    """

    def __init__(self, batch: Batch, n_rows: int) -> None:
        self.rows = batch.modulo(n_rows)
        ends = cast(scale(cast(batch.pos, dtype="f32"), s=1.0, b=1.0), dtype="i32")
        ends = reshape(ends, ne=(1, batch.n_tokens))
        written = set_rows(ring_state(n_rows), ends, self.rows)
        batch.writes.append(written)
        self.n_rows, self.pos = n_rows, batch.pos
        self.kv_end = reshape(written, ne=(n_rows,))
        self._masks: dict[int, Node] = {}

    def mask(self, window: int) -> Node:
        """f16 [n_rows, n_tokens]; one node for all layers with this window."""
        if window not in self._masks:
            self._masks[window] = causal_mask(
                self.pos, self.kv_end, n_kv=self.n_rows, window=window
            )
        return self._masks[window]

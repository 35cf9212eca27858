"""Decoding without the host: a graph that chooses each token and feeds it to the next run.

    token = history[pos];   logits = model(token, pos);   next = argmax(logits)
    history[pos + 1] = next;   pos += goes_on[next]

`plan.repeat(n)` runs n steps. At a stop token `pos` stays where it is, so that the runs that are
left repeat the same step and write the same values. Two designs lost: a flag that turns writes off
costs a select in every layer, and a check by the host costs a round trip a token.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from pyggml.graph import Graph
from pyggml.models.batch import Batch, Options
from pyggml.models.cache import Cache
from pyggml.ops import add, argmax, cast, constant, cpy, get_rows, reshape, scale, set_rows, state
from pyggml.runtime.plan import Plan
from pyggml.runtime.store import Store

if TYPE_CHECKING:
    from pyggml.models.model import Model

#: Names of the states: i32 [1, n_ctx + 1], the token at each position; i32 [1], the last position.
HISTORY, POSITION = "history", "position"


class LoopBatch(Batch):
    """One token, from the states."""

    def __init__(self, n_kv: int, options: Options, n_ctx: int) -> None:
        super().__init__(1, n_kv, options)
        self.history = state(HISTORY, "i32", ne=(1, n_ctx + 1))
        self.pos = self.rows = state(POSITION, "i32", ne=(1,))
        self.tokens = reshape(get_rows(self.history, self.pos), ne=(1,))


def loop_plan(
    model: Model,
    caches: tuple[Cache, ...],
    store: Store,
    *,
    n_kv: int,
    n_ctx: int,
    stop: Collection[int],
) -> Plan:
    """A plan of one step; its output `token` is the one that was chosen.

    stop  tokens at which `position` stays
    Positions are exact below 2^24.
    """
    batch = LoopBatch(n_kv, model.options, n_ctx)
    logits = model.graph(batch, caches).outputs["logits"]
    token = argmax(logits)
    at = cast(batch.pos, dtype="f32")
    below = cast(scale(at, b=1.0, s=1.0), dtype="i32")
    written = set_rows(batch.history, reshape(token, ne=(1, 1)), below)
    goes_on = np.ones((model.arch.n_vocab, 1), np.float32)
    goes_on[sorted(stop)] = 0.0
    name = f"goes_on {sorted(stop)}"  # a weight of the store: one for each set of stop tokens
    step = reshape(get_rows(constant(goes_on, name=name), token), ne=(1,))
    moved = cpy(cast(add(at, step), dtype="i32"), batch.pos)
    return model.compile(Graph({"token": token}, [*batch.writes, written, moved]), store)

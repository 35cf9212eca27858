"""Decoding without the host: a graph that chooses each token and feeds it to the next run.

    token = history[pos];   logits = model(token, pos);   next = the best of the logits, or drawn
    history[pos + 1] = next;   pos += goes_on[next]

`plan.repeat(n)` runs n steps. At a stop token `pos` stays where it is, so that the runs that are
left repeat the same step and write the same values. Two designs lost: a flag that turns writes off
costs a select in every layer, and a check by the host costs a round trip a token.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pyggml.graph import Graph
from pyggml.models.batch import Batch, Options
from pyggml.models.cache import Cache
from pyggml.node import Node
from pyggml.ops import (
    add,
    argmax,
    cast,
    clamp,
    constant,
    cpy,
    get_rows,
    input,
    log,
    mul_mat,
    reshape,
    scale,
    set_rows,
    soft_max,
    state,
    sub,
    top_k,
)
from pyggml.runtime.plan import Plan
from pyggml.runtime.store import Store

if TYPE_CHECKING:
    from pyggml.models.model import Model

#: Names of the states: i32 [1, n_ctx + 1], the token at each position; i32 [1], the last position.
HISTORY, POSITION = "history", "position"


_LARGE = 1e30


class LoopBatch(Batch):
    """One token, from the states."""

    def __init__(self, n_kv: int, options: Options, n_ctx: int) -> None:
        super().__init__(1, n_kv, options)
        self.history = state(HISTORY, "i32", ne=(1, n_ctx + 1))
        self.pos = self.rows = state(POSITION, "i32", ne=(1,))
        self.tokens = reshape(get_rows(self.history, self.pos), ne=(1,))


class Draw(NamedTuple):
    """How tokens are drawn (see `Sampler`), and for how many steps there is noise."""

    temperature: float
    top_k: int
    top_p: float
    n_steps: int


def drawn(logits: Node, at: Node, draw: Draw) -> Node:
    """i32 [1]: a token drawn from the top_k best of logits, f32 [n_vocab, 1].

    at  f32 [1], the position. The inputs are `noise`, f32 [top_k, n_steps], and `start`, f32 [1],
        the position of its first row
    """
    k = min(draw.top_k, logits.ne[0])
    ids = top_k(logits, k=k)
    best = get_rows(reshape(logits, ne=(1, logits.ne[0])), reshape(ids, ne=(k,)))
    scores = scale(reshape(best, ne=(k,)), s=1.0 / draw.temperature)
    if draw.top_p < 1:
        before = constant(np.tri(k, k=-1, dtype=np.float32), name=f"tri {k}")
        sums = reshape(mul_mat(before, soft_max(scores), prec="f32"), ne=(k,))
        # 1 where the more probable tokens have less than top_p, else 0
        mask = clamp(scale(sums, s=-_LARGE, b=draw.top_p * _LARGE), min=0.0, max=1.0)
        scores = add(scores, log(mask))
    noise = input("noise", "f32", ne=(k, draw.n_steps))
    row = cast(sub(at, input("start", "f32", ne=(1,))), dtype="i32")
    choice = argmax(add(scores, reshape(get_rows(noise, row), ne=(k,))))
    return reshape(get_rows(reshape(ids, ne=(1, k)), choice), ne=(1,))


def loop_plan(
    model: Model,
    caches: tuple[Cache, ...],
    store: Store,
    *,
    n_kv: int,
    n_ctx: int,
    stop: Collection[int],
    draw: Draw | None = None,
) -> Plan:
    """A plan of one step; its output `token` is the one that was chosen.

    stop  tokens at which `position` stays
    draw  how to draw tokens; None: always the best
    Positions are exact below 2^24.
    """
    batch = LoopBatch(n_kv, model.options, n_ctx)
    logits = model.graph(batch, caches).outputs["logits"]
    at = cast(batch.pos, dtype="f32")
    token = argmax(logits) if draw is None else drawn(logits, at, draw)
    below = cast(scale(at, b=1.0, s=1.0), dtype="i32")
    written = set_rows(batch.history, reshape(token, ne=(1, 1)), below)
    goes_on = np.ones((model.arch.n_vocab, 1), np.float32)
    goes_on[sorted(stop)] = 0.0
    name = f"goes_on {sorted(stop)}"  # a weight of the store: one for each set of stop tokens
    step = reshape(get_rows(constant(goes_on, name=name), token), ne=(1,))
    moved = cpy(cast(add(at, step), dtype="i32"), batch.pos)
    return model.compile(Graph({"token": token}, [*batch.writes, written, moved]), store)

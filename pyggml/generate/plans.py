"""The plans of a session: compiled when they are first needed, and kept."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from pyggml.backends.base import in_host_memory
from pyggml.generate.loop import Draw, loop_plan
from pyggml.models.batch import Batch
from pyggml.models.cache import Cache
from pyggml.runtime.places import parse
from pyggml.runtime.plan import Plan
from pyggml.runtime.store import Store

if TYPE_CHECKING:
    from pyggml.models.model import Model

#: Attention reads a whole number of steps of cache rows, so that few plans serve all lengths.
KV_STEP = 256


class Plans:
    """The plans of a model for some caches.

    There is one for each number of tokens and of cache rows. Both are rounded up, so that few plans
    serve all lengths.
    """

    def __init__(
        self, model: Model, caches: tuple[Cache, ...], store: Store, *, n_ctx: int, n_batch: int
    ) -> None:
        self.model, self.caches, self.store = model, caches, store
        self.n_ctx, self.n_batch = n_ctx, n_batch
        self._batches: dict[tuple[int, int, int], Plan] = {}
        self._reserved = False
        self._loops: dict[tuple[int, tuple[int, ...], Draw | None], Plan] = {}

    def batch(self, n_tokens: int, n_kv: int, n_outputs: int) -> Plan:
        """The plan for `n_tokens` tokens that attend to the first `n_kv` rows of full caches."""
        key = n_tokens, n_kv, n_outputs
        if key not in self._batches:
            batch = Batch(n_tokens, n_kv, self.model.options, n_outputs)
            self._batches[key] = self.model.plan(batch, self.caches, self.store)
        return self._batches[key]

    def loop(self, n_kv: int, stop: Collection[int], draw: Draw | None) -> Plan:
        """The plan of a step in which the device chooses the token (see `loop_plan`)."""
        key = n_kv, tuple(sorted(stop)), draw
        if key not in self._loops:
            self._loops[key] = loop_plan(
                self.model, self.caches, self.store, n_kv=n_kv, n_ctx=self.n_ctx, stop=stop,
                draw=draw,
            )  # fmt: skip
        return self._loops[key]

    def reserve(self) -> None:
        """Before the first run on a device: make its arena as large as any plan needs, so that no
        plan has to bind again. On the host that costs nothing, and planning would."""
        if self._reserved:
            return
        backends = [parse(text).backend for text in self.model.backends]
        if not all(map(in_host_memory, backends)):
            for plan in self.largest()[::2]:
                plan.reserve()
        self._reserved = True

    def largest(self) -> tuple[Plan, ...]:
        """Those for `n_batch` tokens and for one, over full caches; and, if graphs with fewer rows
        have another form, the two over the most of these."""
        return tuple(
            self.batch(n, n_kv, 1) for n_kv in self._most_rows() for n in (self.n_batch, 1)
        )

    def largest_prompts(self) -> tuple[Plan, ...]:
        """Those of `largest` for `n_batch` tokens."""
        return tuple(self.batch(self.n_batch, n_kv, 1) for n_kv in self._most_rows())

    def _most_rows(self) -> list[int]:
        rows, dense = [self.n_ctx], floored_rows(self.model.arch.dense_rows())
        return [*rows, dense] if 0 < dense < self.n_ctx else rows

    def sizes(self, n_tokens: int, n_kv: int, n_outputs: int) -> tuple[int, int]:
        """The tokens and rows to plan for: these, or more if that takes less memory.

        Under an attention budget, a smaller plan may need more memory than the largest ones,
        because it is cut into fewer pieces.
        """
        if self.model.amb is None:
            return n_tokens, n_kv
        while self._exceeds(self.batch(n_tokens, n_kv, n_outputs)):
            if n_kv < self.n_ctx:
                n_kv = padded_rows(n_kv + 1, self.n_ctx)
            elif 1 < n_tokens < self.n_batch:
                n_tokens = padded_tokens(n_tokens + 1, self.n_batch)
            else:
                break
        return n_tokens, n_kv

    def _exceeds(self, plan: Plan) -> bool:
        """Whether a plan's arena is larger than those of the largest plans."""
        rows = [row for largest in self.largest() for row in largest.memory.devices]
        return any(
            row.compute > max((r.compute for r in rows if r.device == row.device), default=0)
            for row in plan.memory.devices
        )


def padded_tokens(n: int, most: int) -> int:
    """n, or more: 1, 2, 3, 4, 6, 8, 12, 16, 24, ... and `most`. The rest is padding."""
    step = 1 << max(n.bit_length() - 2, 0)
    return min(-(-n // step) * step, max(most, n))


def padded_rows(n: int, n_ctx: int) -> int:
    """n in steps of 256 rows up to 2048, then of 1/8 of the power of two below; at most n_ctx."""
    step = _row_step(n)
    return min(-(-n // step) * step, n_ctx)


def floored_rows(n: int) -> int:
    """The most rows up to `n` that `padded_rows` gives in a large context; 0: none."""
    return n // _row_step(n) * _row_step(n)


def _row_step(n: int) -> int:
    return max(KV_STEP, 1 << max((n - 1).bit_length() - 4, 0))

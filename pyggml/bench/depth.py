"""sweep-bench's table: the speed of a prompt and of generated tokens as the cache fills."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from pyggml.bench.runs import WARMUPS, Clock, Test, nanoseconds_of
from pyggml.bench.setting import described
from pyggml.errors import ShapeError
from pyggml.generate.plans import padded_rows

if TYPE_CHECKING:
    from pyggml.generate.session import Session
    from pyggml.models.model import Model
    from pyggml.runtime.memory import Memory


@dataclass(frozen=True, slots=True)
class Point:
    """Times at one depth, and the memory that it takes to get there.

    setting      as in `Row`, and `n_kv_max`: the context
    pp, tg       tokens of the prompt, and generated tokens
    n_kv         tokens in the cache before either
    t_pp, t_tg   seconds
    compute      bytes of the arena of the larger of the two plans at this depth
    cache        bytes of caches for n_kv + pp tokens
    score_peak   bytes, as in `Memory`
    """

    setting: Mapping[str, Any]
    pp: int
    tg: int
    n_kv: int
    t_pp: float
    t_tg: float
    compute: int
    cache: int
    score_peak: int

    @property
    def speed_pp(self) -> float:
        """Tokens per second of the prompt."""
        return self.pp / max(self.t_pp, 1e-9)

    @property
    def speed_tg(self) -> float:
        """Tokens per second of generation."""
        return self.tg / max(self.t_tg, 1e-9)

    def fields(self) -> dict[str, Any]:
        """The point as an object of sweep-bench's JSON, with fields of our own."""
        return {
            **self.setting, "pp": self.pp, "tg": self.tg, "n_kv": self.n_kv,
            "t_pp": self.t_pp, "speed_pp": round(self.speed_pp, 6),
            "t_tg": self.t_tg, "speed_tg": round(self.speed_tg, 6),
            "compute_bytes": self.compute, "cache_bytes": self.cache,
            "score_peak_bytes": self.score_peak,
        }  # fmt: skip


def depths(n_ctx: int, n_ubatch: int, n_gen: int | None = None) -> range:
    """The depths of a sweep. ShapeError if the prompt or the generated tokens do not fit."""
    if not 1 <= n_ubatch <= n_ctx:
        raise ShapeError(f"a prompt of {n_ubatch} tokens does not fit in a context of {n_ctx}")
    result = range(0, n_ctx - n_ubatch + 1, n_ubatch)
    if result[-1] + generated(n_ubatch, n_gen) > n_ctx:
        raise ShapeError(f"{n_gen} tokens do not fit after {result[-1]} in a context of {n_ctx}")
    return result


def generated(n_ubatch: int, n_gen: int | None) -> int:
    """How many tokens are generated at each depth."""
    return max(n_ubatch // 4, 1) if n_gen is None else n_gen


def sweep(
    model: Model,
    *,
    n_ctx: int,
    n_ubatch: int = 512,
    n_gen: int | None = None,
    warmup: bool = True,
    setting: Mapping[str, Any] | None = None,
    begin: Callable[[Session], object] | None = None,
    ran: Callable[[], object] | None = None,
    clock: Clock = perf_counter_ns,
) -> Iterator[Point]:
    """Fill a cache of `n_ctx` tokens in parts of `n_ubatch`, and yield a point for each part.

    n_gen   tokens to generate at each depth; by default a quarter of n_ubatch
    warmup  run everything WARMUPS times more before, without counting it: new depths need new
            plans
    setting, begin, ran   as in `measure`
    At each depth, tokens are generated first and dropped again; then the prompt runs, and stays.
    ShapeError if the prompt or the generated tokens do not fit.
    """
    tg = generated(n_ubatch, n_gen)
    fields = described(model, n_batch=n_ubatch, n_ubatch=n_ubatch) | {"n_kv_max": n_ctx}
    fields |= dict(setting or {})
    tests = [
        (Test(n_gen=tg, n_depth=n_kv), Test(n_prompt=n_ubatch, n_depth=n_kv))
        for n_kv in depths(n_ctx, n_ubatch, n_gen)
    ]
    session = model.session(n_ctx=n_ctx, n_batch=n_ubatch)
    if begin is not None:
        begin(session)
    for pair in tests:
        times = [0, 0]
        for _ in range(1 + WARMUPS * warmup):
            times = [nanoseconds_of(session, test, clock) for test in pair]
            if ran is not None:
                ran()
        n_kv = pair[0].n_depth
        memory = _memory(session, n_kv, n_ubatch)
        yield Point(
            fields, n_ubatch, tg, n_kv, times[1] / 1e9, times[0] / 1e9,
            memory.compute, _cache_bytes(model, n_kv + n_ubatch, n_ubatch), memory.score_peak,
        )  # fmt: skip


def _memory(session: Session, n_kv: int, n_tokens: int) -> Memory:
    """That of the plans for `n_tokens` tokens after `n_kv`, and for one."""
    plans = []
    for n in (n_tokens, 1):
        rows = padded_rows(n_kv + n, session.n_ctx)
        plans.append(session.plan(*session.plans.sizes(n, rows, 1), 1))
    return plans[0].memory_with(plans[1])


def _cache_bytes(model: Model, n_ctx: int, n_batch: int) -> int:
    caches = model.caches(n_ctx, n_batch)
    return sum(state.spec.nbytes for cache in caches for state in cache.states)

"""llama-bench's tests: the time of prompts and of generated tokens, at a depth of the cache."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import fmean, stdev
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from pyggml.bench.setting import described
from pyggml.errors import ShapeError

if TYPE_CHECKING:
    from pyggml.generate.session import Session
    from pyggml.models.model import Model

#: Nanoseconds of a clock that only moves forward.
Clock: TypeAlias = Callable[[], int]
#: Caches have a whole number of these rows, as llama.cpp's have.
CTX_STEP = 256
#: Runs that are not counted. The first compiles plans and loads weights; the second records graphs
#: on a GPU.
WARMUPS = 2


@dataclass(frozen=True, slots=True)
class Test:
    """What is timed: a prompt of `n_prompt` tokens, then `n_gen` tokens, one at a time.

    n_depth  tokens that are in the cache before, without being timed
    loop     the device feeds the tokens itself. Otherwise, each comes from the host, which waits
             for its logits
    str(test) is llama-bench's name: pp512, tg128, pp512+tg128 @ d4096, and tg128 loop.
    ShapeError if nothing is timed, or for a loop with a prompt.
    """

    n_prompt: int = 0
    n_gen: int = 0
    n_depth: int = 0
    loop: bool = False

    def __post_init__(self) -> None:
        if min(self.n_prompt, self.n_gen, self.n_depth) < 0 or not self.n_tokens:
            raise ShapeError(f"{self!r}: needs a prompt or tokens to generate, and no size below 0")
        if self.loop and (self.n_prompt or not self.n_gen):
            raise ShapeError(f"{self!r}: a loop generates tokens, without a prompt")

    @property
    def n_tokens(self) -> int:
        """The tokens that are timed."""
        return self.n_prompt + self.n_gen

    def __str__(self) -> str:
        parts = [f"pp{self.n_prompt}"] * (self.n_prompt > 0) + [f"tg{self.n_gen}"] * (
            self.n_gen > 0
        )
        loop, depth = " loop" * self.loop, f" @ d{self.n_depth}" * (self.n_depth > 0)
        return "+".join(parts) + loop + depth


@dataclass(frozen=True, slots=True)
class Row:
    """The samples of a test, and the memory of a session for it.

    setting     llama-bench's fields of the model, the machine and the options (see `described`)
    samples_ns  nanoseconds of each repetition
    test_time   when the test began: "2026-11-26T17:25:04Z"
    compute, cache, score_peak   bytes, as in `Session.memory`
    """

    test: Test
    setting: Mapping[str, Any]
    samples_ns: tuple[int, ...]
    test_time: str
    compute: int
    cache: int
    score_peak: int

    @property
    def samples_ts(self) -> tuple[float, ...]:
        """Tokens per second of each repetition."""
        return tuple(self.test.n_tokens * 1e9 / max(ns, 1) for ns in self.samples_ns)

    @property
    def avg_ts(self) -> float:
        """The mean of `samples_ts`."""
        return fmean(self.samples_ts)

    @property
    def stddev_ts(self) -> float:
        """The standard deviation of the sample; 0 for one repetition."""
        return deviation(self.samples_ts)

    def fields(self) -> dict[str, Any]:
        """The row as an object of llama-bench's JSON, with fields of our own."""
        test = self.test
        return {
            **self.setting,
            "n_prompt": test.n_prompt, "n_gen": test.n_gen, "n_depth": test.n_depth,
            "loop": test.loop, "test": str(test),
            "compute_bytes": self.compute, "cache_bytes": self.cache,
            "score_peak_bytes": self.score_peak,
            "test_time": self.test_time,
            "avg_ns": round(fmean(self.samples_ns)), "stddev_ns": round(deviation(self.samples_ns)),
            "avg_ts": round(self.avg_ts, 6), "stddev_ts": round(self.stddev_ts, 6),
            "samples_ns": list(self.samples_ns),
            "samples_ts": [round(rate, 6) for rate in self.samples_ts],
        }  # fmt: skip


def deviation(samples: Iterable[float]) -> float:
    values = list(samples)
    return float(stdev(values)) if len(values) > 1 else 0.0


def measure(
    model: Model,
    tests: Iterable[Test],
    *,
    n_batch: int = 2048,
    n_ubatch: int = 512,
    repeats: int = 5,
    warmup: bool = True,
    setting: Mapping[str, Any] | None = None,
    begin: Callable[[Session], object] | None = None,
    ran: Callable[[], object] | None = None,
    clock: Clock = perf_counter_ns,
) -> Iterator[Row]:
    """Run each test `repeats` times in a session of its own, and yield its row.

    n_batch, n_ubatch  a prompt runs in parts of the smaller one
    warmup   run each test WARMUPS times more before, without counting these
    setting  fields of each row's `setting` that the model does not know, such as n_gpu_layers
    begin    is called with each session before it runs
    ran      is called after each run
    Tokens are random numbers, the same in every run. As in llama-bench, the logits of each
    generated token arrive on the host, but nothing is sampled from them.
    After Ctrl-C, the test that was being measured still yields a row if it has a sample; then
    KeyboardInterrupt is raised.
    """
    fields = described(model, n_batch=n_batch, n_ubatch=n_ubatch) | dict(setting or {})

    for test in tests:
        n_ctx = -(-(test.n_depth + test.n_tokens) // CTX_STEP) * CTX_STEP
        session = model.session(n_ctx=n_ctx, n_batch=min(n_batch, n_ubatch))
        memory = session.memory()
        start = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        times: list[int] = []
        interrupt = None
        try:
            if begin is not None:
                begin(session)
            for number in range(-WARMUPS * warmup, repeats):
                time = nanoseconds_of(session, test, clock)
                if number >= 0:
                    times.append(time)
                if ran is not None:
                    ran()
        except KeyboardInterrupt as error:
            interrupt = error
        del session
        gc.collect()  # a session is in a cycle, and its caches may fill the device
        if times:
            yield Row(
                test, fields, tuple(times), start,
                memory.compute, memory.states, memory.score_peak,
            )  # fmt: skip
        if interrupt is not None:
            raise interrupt


def nanoseconds_of(session: Session, test: Test, clock: Clock) -> int:
    """Nanoseconds of one run of a test."""
    fill(session, test.n_depth)
    tokens = random_tokens(session, test.n_tokens, test.n_depth)
    prompt, tokens = tokens[: test.n_prompt], tokens[test.n_prompt :]
    start = clock()
    if prompt:
        session.forward(prompt)
    if test.loop:
        deque(session.generate(tokens[:1], test.n_gen, ahead=test.n_gen), maxlen=0)
    else:
        for token in tokens:
            session.forward([token])
    return clock() - start


def fill(session: Session, n: int) -> None:
    """Make the session have exactly `n` tokens."""
    session.truncate(min(n, len(session.tokens)))
    if more := n - len(session.tokens):
        session.forward(random_tokens(session, more, 0), "none")


def random_tokens(session: Session, n: int, seed: int) -> list[int]:
    """`n` ids of the vocabulary."""
    ids: list[int] = (
        np.random.default_rng(seed).integers(session.model.arch.n_vocab, size=n).tolist()
    )
    return ids

"""`pyggml.bench`: what is timed, with a clock of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyggml as gg
from pyggml import bench
from pyggml.errors import ShapeError
from pyggml.generate.session import Session
from pyggml.models.model import Model
from pyggml.models.presets import preset
from pyggml.models.synth import synth


class Clock:
    """Each token that a session runs takes 2 ms in a prompt, and 5 ms alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 10**9
        self.calls: list[tuple[int, int]] = []  # tokens of the session before, and of the call
        forward = Session.forward

        def counted(session: Session, tokens: Any, outputs: Any = "last") -> Any:
            tokens = list(tokens)
            self.calls.append((len(session.tokens), len(tokens)))
            self.now += 5_000_000 if len(tokens) == 1 else 2_000_000 * len(tokens)
            return forward(session, tokens, outputs)

        monkeypatch.setattr(Session, "forward", counted)

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path: Path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    synth(path, preset("tiny", layers=1), dtype="q8_0")
    with gg.load(path, backends=["numpy"], flash=False) as model:
        yield model


def test_names() -> None:
    names = {
        bench.Test(512): "pp512", bench.Test(0, 128): "tg128",
        bench.Test(512, 128): "pp512+tg128", bench.Test(512, 0, 4096): "pp512 @ d4096",
        bench.Test(0, 64, 0, loop=True): "tg64 loop",
        bench.Test(0, 64, 8, loop=True): "tg64 loop @ d8",
    }  # fmt: skip
    assert [str(test) for test in names] == list(names.values())
    for wrong in ((0, 0), (-1, 5), (5, -1), (5, 0, -1)):
        with pytest.raises(ShapeError, match="needs a prompt or tokens"):
            bench.Test(*wrong)
    with pytest.raises(ShapeError, match="without a prompt"):
        bench.Test(5, 5, loop=True)


def test_what_is_timed(model: Model, clock: Clock) -> None:
    tests = [bench.Test(20), bench.Test(0, 3, 30), bench.Test(10, 4)]
    rows = list(bench.measure(model, tests, n_ubatch=16, repeats=2, clock=clock))
    assert [row.samples_ns for row in rows] == [(40_000_000,) * 2, (15_000_000,) * 2,
                                                (40_000_000,) * 2]  # fmt: skip
    assert [row.avg_ts for row in rows] == pytest.approx([500, 200, 350])
    assert [row.stddev_ts for row in rows] == [0, 0, 0]
    prompt = [(0, 20)] * 4  # twice to warm up
    depth = [(0, 30)] + [(30, 1), (31, 1), (32, 1)] * 4  # the cache is filled once, untimed
    both = [(0, 10), (10, 1), (11, 1), (12, 1), (13, 1)] * 4
    assert clock.calls == [*prompt, *depth, *both]


def test_without_a_warm_up(model: Model, clock: Clock) -> None:
    (row,) = bench.measure(model, [bench.Test(5)], repeats=1, warmup=False, clock=clock)
    assert clock.calls == [(0, 5)] and row.samples_ns == (10_000_000,) and row.stddev_ts == 0


def test_the_deviation_is_that_of_a_sample() -> None:
    row = bench.Row(bench.Test(10), {}, (10**9, 2 * 10**9, 5 * 10**9), "", 0, 0, 0)
    assert row.samples_ts == (10.0, 5.0, 2.0)
    assert row.avg_ts == pytest.approx(17 / 3) and row.stddev_ts == pytest.approx(4.0414518)
    fields = row.fields()
    assert fields["avg_ns"] == round(8e9 / 3) and fields["stddev_ns"] == 2081665999


def test_the_loop_runs_on_the_device(model: Model, clock: Clock) -> None:
    rows = list(bench.measure(model, [bench.Test(0, 6, 4, loop=True)], repeats=1, clock=clock))
    # The other five tokens of each of the three runs do not return.
    assert clock.calls == [(0, 4)] + [(4, 1)] * 3
    assert str(rows[0].test) == "tg6 loop @ d4"


def test_the_memory_is_that_of_a_session_for_the_test(model: Model) -> None:
    (row,) = bench.measure(model, [bench.Test(20, 0, 300)], n_ubatch=64, repeats=1)
    memory = model.session(n_ctx=512, n_batch=64).memory()
    assert (row.compute, row.cache) == (memory.compute, memory.states)
    assert row.score_peak == memory.score_peak > 0


def test_an_interrupted_test_yields_the_samples_that_it_has(model: Model) -> None:
    def ran() -> None:
        nonlocal runs
        runs += 1
        if runs == 4:
            raise KeyboardInterrupt

    runs = 0
    rows = bench.measure(model, [bench.Test(4), bench.Test(5)], repeats=5, ran=ran)
    assert len(next(rows).samples_ns) == 2
    with pytest.raises(KeyboardInterrupt):
        next(rows)


def test_the_sweep(model: Model, clock: Clock) -> None:
    points = list(bench.sweep(model, n_ctx=30, n_ubatch=8, n_gen=2, clock=clock))
    assert [point.n_kv for point in points] == [0, 8, 16]
    assert [(p.t_pp, p.t_tg) for p in points] == [(0.016, 0.010)] * 3
    assert [p.speed_pp for p in points] == pytest.approx([500] * 3)
    assert [p.speed_tg for p in points] == pytest.approx([200] * 3)
    calls = [[(n, 1), (n + 1, 1), (n, 8)] * 3 for n in (0, 8, 16)]
    assert clock.calls == [call for part in calls for call in part]


def test_the_memory_of_a_sweep(model: Model) -> None:
    points = list(bench.sweep(model, n_ctx=768, n_ubatch=256, n_gen=1, warmup=False))
    for point in points:
        memory = model.session(n_ctx=point.n_kv + 256, n_batch=256).memory()
        assert (point.compute, point.cache) == (memory.compute, memory.states), point.n_kv
        assert point.score_peak == memory.score_peak


def test_wrong_sizes_of_a_sweep(model: Model) -> None:
    for n_ctx, n_ubatch, n_gen in ((8, 16, 1), (16, 0, 1), (16, 8, 9)):
        with pytest.raises(ShapeError, match="in a context"):
            next(bench.sweep(model, n_ctx=n_ctx, n_ubatch=n_ubatch, n_gen=n_gen))

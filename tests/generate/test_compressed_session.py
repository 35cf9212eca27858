"""Sessions of DeepSeek V4, whose caches have windows, compressed rows and rings of compressors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pyggml as gg
from pyggml.errors import DeviceError, ShapeError
from pyggml.generate.sample import Sampler
from pyggml.models.compressor import CompressedCache
from pyggml.models.model import Model, load
from pyggml.models.presets import TINY_V4
from pyggml.models.synth import synth
from tests.interrupts import everywhere

#: Longer than two of the longest windows, of 128 tokens.
TOKENS = [(37 * i * i + 5 * i) % 512 for i in range(280)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    synth(path, TINY_V4, dtype="f32", seed=1)
    return path


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with on("numpy", path) as model:
        yield model


@pytest.fixture(scope="module")
def expected(model: Model) -> NDArray[np.float32]:
    return model.session(300, 300).forward(TOKENS, "all")


def on(place: str, path: Path, *, flash: bool = True) -> Model:
    return load(path, backends=[place], cache_k="f32", cache_i="f32", flash=flash)


def close(a: Any, b: Any) -> bool:
    return bool(np.abs(a - b).max() <= 1e-4 * np.abs(b).max())


@pytest.mark.parametrize("n_batch", [2, 3, 5, 64, 127, 129])
def test_parts_of_a_prompt(model: Model, expected: NDArray[np.float32], n_batch: int) -> None:
    session = model.session(300, n_batch)
    assert close(session.forward(TOKENS, "all"), expected)


def test_parts_of_all_lengths(model: Model, expected: NDArray[np.float32]) -> None:
    """A part of 5 tokens runs as 6, with one of padding, which must write nothing."""
    session, done = model.session(300, 40), 0
    for n in (1, 2, 3, 5, 7, 9, 1, 1, 11, 13, 15, 27, 29, 1, 37, 39, 5, 4, 3, 2, 1, 23, 40):
        logits = session.forward(TOKENS[done : done + n])
        done += n
        assert close(logits, expected[done - 1 : done]), done
    assert done > 256


@pytest.mark.parametrize("place", ["numpy", "null"])
def test_sessions_without_flash_attention(
    path: Path, place: str, model: Model, expected: NDArray[np.float32], tmp_path: Path
) -> None:
    """Their caches are those of flash attention, so either continues the other's session."""
    with on(place, path, flash=False) as scores:
        session, other = scores.session(300, 40), model.session(300, 40)
        for i in range(0, 270, 90):
            assert close(session.forward(TOKENS[i : i + 90], "all"), expected[i : i + 90])
        session.save(tmp_path / "saved")
        other.load(tmp_path / "saved")
        assert close(other.forward(TOKENS[270:], "all"), expected[270:])
        session.truncate(255)
        assert close(session.forward([TOKENS[255]]), expected[255:256])
        assert close(session.forward(TOKENS[256:], "all"), expected[256:])


def test_padding_at_the_end_of_the_context(model: Model, expected: NDArray[np.float32]) -> None:
    for n_ctx in (1, 2, 3, 7, 131):
        session = model.session(n_ctx, 100)
        n = max(n_ctx - 5, 1)
        assert close(session.forward(TOKENS[:n], "all"), expected[:n])
        for i in range(n, n_ctx):
            assert close(session.forward([TOKENS[i]]), expected[i : i + 1])
        with pytest.raises(ShapeError, match="0 of n_ctx"):
            session.forward([1])


def test_caches_are_small(model: Model) -> None:
    caches = model.session(1000, 16).caches
    assert all(isinstance(cache, CompressedCache) for cache in caches)
    sizes = [[state.ne[1] for state in cache.states] for cache in caches]
    assert sizes == [[64], [64, 250, 64, 64, 250, 64, 64], [64, 7, 192, 192], sizes[1]]
    widths = [[state.ne[0] for state in cache.states] for cache in caches[1:3]]
    assert widths == [[64, 64, 128, 128, 64, 128, 128], [64, 64, 64, 64]]


def test_truncation(model: Model, expected: NDArray[np.float32]) -> None:
    """A short way back needs nothing; a long one runs the tokens again."""
    session = model.session(300, 20)  # rings of 64 rows (ratio 4 and window) and 192 (ratio 128)
    calls = counted(session)
    session.forward(TOKENS)
    n_parts = len(calls)
    assert n_parts == 14
    for n, again in ((270, 0), (260, 0), (232, 0), (200, 10), (128, 7), (5, 1), (0, 0)):
        if n > len(session.tokens):
            session.forward(TOKENS[len(session.tokens) :])
        before = len(calls)
        session.truncate(n)
        assert len(calls) - before == again, n
        assert session.tokens == TOKENS[:n]
        assert close(session.forward(TOKENS[n : n + 12], "all"), expected[n : n + 12]), n


def counted(session: Any) -> list[Any]:
    """The parts that the session runs from now on."""
    calls: list[Any] = []
    prepared = session.prepared

    def count(*args: Any) -> Any:
        calls.append(args)
        return prepared(*args)

    session.prepared = count
    return calls


def test_sessions_run_in_turns(model: Model, expected: NDArray[np.float32]) -> None:
    one, two = model.session(300, 50), model.session(200, 30)
    other = model.session(200, 200).forward(TOKENS[100:260], "all")
    for i in range(0, 150, 50):
        assert close(one.forward(TOKENS[i : i + 50], "all"), expected[i : i + 50])
        part = TOKENS[100 + i : 150 + i]
        assert close(two.forward(part, "all"), other[i : i + 50])


@pytest.mark.parametrize("n", [2, 30, 70, 133, 260])
def test_copies(model: Model, tmp_path: Path, n: int) -> None:
    session = model.session(300, 20)
    session.forward(TOKENS[:n])
    nbytes = session.save(tmp_path / "saved")
    assert (tmp_path / "saved").stat().st_size == nbytes
    other, fork = model.session(300, 20), session.fork()
    other.forward(TOKENS[::-1])
    other.load(tmp_path / "saved")
    tokens = list(session.generate([4], 12))
    assert list(other.generate([4], 12)) == tokens == list(fork.generate([4], 12, ahead=4))


def test_copies_know_which_rows_are_lost(
    model: Model, expected: NDArray[np.float32], tmp_path: Path
) -> None:
    session = model.session(300, 20)
    session.forward(TOKENS[:250])
    session.truncate(215)
    session.save(tmp_path / "saved")
    loaded = model.session(300, 20)
    loaded.load(tmp_path / "saved")
    for copy in (session.fork(), loaded):
        copy.truncate(190)
        assert close(copy.forward(TOKENS[190:210], "all"), expected[190:210])


# -- decoding on the device ---------------------------------------------------------------------


@pytest.mark.parametrize(("place", "ahead"), [("numpy", 5), ("numpy", 64), ("null:0", 1)])
def test_the_device_decodes(path: Path, model: Model, place: str, ahead: int) -> None:
    """Over the ends of windows of both kinds."""
    one, session = model.session(300, 50), on(place, path).session(300, 50)
    prompt, expected = TOKENS[:110], []
    token = int(one.forward(prompt)[-1].argmax())
    while len(expected) < 30:
        expected.append(token)
        token = int(one.forward([token])[-1].argmax())
    assert list(session.generate(prompt, 30, ahead=ahead)) == expected
    one.truncate(len(session.tokens))
    assert session.tokens == one.tokens
    assert close(session.forward([1]), one.forward([1]))


def test_after_a_stop_the_session_goes_on(model: Model) -> None:
    """Steps after a stop token repeat it, and the early step of a device is wasted."""
    free = list(model.session(300).generate(TOKENS[:120], 12, Sampler(temperature=2, seed=3)))
    stop = free[5:6]
    session, one = model.session(300), model.session(300)
    sampler = Sampler(temperature=2, seed=3)
    tokens = list(session.generate(TOKENS[:120], 12, sampler, stop, ahead=30))
    assert tokens == free[: free.index(stop[0]) + 1]
    assert close(session.forward(TOKENS[:9], "all"), one.forward(session.tokens, "all")[-9:])


# -- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, DeviceError])
def test_a_part_that_failed_is_forgotten(
    path: Path, expected: NDArray[np.float32], error: type[BaseException]
) -> None:
    """It may have written to any of the states."""
    session = on("null:0", path).session(300, 20)
    session.forward(TOKENS[:128])
    other = [(t + 1) % 512 for t in TOKENS[128:148]]
    submit, calls = gg.Plan.submit, []

    def failing(plan: Any, *arrays: Any) -> Any:
        calls.append(submit(plan, *arrays).result())
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gg.Plan, "submit", failing)
        with pytest.raises(error):
            session.forward([*other, *other])
    assert len(calls) == 1 and session.tokens == TOKENS[:128]
    assert close(session.forward(TOKENS[128:150], "all"), expected[128:150])


def test_interrupts_on_a_device(path: Path, model: Model) -> None:
    session, one = on("null:0", path).session(64, 4), model.session(64, 4)

    def begin() -> Callable[[], object]:
        session.truncate(0)
        return lambda: session.forward(TOKENS[:10])

    begin()()  # compiles
    n_points = 0
    for _ in everywhere(begin, 30_011):
        n_points += 1
        tokens = list(session.tokens)
        assert tokens == TOKENS[: len(tokens)]
        one.truncate(0)
        assert close(session.forward([5]), one.forward([*tokens, 5]))
    assert n_points > 3

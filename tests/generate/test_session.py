"""Sessions: parts of a prompt, sharing, truncation, saving, and decoding on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import gguf
from pyggml.errors import DeviceError, GGUFError, IdError, ShapeError, UnknownNameError
from pyggml.generate.plans import padded_rows, padded_tokens
from pyggml.generate.sample import Sampler, greedy
from pyggml.generate.session import Session
from pyggml.models.model import Model, load
from pyggml.models.presets import TINY, TINY_GPT_OSS
from pyggml.models.synth import synth
from tests.interrupts import everywhere

TOKENS = [7, 3, 200, 41, 5, 5, 399, 12, 88, 17, 301]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    synth(path, TINY, dtype="q8_0", seed=1)
    return path


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    yield on("numpy", path)


def on(place: str, path: Path) -> Model:
    return load(path, backends=[place], cache_k="f32", cache_v="f32", mla=1)


def close(a: Any, b: Any) -> bool:
    return bool(np.abs(a - b).max() <= 1e-4 * np.abs(b).max())


@pytest.mark.parametrize("n_batch", [1, 2, 3, 4, 11, 64])
def test_parts_of_a_prompt_give_the_same_logits(model: Model, n_batch: int) -> None:
    whole = model.session(32, 16).forward(TOKENS, "all")
    assert whole.shape == (len(TOKENS), TINY.n_vocab) and whole.dtype == np.float32
    session = model.session(32, n_batch)
    assert close(session.forward(TOKENS, "all"), whole)
    session.truncate(0)
    assert close(session.forward(TOKENS), whole[-1:])
    session.truncate(4)
    assert session.forward(TOKENS[4:7], "none").shape == (0, TINY.n_vocab)
    assert close(session.forward(TOKENS[7:], "all"), whole[7:])


def test_tokens_one_by_one_past_the_rows_of_their_plan(model: Model) -> None:
    """Steps keep a plan for a range of rows and a number of outputs."""
    tokens = [(7 * i) % TINY.n_vocab for i in range(258)]
    want = model.session(300).forward(tokens, "all")
    session = model.session(300)
    session.forward(tokens[:254], "none")
    assert session.forward(tokens[254:255], "none").shape == (0, TINY.n_vocab)
    for i in (255, 256, 257):
        assert close(session.forward([tokens[i]]), want[i : i + 1])
    session.truncate(20)
    assert close(session.forward([tokens[20]]), want[20:21])
    assert len({key for key in session.plans._batches if key[0] == 1}) == 3


def test_sessions_share_weights_but_not_tokens(model: Model) -> None:
    first, second = model.session(32), model.session(16)
    logits = first.forward(TOKENS)
    second.forward(TOKENS[::-1])
    n_weights = len(model.store.shared.weights)
    assert first.store.shared is second.store.shared is model.store.shared
    assert close(first.forward(TOKENS[:2]), model.session(32).forward([*TOKENS, 7, 3]))
    assert close(model.session(32).forward(TOKENS), logits)
    assert len(model.store.shared.weights) == n_weights


def test_sessions_of_one_model_have_caches_of_several_types(model: Model) -> None:
    """They run in turns, and do not change the model."""
    kinds = ({}, {"cache_k": "f16"}, {"cache_k": "bf16", "mla": 0, "cache_v": "f16"})
    sessions = [model.session(32 + 8 * i, **kind) for i, kind in enumerate(kinds)]
    logits = [session.forward(TOKENS[:6]) for session in sessions]
    logits = [session.forward(TOKENS[6:]) for session in [*sessions, sessions[2].fork()]]
    types = [{state.dtype.name for cache in s.caches for state in cache.states} for s in sessions]
    assert types == [{"f32"}, {"f16"}, {"bf16", "f16"}]
    for other in logits[1:]:
        assert 1e-5 < np.abs(other - logits[0]).max() / np.abs(logits[0]).max() < 0.1
    shared = model.store.shared
    assert all(session.store.shared is shared for session in sessions)
    assert model.options.cache_k == "f32" and close(model.session(32).forward(TOKENS), logits[0])


def test_the_session_goes_on_after_an_error(model: Model) -> None:
    session = model.session(12, 4)
    session.forward(TOKENS[:5])
    for tokens, error, text in (
        ([], ShapeError, "at least one token"),
        ([0, TINY.n_vocab], IdError, f"token {TINY.n_vocab} is outside the vocabulary"),
        ([-1], IdError, "outside the vocabulary"),
        (range(8), ShapeError, "8 tokens do not fit: 7 of n_ctx=12 are free"),
    ):
        with pytest.raises(error, match=text):
            session.forward(tokens)
    with pytest.raises(UnknownNameError, match="outputs='first' must be 'last', 'all' or 'none'"):
        session.forward([1], "first")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="the session has 5 tokens"):
        session.truncate(6)
    assert session.tokens == TOKENS[:5]
    assert close(session.forward(TOKENS[5:]), model.session(12).forward(TOKENS))


@pytest.mark.parametrize("error", [KeyboardInterrupt, DeviceError])
@pytest.mark.parametrize("place", ["numpy", "null:0"])
def test_an_error_keeps_the_parts_that_were_finished(
    path: Path, place: str, error: type[BaseException]
) -> None:
    """It comes when the second part is submitted, while the first may still be queued."""
    model = on(place, path)
    session = model.session(32, 4)
    session.forward(TOKENS, "none")
    session.truncate(0)
    submit, calls = gg.Plan.submit, []

    def failing(plan: Any, *arrays: Any) -> Any:
        calls.append(plan)
        if len(calls) == 2:
            raise error
        return submit(plan, *arrays)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gg.Plan, "submit", failing)
        with pytest.raises(error):
            session.forward(TOKENS)
    assert len(TOKENS) > 8 and session.tokens == TOKENS[:4]
    assert close(session.forward(TOKENS[4:]), model.session(32).forward(TOKENS))


# -- generation -------------------------------------------------------------------------------


def test_generate_feeds_each_token(model: Model) -> None:
    session, tokens = model.session(32), list(TOKENS)
    for token in model.session(32).generate(TOKENS, 6):
        assert token == int(session.forward(tokens)[0].argmax())
        tokens = [token]


@pytest.mark.parametrize(
    ("place", "ahead"), [("numpy", n) for n in (2, 3, 7, 100)] + [("null:0", n) for n in (1, 3)]
)
@pytest.mark.parametrize("stops", [False, True])
def test_decoding_on_the_device_gives_the_same_tokens(
    path: Path, model: Model, place: str, ahead: int, stops: bool
) -> None:
    free = list(model.session(40).generate(TOKENS, 9))
    stop = free[5:6] if stops else []
    one = model.session(40)
    expected = list(one.generate(TOKENS, 9, stop=stop))
    assert expected == (free[: free.index(stop[0]) + 1] if stops else free)
    session = on(place, path).session(40)
    assert list(session.generate(TOKENS, 9, stop=stop, ahead=ahead)) == expected
    assert session.tokens == one.tokens
    assert close(session.forward([1]), one.forward([1]))


@pytest.mark.parametrize(
    "between", ["forward", "truncate", "replace", "fork", "generate", "save", ""]
)
def test_a_step_that_was_submitted_early_changes_nothing(
    path: Path, model: Model, tmp_path: Path, between: str
) -> None:
    """On a device, the step after a token runs before the caller has seen that token."""

    def tokens(session: Session) -> list[int]:
        steps = session.generate(TOKENS, 8)
        result = [next(steps), next(steps), next(steps)]
        if between == "forward":
            session.forward([9])
        elif between == "truncate":
            session.truncate(5)
        elif between == "replace":  # the same length and the same next token as before
            n = len(session.tokens)
            session.truncate(0)
            session.forward([9] * n)
        elif between == "fork":
            other = session.fork()
            result += other.generate([4], 3)
        elif between == "generate":
            result += session.generate([4], 3)
        elif between == "save":
            session.save(tmp_path / "saved.gguf")
            session.load(tmp_path / "saved.gguf")
        result += steps
        return [*result, *session.tokens]

    early = on("null:0", path).session(40)
    submit, runs = gg.Plan.submit, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gg.Plan, "submit", lambda *a: runs.append(a) or submit(*a))
        assert tokens(early) == tokens(model.session(40))
    assert len(runs) >= 7


@pytest.mark.parametrize("action", ["prompt", "token"])
def test_interrupts_on_a_device(windowed_path: Path, action: str) -> None:
    """The session goes on from the tokens that it lists, although more may have run."""
    model = load(windowed_path, backends=["null:0"], cache_k="f32", cache_v="f32")
    session, one = model.session(64, 2), model.session(64, 2)
    prompt = TOKENS[:6]

    def begin() -> Callable[[], object]:
        session.truncate(0)
        if action == "prompt":
            return lambda: session.forward(prompt)
        steps = session.generate(prompt, 5)
        for _ in range(2):
            next(steps)
        return lambda: next(steps)

    begin()()  # compiles
    n_points = 0
    for _ in everywhere(begin, 4001 if action == "prompt" else 1201):
        n_points += 1
        tokens = list(session.tokens)
        if action == "prompt":
            assert tokens == prompt[: len(tokens)]
        one.truncate(0)
        assert close(session.forward([5]), one.forward([*tokens, 5]))
    assert n_points > 5


def test_generation_ends_where_the_context_ends(model: Model) -> None:
    for ahead in (1, 8):
        session, tokens = model.session(14), []
        with pytest.raises(ShapeError, match="do not fit"):
            tokens.extend(session.generate(TOKENS, 20, ahead=ahead))
        assert len(tokens) == 4 and len(session.tokens) == 14


def test_samplers() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.3, 0.2], np.float32))
    assert greedy(logits) == 1 == Sampler(temperature=0)(logits)
    sampler = Sampler(temperature=1, top_k=0, top_p=1)
    counts = np.bincount([sampler(logits) for _ in range(4000)], minlength=4) / 4000
    assert np.abs(counts - [0.1, 0.4, 0.3, 0.2]).max() < 0.03
    assert {Sampler(temperature=5, top_k=2, seed=s)(logits) for s in range(40)} == {1, 2}
    assert {Sampler(temperature=1, top_p=0.65, seed=s)(logits) for s in range(40)} == {1, 2}
    again = [Sampler(seed=3)(logits) for _ in range(2)]
    assert again[0] == again[1]
    for wrong in ({"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"temperature": float("nan")}):
        with pytest.raises(ShapeError, match="temperature="):
            Sampler(**wrong)


def test_buckets() -> None:
    for n in range(1, 600):
        tokens = padded_tokens(n, 512)
        assert n <= tokens <= max(1.5 * n, n) and (tokens <= 512 or n > 512)
    assert len({padded_tokens(n, 512) for n in range(1, 513)}) == 18
    for n in (1, 256, 257, 2049, 5000, 163_840):
        rows = padded_rows(n, 200_000)
        assert n <= rows <= max(256, 1.15 * n + 256)
    assert padded_rows(90, 100) == 100
    assert len({padded_rows(n, 163_840) for n in range(1, 163_841)}) < 64


# -- copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"mla": 0}, {"mla": 1, "cache_k": "bf16"}, {"mla": 3}])
def test_a_copy_goes_on_alike(path: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model = load(path, backends=["numpy"], **options)
    session = model.session(32)
    session.forward(TOKENS)
    session.truncate(9)
    nbytes = session.save(tmp_path / "saved")
    assert (tmp_path / "saved").stat().st_size == nbytes
    other: Session = load(path, backends=["numpy"], **options).session(64)
    other.forward([9, 9, 9])
    other.load(tmp_path / "saved")
    fork = session.fork()
    expected = list(session.generate([4], 5))
    assert list(other.generate([4], 5)) == expected == list(fork.generate([4], 5))
    empty = model.session(32)
    empty.save(tmp_path / "empty")
    other.load(tmp_path / "empty")
    assert other.tokens == []


def test_files_that_do_not_fit(path: Path, model: Model, tmp_path: Path) -> None:
    session = model.session(32)
    session.forward(TOKENS)
    session.save(tmp_path / "saved")
    (tmp_path / "cut").write_bytes((tmp_path / "saved").read_bytes()[:-40])
    other = tmp_path / "other.gguf"
    synth(other, TINY, dtype="f16")
    half = load(path, backends=["numpy"], mla=1)
    for target, file, text in (
        (model.session(8), "saved", "11 tokens do not fit in a session with n_ctx=8"),
        (half.session(32), "saved", r"cache_kv_l0' is f32 \[80, 11, 1\], but this session has f16"),
        (load(other, mla=1).session(32), "saved", "saved by a session of another model"),
        (model.session(32), "cut", "cut"),
        (model.session(32), str(path), "not a saved session"),
        (model.session(32), "absent", "No such file"),
    ):
        target.forward(TOKENS[:3])
        with pytest.raises(GGUFError, match=text):
            target.load(tmp_path / file)
        assert target.tokens == TOKENS[:3]
        target.forward([1])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("session.model", None),
        ("session.tokens", None),
        ("session.tokens", "text"),
        ("session.tokens", np.array([TINY.n_vocab], np.int32)),
        ("session.tokens", np.array([-1], np.int32)),
        ("session.tokens", np.array([0.5], np.float32)),
        ("session.most", None),
        ("session.most", ["a", "b"]),
    ],
)
def test_damaged_fields_are_errors(model: Model, tmp_path: Path, key: str, value: Any) -> None:
    session = model.session(32)
    session.forward(TOKENS)
    session.save(tmp_path / "saved")
    with gguf.open(tmp_path / "saved") as file:
        fields: dict[str, Any] = dict(file.fields)
        tensors = [
            gguf.Tensor(name, info.dtype, info.ne, partial(lambda array: [array], file.array(name)))
            for name, info in file.tensors.items()
        ]
        fields[key] = value
        if value is None:
            del fields[key]
        gguf.write(tmp_path / "damaged", fields, tensors)
    with pytest.raises(
        GGUFError, match=f"damaged: ({key!r} must be|saved by a session of another)"
    ):
        session.load(tmp_path / "damaged")
    assert session.tokens == TOKENS


def test_a_full_disk_leaves_no_file(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = model.session(32)
    session.forward(TOKENS)
    usage = type("Usage", (), {"free": 100})()
    monkeypatch.setattr("shutil.disk_usage", lambda *_: usage)
    with pytest.raises(OSError, match="bytes needed, 100 free"):
        session.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
    assert session.forward([1]).shape == (1, TINY.n_vocab)


# -- sliding windows --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def windowed_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "window.gguf"
    synth(path, TINY_GPT_OSS, dtype="f32")
    return path


@pytest.fixture(scope="module")
def windowed(windowed_path: Path) -> Model:
    return load(windowed_path, backends=["numpy"], cache_k="f32", cache_v="f32")


LONG = [(37 * i) % 512 for i in range(150)]


@pytest.mark.parametrize("n_batch", [1, 7, 60])
def test_a_window_needs_few_rows(windowed: Model, n_batch: int) -> None:
    whole = windowed.session(150, 150)
    expected = whole.forward(LONG, "all")
    session = windowed.session(150, n_batch)
    assert close(session.forward(LONG, "all"), expected)
    assert [cache.n_rows for cache in whole.caches] == [150, 150, 150]
    rows = 128 if n_batch == 60 else 64
    assert [cache.n_rows for cache in session.caches] == [rows, 150, rows]


def test_truncation_runs_tokens_again_if_their_rows_are_lost(windowed: Model) -> None:
    expected = windowed.session(150, 150).forward(LONG, "all")
    session = windowed.session(200, 20)  # rings of 64 rows and a window of 8
    session.forward(LONG)
    for n in (120, 94, 93, 140, 30, 0, 100, 5):
        if n > len(session.tokens):
            session.forward(LONG[len(session.tokens) :])
        session.truncate(n)
        assert session.tokens == LONG[:n]
        assert close(session.forward(LONG[n : n + 10], "all"), expected[n : n + 10])


def test_copies_of_windows(windowed: Model, tmp_path: Path) -> None:
    for n in (3, 40, 64, 100):
        session = windowed.session(200, 20)
        session.forward(LONG[:n])
        session.save(tmp_path / "saved")
        other, fork = windowed.session(200, 20), session.fork()
        other.forward(LONG[::-1])
        other.load(tmp_path / "saved")
        tokens = list(session.generate([4], 5))
        assert list(other.generate([4], 5)) == tokens == list(fork.generate([4], 5, ahead=4))


def test_copies_know_which_rows_of_windows_are_lost(windowed: Model, tmp_path: Path) -> None:
    expected = windowed.session(150, 150).forward(LONG, "all")
    session = windowed.session(200, 20)  # rings of 64 rows
    session.forward(LONG[:100])
    session.truncate(60)  # rows 0 to 35 are of tokens 64 to 99
    session.save(tmp_path / "saved")
    loaded = windowed.session(200, 20)
    loaded.load(tmp_path / "saved")
    for copy in (session.fork(), loaded):
        copy.truncate(40)
        assert close(copy.forward(LONG[40:50], "all"), expected[40:50])


def test_prec_reaches_every_op(path: Path) -> None:
    precisions = {}
    for prec in ("default", "f32"):
        session = load(path, backends=["numpy"], prec=prec).session(16)
        nodes = [n for n in session.plan(4, 16, 1).graph.nodes if "prec" in n.attrs]
        precisions[prec] = {n.attrs["prec"] for n in nodes}
        assert len(nodes) > 20 and len(list(session.generate([1, 2], 4))) == 4
    assert precisions == {"default": {"default", "f32"}, "f32": {"f32"}}  # routers are f32
    with pytest.raises(ShapeError, match="prec='f16' must be 'default' or 'f32'"):
        load(path, backends=["numpy"], prec="f16")


@pytest.mark.parametrize("top_p", [1.0, 0.7])
@pytest.mark.parametrize("ahead", [1, 2, 5, 30])
def test_the_device_draws_the_tokens_that_the_host_draws(
    model: Model, ahead: int, top_p: float
) -> None:
    def sampler() -> Sampler:
        return Sampler(temperature=1.5, top_k=20, top_p=top_p, seed=7)

    host, device = sampler(), sampler()
    one, session = model.session(64), model.session(64)
    expected = [host(one.forward(TOKENS)[-1])]
    while len(expected) < 25:
        expected.append(host(one.forward(expected[-1:])[-1]))
    assert list(session.generate(TOKENS, 25, device, ahead=ahead)) == expected
    assert session.tokens == one.tokens and device.count == host.count == 25
    stop = expected[9:10]
    n = expected.index(stop[0]) + 1
    session.truncate(0)
    assert list(session.generate(TOKENS, 25, sampler(), stop, ahead=ahead)) == expected[:n]
    assert len(set(expected)) > 8
    other = Sampler(temperature=1.5, top_k=20, top_p=top_p, seed=8)
    session.truncate(0)
    assert list(session.generate(TOKENS, 25, other, ahead=ahead)) != expected


def test_no_plan_binds_again_on_a_device(path: Path) -> None:
    """A longer prompt needs a larger arena, which a device reserves before the first run."""
    session = load(path, backends=["null"], mla=0, flash=False).session(64, 32)
    session.forward([1, 2])
    short = session.plan(2, 64, 1)
    execution = short._execution
    session.forward(range(30))
    assert execution is not None and short._execution is execution
    arenas = session.store.arenas.values()
    assert sum(arena.nbytes for arena in arenas) == session.memory().compute

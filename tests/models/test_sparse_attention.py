"""Sparse attention of DeepSeek V3.2 and GLM-5: graphs, sessions, and logits in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import gguf
from pyggml.errors import ShapeError
from pyggml.generate.plans import floored_rows, padded_rows
from pyggml.generate.sample import Sampler, greedy
from pyggml.models.batch import Batch, Options
from pyggml.models.presets import GLM_5, GLM_52, PRESETS, V32
from pyggml.models.synth import synth
from pyggml.node import label_of
from pyggml.parity.tolerance import nmse, relative_error
from tests.reference.sparse import Sparse, sparse_f64

#: More than the 32 rows that a token attends to.
TOKENS = [(31 * i * i + 7 * i) % 500 for i in range(90)]
F32: dict[str, Any] = dict.fromkeys(("cache_k", "cache_v", "cache_i"), "f32")
NAMES = ["tiny-deepseek32", "tiny-glm-dsa"]


@pytest.fixture(scope="module", params=NAMES)
def path(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / f"{request.param}.gguf"
    synth(path, PRESETS[request.param], dtype="f32", seed=SEEDS[request.param])
    return path


#: Of 40, those with the widest gaps between scores of rows that are chosen and others.
SEEDS = {"tiny-deepseek32": 19, "tiny-glm-dsa": 3}


@pytest.fixture(scope="module")
def exact(path: Path) -> Sparse:
    with gguf.open(path) as file:
        return sparse_f64(file, TOKENS)


@pytest.fixture
def model(path: Path) -> Iterator[gg.models.model.Model]:
    with gg.load(path, backends=["numpy"], **F32) as model:
        yield model


def test_the_case_is_sparse_and_its_choices_are_clear(exact: Sparse) -> None:
    assert exact.chosen.sum(axis=2).max() == 32
    assert exact.gap.min() > 1e-4 and exact.expert_gap.min() > 1e-4


@pytest.mark.parametrize("n_batch", [90, 37, 1])
@pytest.mark.parametrize(
    "options",
    [{}, {"flash": False}, {"mla": 1}, {"expand_from": 2}, {"fused": False},
     {"flash": False, "amb": 1.5}],
    ids=str,
)  # fmt: skip
def test_logits_are_those_in_float64(
    path: Path, exact: Sparse, options: dict[str, Any], n_batch: int
) -> None:
    with gg.load(path, backends=["numpy"], **F32, **options) as model:
        logits = model.session(96, n_batch).forward(TOKENS, "all")
    assert max(relative_error(*rows) for rows in zip(logits, exact.logits)) < 1e-4
    assert np.array_equal(logits.argmax(1), exact.logits.argmax(1))


@pytest.mark.parametrize("n_ctx", [31, 32])
def test_a_context_of_top_k_rows_is_dense(path: Path, exact: Sparse, n_ctx: int) -> None:
    """All rows are chosen: scores are not computed, but the keys are cached all the same."""
    with gg.load(path, backends=["numpy"], **F32) as model:
        session = model.session(n_ctx, n_ctx)
        logits = session.forward(TOKENS[:n_ctx], "all")
        assert max(relative_error(*r) for r in zip(logits, exact.logits[:n_ctx])) < 1e-4
        labels = {label_of(s.node) for s in session.plan(n_ctx, n_ctx, 1).steps}
        assert not any("indexer_score" in label for label in labels)
        keys = session.store.read("cache_index_l0")
        sparse = model.session(96)
        sparse.forward(TOKENS[:n_ctx])
        np.testing.assert_allclose(keys, sparse.store.read("cache_index_l0")[:n_ctx], atol=1e-5)


def test_caches() -> None:
    """Rows of 576 f16 for each layer, and of 128 for each layer with an indexer."""
    options = Options(cache_k="q8_0", cache_i="f32")
    for arch, n_full in ((V32, 61), (GLM_5, 78), (GLM_52, 21)):
        caches = [arch.cache(il, 4096, 512, options) for il in range(arch.n_layer)]
        index = [cache.states[1] for cache in caches if len(cache.states) == 2]
        assert len(index) == n_full
        assert {(s.dtype.name, s.ne[:2]) for s in index} == {("f32", (128, 4096))}
        latent = {(cache.states[0].dtype.name, cache.states[0].ne[:2]) for cache in caches}
        assert latent == {("q8_0", (576, 4096))}
    per_token = [
        sum(s.spec.nbytes for il in range(a.n_layer) for s in a.cache(il, 64, 1, Options()).states)
        // 64
        for a in (V32, GLM_5, GLM_52)
    ]
    assert per_token == [70_272 + 15_616, 89_856 + 19_968, 89_856 + 5_376]


def test_mla_0_is_an_error(path: Path) -> None:
    with (
        gg.load(path, backends=["numpy"], mla=0) as model,
        pytest.raises(ShapeError, match=r"mla=0: .* has sparse attention.* use mla=1 or mla=3"),
    ):
        model.session(64)


def test_shared_layers_use_the_rows_of_the_layer_before(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    synth(path, PRESETS["tiny-glm-dsa"], dtype="f32")
    with gg.load(path, backends=["numpy"]) as model:
        batch = Batch(4, 64, model.options)
        graph = model.graph(batch, model.caches(64, 4))
        steps = model.compile(graph, gg.Store()).steps
        labels = [label_of(step.node) for step in steps]
    assert [f"top_k-{il}" in labels for il in range(4)] == [True, True, True, False]


# -- sessions -----------------------------------------------------------------------------------


def close(a: Any, b: Any) -> bool:
    return bool(np.abs(a - b).max() <= 1e-4 * np.abs(b).max())


def test_truncation_copies_and_files(model: Any, exact: Sparse, tmp_path: Path) -> None:
    session = model.session(96, 16)
    session.forward(TOKENS)
    session.truncate(50)
    assert close(session.forward(TOKENS[50:70], "all"), exact.logits[50:70])
    session.save(tmp_path / "saved")
    fork, other = session.fork(), model.session(128, 16)
    other.load(tmp_path / "saved")
    for each in (session, fork, other):
        assert close(each.forward(TOKENS[70:], "all"), exact.logits[70:])
    half = model.session(96, cache_i="f16")
    with pytest.raises(gg.GGUFError, match=r"cache_index_l0' is f32 \[64, 70, 1\], but .* f16"):
        half.load(tmp_path / "saved")


@pytest.mark.parametrize("ahead", [1, 4, 40])
@pytest.mark.parametrize("sampler", [greedy, Sampler(temperature=0.7, top_k=9, seed=3)])
def test_the_device_chooses_the_tokens(model: Any, sampler: Any, ahead: int) -> None:
    """From below top_k rows to above, in steps of the fixed shape of a loop."""
    prompt = TOKENS[:20]
    one = model.session(96)
    logits, expected = one.forward(prompt)[-1], []
    draw = sampler if sampler is greedy else Sampler(temperature=0.7, top_k=9, seed=3)
    for _ in range(40):
        expected.append(draw(logits))
        logits = one.forward(expected[-1:])[-1]
    own = sampler if sampler is greedy else Sampler(temperature=0.7, top_k=9, seed=3)
    assert list(model.session(96).generate(prompt, 40, own, ahead=ahead)) == expected


# -- memory -------------------------------------------------------------------------------------


def test_a_budget_cuts_the_copies_of_chosen_rows(path: Path, exact: Sparse) -> None:
    """Without flash attention, each token has copies of its rows: a loop over tokens."""
    with gg.load(path, backends=["null:0"], flash=False, **F32) as model:
        plain = model.session(96, 90).memory().score_peak
        model.amb = plain / 2**20 / 2
        session = model.session(96, 90)
        assert session.memory().score_peak <= plain / 2
        logits = session.forward(TOKENS, "all")
    assert max(relative_error(*rows) for rows in zip(logits, exact.logits)) < 1e-4


def test_rows_below_a_limit() -> None:
    """The largest number of rows up to a limit that a plan can have."""
    buckets = sorted({padded_rows(n, 1 << 30) for n in range(1, 9000)})
    for n in (*range(0, 3000, 97), 2048, 2049, 4096, 5000, 8191, 8192):
        assert floored_rows(n) == max((b for b in buckets if b <= n), default=0), n


@pytest.mark.parametrize(
    ("cache", "index", "least", "most"),
    [("f16", "f16", 1e-3, 1e-5), ("f16", "q8_0", 4e-3, 1e-5), ("q8_0", "f16", 4e-3, 2e-3)],
)
@pytest.mark.parametrize(("name", "seed"), [("tiny-deepseek32", 11), ("tiny-glm-dsa", 14)])
def test_rounded_weights_and_caches(
    tmp_path: Path, name: str, seed: int, cache: str, index: str, least: float, most: float
) -> None:
    """Rounding may swap rows, or experts, whose scores are close. This changes the token's logits
    a lot, and those of later tokens a little; so tokens count up to the first close choice.

    least  relative gap of a choice of rows that is not close; 1e-3 for one of experts
    most   NMSE of the tokens that count, and of the median of all
    """
    path = tmp_path / "m.gguf"
    synth(path, PRESETS[name], dtype="q8_0", seed=seed)
    with gguf.open(path) as file:
        exact = sparse_f64(file, TOKENS)
    with gg.load(path, backends=["numpy"], cache_k=cache, cache_i=index) as model:
        logits = model.session(96).forward(TOKENS, "all")
    errors = np.array([nmse(*rows) for rows in zip(logits, exact.logits)])
    close = (exact.gap < least) | (exact.expert_gap < 1e-3)
    n = int(np.argmax(close))
    print(f"{n} tokens count; {close.sum()} of the {len(close) - n} left out have a close choice")
    assert n >= 32, "the tokens that see no more than top_k rows have no close choice of experts"
    assert errors[:n].max() < most and np.median(errors) < most


def test_layers_on_two_devices(path: Path, exact: Sparse) -> None:
    """Layers that share rows may be on another device than the layer that chose them."""
    pins = {r"(blk\.[23]\.|cache_\w+_l[23]$)": "null:1"}
    with gg.load(path, backends=["null:0", "null:1"], pins=pins, **F32) as model:
        logits = model.session(96, 40).forward(TOKENS, "all")
    assert max(relative_error(*rows) for rows in zip(logits, exact.logits)) < 1e-4

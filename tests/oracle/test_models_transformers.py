"""Logits of whole models against transformers, on tiny files with random weights."""

from __future__ import annotations

from typing import Any

import gguf as reference
import numpy as np
import pytest
from numpy.typing import NDArray

pytestmark = pytest.mark.oracle
pytest.importorskip("transformers", reason="needs torch and transformers (the extra 'oracle')")

from pyggml import gguf  # noqa: E402
from pyggml.generate.session import Session  # noqa: E402
from pyggml.models.model import load  # noqa: E402
from pyggml.parity.tolerance import relative_error  # noqa: E402
from tests.models.oracles import Oracle, write  # noqa: E402
from tests.models.tiny import MODELS  # noqa: E402

#: The largest error, of f32 arithmetic in another order, is 2e-6.
TOLERANCE = 1e-5

#: name -> options of the model
OPTIONS: dict[str, dict[str, Any]] = {
    "flash": {},
    "scores": {"flash": False},
    "unfused": {"fused": False},
    "amb": {"flash": False, "amb": 0.04},  # cuts the scores of a whole prompt
}
#: Where rows are chosen: budgets that leave room for the scratch of top_k, and still cut scores.
AMB = {"deepseek32": 0.53, "glm-dsa": 0.53, "deepseek4": 1.0}


@pytest.fixture(scope="module", params=MODELS)
def oracle(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """A file, and the logits of transformers for some tokens."""
    return write(request.param, tmp_path_factory.mktemp("model"))


def session(oracle: Oracle, n_batch: int | None, options: dict[str, Any]) -> Session:
    """A session for the oracle's tokens and some more; n_batch None: all at once."""
    n_ctx = len(oracle.tokens) + 3
    types = dict.fromkeys(("cache_k", "cache_v", "cache_i"), "f32")
    model = load(oracle.path, backends=["numpy"], **types, **options)
    return model.session(n_ctx=n_ctx, n_batch=n_batch or n_ctx)


def options_of(oracle: Oracle, name: str) -> dict[str, Any]:
    model = oracle.path.stem
    amb = next((amb for prefix, amb in AMB.items() if model.startswith(prefix)), None)
    return OPTIONS[name] | ({"amb": amb} if name == "amb" and amb else {})


def check(logits: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    error = np.max([relative_error(*rows) for rows in zip(logits, expected, strict=True)])
    assert error < TOLERANCE
    assert np.array_equal(logits.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("n_batch", [None, 7])
@pytest.mark.parametrize("options", OPTIONS)
def test_prompt(oracle: Oracle, options: str, n_batch: int | None) -> None:
    """The whole prompt, and the prompt in chunks."""
    s = session(oracle, n_batch, options_of(oracle, options))
    check(s.forward(oracle.tokens, outputs="all"), oracle.logits)


@pytest.mark.parametrize("n_batch", [None, 7])
@pytest.mark.parametrize(
    "oracle", [name for name in MODELS if name.startswith("deepseek4")], indirect=True
)
def test_a_budget_for_lists_of_rows(oracle: Oracle, n_batch: int | None) -> None:
    """With flash attention, it cuts the rows that tokens of deepseek4 attend to."""
    s = session(oracle, n_batch, {"amb": 2})
    check(s.forward(oracle.tokens, outputs="all"), oracle.logits)


@pytest.mark.parametrize("options", ["flash", "scores", "unfused"])
def test_one_token_at_a_time(oracle: Oracle, options: str) -> None:
    s = session(oracle, 1, options_of(oracle, options))
    logits = [s.forward([token])[0] for token in oracle.tokens]
    check(np.stack(logits), oracle.logits)


def test_last_token_after_a_prompt(oracle: Oracle) -> None:
    s = session(oracle, 16, {})
    n = len(oracle.tokens) - 5
    check(s.forward(oracle.tokens[:n]), oracle.logits[n - 1 : n])
    check(s.forward(oracle.tokens[n:]), oracle.logits[-1:])


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("mla", [0, 1, 3])
@pytest.mark.parametrize(
    "oracle", [name for name in MODELS if name.startswith("deepseek2")], indirect=True
)
def test_forms_of_latent_attention(oracle: Oracle, mla: int, flash: bool) -> None:
    for n_batch in (None, 7):
        s = session(oracle, n_batch, {"mla": mla, "flash": flash, "expand_from": 2})
        check(s.forward(oracle.tokens, outputs="all"), oracle.logits)


def test_gguf_opens_the_file(oracle: Oracle) -> None:
    reader = reference.GGUFReader(oracle.path)
    with gguf.open(oracle.path) as file:
        sizes = {name: list(info.ne) for name, info in file.tensors.items()}
    assert {t.name: t.shape.tolist() for t in reader.tensors} == sizes

"""Whole models on a GPU against the logits of transformers, on converted files.

A machine with transformers writes the files: `python -m tests.models.oracles build/oracles`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pyggml.generate.session import Session
from pyggml.models.model import load
from pyggml.parity.tolerance import nmse, relative_error
from tests.models.oracles import FOLDER, Oracle, read

ORACLES = {oracle.path.stem: oracle for oracle in read()}
EXACT: dict[str, Any] = {"prec": "f32", "cache_k": "f32", "cache_v": "f32", "cache_i": "f32"}
LATENT = [name for name in ORACLES if name.startswith("deepseek2")]

pytestmark = pytest.mark.skipif(
    not ORACLES, reason=f"no files in {FOLDER}: python -m tests.models.oracles writes them"
)
every = pytest.mark.parametrize("name", ORACLES)


def session(oracle: Oracle, n_batch: int, **options: Any) -> Session:
    n_ctx = len(oracle.tokens) + 3
    return load(oracle.path, backends=["cuda"], **options).session(n_ctx, n_batch)


def check(logits: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert max(relative_error(*rows) for rows in zip(logits, expected, strict=True)) < 1e-4
    assert np.array_equal(logits.argmax(1), expected.argmax(1))


@every
@pytest.mark.parametrize("form", [{}, {"flash": False}, {"fused": False}], ids=str)
def test_prompts_are_exact(name: str, form: dict[str, Any]) -> None:
    """The whole prompt, and the prompt in parts."""
    oracle = ORACLES[name]
    for n_batch in (48, 7):
        s = session(oracle, n_batch, **EXACT, **form)
        check(s.forward(oracle.tokens, "all"), oracle.logits)


@every
@pytest.mark.parametrize("flash", [True, False])
def test_tokens_are_exact(name: str, flash: bool) -> None:
    """One token at a time after a prompt."""
    oracle = ORACLES[name]
    s = session(oracle, 16, **EXACT, flash=flash)
    s.forward(oracle.tokens[:20])
    logits = [s.forward([token])[0] for token in oracle.tokens[20:]]
    check(np.stack(logits), oracle.logits[20:])


@pytest.mark.parametrize("name", LATENT)
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("mla", [0, 1, 3])
def test_forms_of_latent_attention_are_exact(name: str, flash: bool, mla: int) -> None:
    oracle = ORACLES[name]
    for n_batch in (48, 7):
        s = session(oracle, n_batch, **EXACT, mla=mla, flash=flash, expand_from=2)
        check(s.forward(oracle.tokens, "all"), oracle.logits)


@every
def test_the_default_options(name: str) -> None:
    """f16 caches and products; a rounded sum may choose another expert for a few tokens."""
    oracle = ORACLES[name]
    logits = session(oracle, 48).forward(oracle.tokens, "all")
    assert np.median([nmse(*rows) for rows in zip(logits, oracle.logits, strict=True)]) < 1e-4

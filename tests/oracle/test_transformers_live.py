"""The float64 attention layer against transformers itself, with other weights and lengths."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.oracle
pytest.importorskip("transformers", reason="needs torch and transformers (the extra 'oracle')")

from pyggml.parity.tolerance import relative_error  # noqa: E402
from tests.fixtures.real_transformers import MODELS, PROMPT, run  # noqa: E402
from tests.reference.deepseek import attention_f64  # noqa: E402


@pytest.mark.parametrize("n_tokens", [PROMPT, PROMPT + 6])
@pytest.mark.parametrize("name", MODELS)
def test_attention(name: str, n_tokens: int) -> None:
    theirs = run(name, 1000 + n_tokens, n_tokens)
    out = attention_f64(theirs["weights"], theirs["x"], theirs["positions"], **theirs["sizes"])
    assert relative_error(out, theirs["out"]) < 1e-13

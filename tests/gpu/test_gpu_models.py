"""Whole models of every architecture on a GPU, compared with NumPy: logits and tokens.

The oracle tests compare NumPy with transformers and llama.cpp.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyggml.models.model import Model, load
from pyggml.models.presets import PRESETS
from pyggml.models.synth import synth
from pyggml.parity.tolerance import nmse

PLACE = "cuda"
TOKENS = [(31 * i * i + 7 * i) % 512 for i in range(45)]
EXACT: dict[str, Any] = {"prec": "f32", "cache_k": "f32", "cache_v": "f32"}

NAMES = [name for name in PRESETS if name.startswith("tiny")]
#: Only deepseek2, which is `tiny`, has several forms of attention.
FORMS: list[tuple[str, dict[str, Any]]] = [
    *((name, form) for name in NAMES for form in ({}, {"fused": False})),
    # deepseek4 has no such form
    *((name, {"flash": False}) for name in NAMES if name != "tiny-deepseek4"),
    ("tiny", {"mla": 1}),
    ("tiny", {"mla": 0}),
]
tiny = pytest.mark.parametrize("name", NAMES)


@contextmanager
def on_both(name: str, type: str, **options: Any) -> Iterator[tuple[Model, Model]]:
    """A model on the GPU, and on NumPy, from one file with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        synth(path := Path(folder) / "m.gguf", PRESETS[name], dtype=type)
        with (
            load(path, backends=[PLACE, "numpy"], **options) as gpu,
            load(path, backends=["numpy"], **options) as host,
        ):
            yield gpu, host


@pytest.mark.parametrize("type", ["f32", "q8_0", "iq4_nl"])
@pytest.mark.parametrize("name, form", FORMS, ids=str)
def test_logits_are_exact(name: str, type: str, form: dict[str, Any]) -> None:
    """The whole prompt, the prompt in parts, and one token at a time."""
    with on_both(name, type, **EXACT, **form) as (gpu, host):
        expected = host.session(64).forward(TOKENS, "all")
        for n_batch in (64, 7):
            assert nmse(gpu.session(64, n_batch).forward(TOKENS, "all"), expected) < 1e-9
        session = gpu.session(64)
        session.forward(TOKENS[:30])
        rows = [session.forward([token])[0] for token in TOKENS[30:]]
        assert nmse(np.stack(rows), expected[30:]) < 1e-9


@tiny
def test_logits_with_the_default_options(name: str) -> None:
    """f16 caches and products; a rounded sum may choose another expert for a few tokens."""
    with on_both(name, "q8_0") as (gpu, host):
        pairs = [model.session(64).forward(TOKENS, "all") for model in (gpu, host)]
        assert np.median([nmse(*rows) for rows in zip(*pairs, strict=True)]) < 1e-4


@tiny
@pytest.mark.parametrize("ahead", [1, 4])
def test_tokens(name: str, ahead: int) -> None:
    """Tokens that the device chooses are the best of NumPy's logits, where these are clear."""
    with on_both(name, "q8_0", **EXACT) as (gpu, host):
        tokens = list(gpu.session(64).generate(TOKENS[:20], 12, ahead=ahead))
        logits = host.session(64).forward(TOKENS[:20] + tokens[:-1], "all")[19:]
        best = np.sort(logits, axis=1)
        clear = best[:, -1] - best[:, -2] > 1e-3
        assert clear.sum() > 6
        assert np.array_equal(logits.argmax(1)[clear], np.array(tokens)[clear])

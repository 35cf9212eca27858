"""Experts on the host: a GPU borrows them for a prompt, from registered pages or by the ring."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from pyggml import backends
from pyggml.backends.cuda.device.registered import Registry
from pyggml.backends.step import LoadStep
from pyggml.models.model import load
from pyggml.models.presets import TINY
from pyggml.models.synth import synth
from pyggml.parity.tolerance import nmse

#: Enough for 32 rows an expert.
TOKENS = [(31 * i * i + 7 * i) % 512 for i in range(300)]
EXACT: dict[str, Any] = {"prec": "f32", "cache_k": "f32", "cache_v": "f32"}


@pytest.mark.parametrize("limit", [None, 0], ids=["registered", "ring"])
@pytest.mark.parametrize("type", ["f32", "f16", "q8_0", "iq4_nl", "q4_0"])
def test_prompts_with_experts_on_the_host(type: str, limit: int | None) -> None:
    """The same logits as with all weights on the GPU, also from the recorded graph."""
    gpu: Any = backends.get("cuda")
    with tempfile.TemporaryDirectory() as folder:
        synth(path := Path(folder) / "m.gguf", TINY, type=type)
        registry = mock.patch.object(Registry, "_limit", limit)
        places = ["cuda", "numpy"]
        with (
            load(path, backends=["cuda"], **EXACT) as whole,
            load(path, backends=places, pins={"exps": "numpy"}, **EXACT) as model,
        ):
            expected = whole.session(512).forward(TOKENS, "all")
            session = model.session(512)
            if limit is not None:
                registry.start()
            try:
                for _ in range(3):
                    session.truncate(0)
                    assert nmse(session.forward(TOKENS, "all"), expected) < 1e-9
            finally:
                if limit is not None:
                    registry.stop()
            plan = session.plan(384, 512, 384)
            assert any(isinstance(step, LoadStep) for step in plan.steps)
            assert bool(gpu.registry._pages) == (limit is None)


def test_pages_are_released() -> None:
    gpu: Any = backends.get("cuda")
    assert not gpu.registry._pages
    assert np.isfinite(gpu.registry._limit) and gpu.registry._limit > 0

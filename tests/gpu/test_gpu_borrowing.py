"""Experts on the host: a GPU borrows them for a prompt, from registered pages or by the ring. The
cpu backend has them in tiles, which the GPU packs."""

from __future__ import annotations

import gc
import tempfile
from contextlib import nullcontext
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


@pytest.mark.parametrize("registers", [True, False], ids=["registered", "ring"])
@pytest.mark.parametrize("type", ["f32", "f16", "q8_0", "iq4_nl", "q4_0", "q4_K", "mxfp4"])
@pytest.mark.parametrize("host", ["numpy", "cpu"])
def test_prompts_with_experts_on_the_host(host: str, type: str, registers: bool) -> None:
    """The same logits as with all weights on the GPU, also from the recorded graph."""
    if host == "cpu" and backends.on_host() != "cpu":
        pytest.skip("needs the extra 'cpu' and AVX2")
    gpu: Any = backends.get("cuda")
    refuses = (
        nullcontext() if registers else mock.patch.object(Registry, "cover", return_value=None)
    )
    with tempfile.TemporaryDirectory() as folder, refuses:
        synth(path := Path(folder) / "m.gguf", TINY, dtype=type)
        with (
            load(path, backends=["cuda"], **EXACT) as whole,
            load(path, backends=["cuda", host], pins={"exps": host}, **EXACT) as model,
            load(
                path, backends=["cuda", host], pins={"exps": host}, read_ahead=False, **EXACT
            ) as plain,
        ):
            expected = whole.session(512).forward(TOKENS, "all")
            session = model.session(512)
            for _ in range(3):
                session.truncate(0)
                assert nmse(session.forward(TOKENS, "all"), expected) < 1e-9
            other = plain.session(512).forward(TOKENS, "all")
            session.truncate(0)
            np.testing.assert_array_equal(session.forward(TOKENS, "all"), other)
            plan = session.plan(384, 512, 384)
            assert any(isinstance(step, LoadStep) and step.ahead for step in plan.steps)
            assert bool(gpu.registry._pages) == registers
    del whole, model, plain, session, plan
    gc.collect()
    assert not gpu.registry._pages

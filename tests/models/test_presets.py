"""Presets have the published numbers of parameters, and their files are models."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from pyggml import gguf
from pyggml.models.known import tensor_sizes
from pyggml.models.model import Model, load
from pyggml.models.presets import PRESETS, TINY_GPT_OSS
from pyggml.models.synth import synth

#: Billions, as their authors give them; DeepSeek's and GLM's without the blocks for MTP.
PUBLISHED = {
    "deepseek-v2-lite": 15.7, "deepseek-v3": 671, "glm-4.5-air": 106.9, "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8, "llama-3.1-8b": 8.03, "qwen3-30b-a3b": 30.5,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name: str) -> None:
    total = sum(map(math.prod, tensor_sizes(PRESETS[name]).values()))
    assert total / 1e9 == pytest.approx(PUBLISHED[name], rel=0.002)


@pytest.mark.parametrize("name", PRESETS)
def test_a_header_is_a_model(tmp_path: Path, name: str) -> None:
    synth(tmp_path / "m.gguf", PRESETS[name], header_only=True)
    with gguf.open(tmp_path / "m.gguf", allow_missing_data=True) as file:
        assert Model(file).arch.n_layer == PRESETS[name].n_layer


def test_mxfp4_is_for_experts(tmp_path: Path) -> None:
    synth(tmp_path / "m.gguf", TINY_GPT_OSS, type="mxfp4")
    model = load(tmp_path / "m.gguf", backends=["numpy"])
    types = {name: info.dtype.name for name, info in model.file.tensors.items()}
    assert types["blk.0.ffn_gate_exps.weight"] == "mxfp4"
    assert types["blk.0.attn_q.weight"] == types["output.weight"] == "q8_0"
    assert types["blk.0.ffn_gate_exps.bias"] == "f32"
    assert np.isfinite(model.session(16).forward([1, 2, 3])).all()

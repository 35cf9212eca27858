"""Presets have the published numbers of parameters, and their files are models."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from pyggml import gguf
from pyggml.models.base import architecture, architectures
from pyggml.models.known import tensor_sizes
from pyggml.models.model import Model, load
from pyggml.models.presets import PRESETS, TINY_GPT_OSS
from pyggml.models.synth import synth
from tests.models.published import PARAMETERS


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    arch, extra = PRESETS[name], 0
    if name == "glm-4.5-air":  # the MTP block: a layer, embedding, head, a matrix and three norms
        last = math.prod((2, arch.n_embd, arch.n_vocab)) + 2 * arch.n_embd**2 + 3 * arch.n_embd
        extra = count(arch.layer_tensors(arch.n_layer - 1)) + last
    if name == "llama-3.1-8b":
        extra = -64  # rope_freqs is no parameter
    assert count(tensor_sizes(arch)) + extra == PARAMETERS[name]


def count(sizes: dict[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, sizes.values()))


@pytest.mark.parametrize("name", PRESETS)
def test_a_header_is_a_model(tmp_path: Path, name: str) -> None:
    synth(tmp_path / "m.gguf", PRESETS[name], header_only=True)
    with gguf.open(tmp_path / "m.gguf", allow_missing_data=True) as file:
        assert Model(file).arch.n_layer == PRESETS[name].n_layer


def test_every_architecture_has_a_tiny_preset() -> None:
    tiny = {arch.name for name, arch in PRESETS.items() if name.startswith("tiny")}
    own = {name for name in architectures() if architecture(name).__module__.startswith("pyggml.")}
    assert tiny == own  # other tests may have added architectures


def test_mxfp4_is_for_experts(tmp_path: Path) -> None:
    synth(tmp_path / "m.gguf", TINY_GPT_OSS, dtype="mxfp4")
    model = load(tmp_path / "m.gguf", backends=["numpy"])
    types = {name: info.dtype.name for name, info in model.file.tensors.items()}
    assert types["blk.0.ffn_gate_exps.weight"] == "mxfp4"
    assert types["blk.0.attn_q.weight"] == types["output.weight"] == "q8_0"
    assert types["blk.0.ffn_gate_exps.bias"] == "f32"
    assert np.isfinite(model.session(16).forward([1, 2, 3])).all()

"""Logits of whole models against llama.cpp, which opens the files that the converter writes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytestmark = pytest.mark.oracle
pytest.importorskip("transformers", reason="needs torch and transformers (the extra 'oracle')")
pytest.importorskip("llama_cpp", reason="needs llama-cpp-python (the extra 'oracle')")

import torch  # noqa: E402
from llama_cpp import Llama  # noqa: E402

from pyggml.models.model import load  # noqa: E402
from pyggml.parity.tolerance import nmse  # noqa: E402
from tests.models.convert import convert, random_model  # noqa: E402
from tests.models.tiny import MODELS, TOKENS, glm4moe, glm_dsa  # noqa: E402

GGML_TYPE_F32, GGML_TYPE_F16 = 0, 1
#: Models that llama.cpp cannot run, or for which it does not follow the model.
NOT_IN_LLAMA_CPP = (
    "llama yarn betas",  # ignores the keys of the betas
    "qwen3 biases",  # rejects blk.N.attn_output.bias
    "deepseek2 lite",  # takes a model for V2-Lite only if it has 26 or 27 layers (see below)
    "gpt-oss nvfp4",  # ignores the factors of experts
    "deepseek32 magnitude",  # has 0.1 for the multiplier in the scale of q.k
    "deepseek32 q8_0",  # rounds activations to 8 bits, so it chooses other rows
    "deepseek4 q8_0",  # the same
    "deepseek2 v2",  # scores groups of experts by their two best, as V3 does, not by the best
)


def llama_cpp_logits(
    path: Path, tokens: list[int], type_: int = GGML_TYPE_F32
) -> NDArray[np.float32]:
    """Logits of all tokens, on one thread with a cache of this type."""
    n = 64 if len(tokens) <= 64 else 512
    model = Llama(
        str(path), logits_all=True, verbose=False, n_ctx=n, n_batch=n, n_threads=1,
        type_k=type_, type_v=type_,
    )  # fmt: skip
    try:
        model.eval(tokens)
        return np.array(model.scores[: len(tokens)])
    finally:
        model.close()


def write_and_compare(
    path: Path, config: Any, dtype: str, seed: int = 0, tokens: list[int] = TOKENS, **changes: Any
) -> None:
    torch.set_num_threads(1)
    convert(random_model(config, seed), path, dtype, **changes)
    theirs = llama_cpp_logits(path, tokens)
    model = load(path, backends=["numpy"], cache_k="f32", cache_v="f32", cache_i="f32")
    ours = model.session(n_ctx=len(tokens)).forward(tokens, outputs="all")
    # With block weights, llama.cpp also rounds the activations, to 8 bits.
    error, margin = (1e-10, 1e-4) if dtype == "f32" else (1e-3, 0.3)
    assert nmse(ours, theirs) < error
    best = np.sort(ours, axis=1)
    sure = best[:, -1] - best[:, -2] > margin
    assert sure.mean() > 0.3
    assert np.array_equal(ours.argmax(1)[sure], theirs.argmax(1)[sure])


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NOT_IN_LLAMA_CPP])
def test_logits(name: str, tmp_path: Path) -> None:
    """Experts are never merged here: llama.cpp reads no merged ones for these architectures."""
    tiny = MODELS[name]
    write_and_compare(tmp_path / "model.gguf", tiny.config, tiny.dtype, tiny.seed, tiny.tokens)


def test_glm_5_with_its_own_epsilon(tmp_path: Path) -> None:
    """llama.cpp gives the norms of q_a and kv_a the file's epsilon, as we do; transformers 1e-6."""
    config = glm_dsa(rms_norm_eps=1e-5)
    write_and_compare(tmp_path / "model.gguf", config, "f32", MODELS["glm-dsa"].seed)


def test_sections_of_mrope_change_nothing_for_text(tmp_path: Path) -> None:
    keys = {"rope.dimension_sections": np.array([2, 1, 1, 0], np.int32)}
    write_and_compare(tmp_path / "model.gguf", glm4moe(), "f32", keys=keys)


def test_v2_lite_by_its_number_of_layers(tmp_path: Path) -> None:
    config = copy.deepcopy(MODELS["deepseek2 lite"].config)
    config.num_hidden_layers = 27
    write_and_compare(tmp_path / "model.gguf", config, "f32")


def test_deepseek4_with_an_f16_cache(tmp_path: Path) -> None:
    """Rounded rows may be chosen differently where scores are close, and so may experts. Tokens to
    which that happens are far off, and are left out; they must be few.
    """
    torch.set_num_threads(1)
    tiny = MODELS["deepseek4"]
    convert(random_model(tiny.config), tmp_path / "model.gguf", "f32")
    theirs = llama_cpp_logits(tmp_path / "model.gguf", tiny.tokens, GGML_TYPE_F16)
    model = load(tmp_path / "model.gguf", backends=["numpy"])
    ours = model.session(n_ctx=len(tiny.tokens)).forward(tiny.tokens, outputs="all")
    errors = np.array([nmse(*rows) for rows in zip(ours, theirs, strict=True)])
    close = errors < 1e-3
    assert np.median(errors) < 1e-5
    assert (~close).sum() <= 5
    assert np.array_equal(ours.argmax(1)[close], theirs.argmax(1)[close])

"""Logits of whole models against transformers, on tiny files with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

pytestmark = pytest.mark.oracle
pytest.importorskip("transformers", reason="needs torch and transformers (the extra 'oracle')")

import torch  # noqa: E402
from transformers import Glm4MoeConfig, LlamaConfig, Qwen3Config, Qwen3MoeConfig  # noqa: E402

from pyggml.generate.session import Session  # noqa: E402
from pyggml.models.model import load  # noqa: E402
from pyggml.parity.tolerance import relative_error  # noqa: E402
from tests.models.convert import convert, random_model  # noqa: E402

#: About ten times the largest error, which is that of f32 arithmetic in another order.
TOLERANCE = 2e-5
#: Longer than the original length of the models whose rope is scaled.
N_TOKENS = 45
N_CTX = 48

SIZES: dict[str, Any] = {"vocab_size": 89, "num_hidden_layers": 2, "max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**SIZES | {
        "hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 20,
    } | changes)  # fmt: skip


def qwen3(**changes: Any) -> Qwen3Config:
    return Qwen3Config(**SIZES | {
        "hidden_size": 40, "intermediate_size": 72, "num_attention_heads": 10,
        "num_key_value_heads": 5, "head_dim": 12,
    } | changes)  # fmt: skip


def qwen3moe(**changes: Any) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(**SIZES | {
        "hidden_size": 32, "intermediate_size": 72, "moe_intermediate_size": 32, "num_experts": 7,
        "num_experts_per_tok": 3, "norm_topk_prob": True, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 16,
    } | changes)  # fmt: skip


def glm4moe(**changes: Any) -> Glm4MoeConfig:
    return Glm4MoeConfig(**SIZES | {
        "num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 72,
        "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 16, "use_qk_norm": True, "attention_bias": True,
        "num_nextn_predict_layers": 0,
    } | changes)  # fmt: skip


#: name -> config, type of matrices. Blocks need rows of whole blocks.
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "llama": (llama, "f32"),
    "llama biases": (lambda: llama(attention_bias=True, mlp_bias=True), "f32"),
    "llama tied llama3": (
        lambda: llama(num_attention_heads=6, num_key_value_heads=2, head_dim=8,
                      tie_word_embeddings=True, rope_parameters=LLAMA3),
        "f32",
    ),
    "llama linear": (lambda: llama(rope_parameters=LINEAR), "f32"),
    "llama yarn": (lambda: llama(num_hidden_layers=3, rope_parameters=YARN), "f32"),
    "llama q8_0": (lambda: llama(hidden_size=96, intermediate_size=64, head_dim=32), "q8_0"),
    "llama q4_1": (
        lambda: llama(hidden_size=96, intermediate_size=64, head_dim=32, tie_word_embeddings=True),
        "q4_1",
    ),
    "qwen3": (qwen3, "f32"),
    "qwen3 tied yarn": (lambda: qwen3(tie_word_embeddings=True, rope_parameters=YARN), "f32"),
    "qwen3moe": (qwen3moe, "f32"),
    "qwen3moe merged": (lambda: qwen3moe(num_experts_per_tok=1), "f32"),
    "qwen3moe q8_0": (qwen3moe, "q8_0"),
    "glm4moe": (glm4moe, "f32"),
    "glm4moe air": (
        lambda: glm4moe(n_group=1, topk_group=1, n_shared_experts=2, use_qk_norm=False,
                        norm_topk_prob=False, attention_bias=False, first_k_dense_replace=2),
        "f32",
    ),
    "glm4moe merged": (lambda: glm4moe(head_dim=24, first_k_dense_replace=0), "f32"),
}  # fmt: skip

#: name -> options of the model
OPTIONS: dict[str, dict[str, Any]] = {
    "flash": {},
    "scores": {"flash": False},
    "unfused": {"fused": False},
    "amb": {"flash": False, "amb": 0.04},  # cuts the scores of a whole prompt,
}


class Oracle(NamedTuple):
    path: Path
    tokens: list[int]
    logits: NDArray[np.float32]


@pytest.fixture(scope="module", params=MODELS)
def oracle(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """A file, and the logits of transformers for some tokens."""
    config, dtype = MODELS[request.param]
    torch.set_num_threads(1)
    model = random_model(config(), seed=len(request.param))
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    convert(model, path, dtype, merged="merged" in request.param)
    tokens = np.random.default_rng(1).integers(0, SIZES["vocab_size"], N_TOKENS).tolist()
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].numpy()
    return Oracle(path, tokens, logits)


def session(path: Path, n_batch: int, options: dict[str, Any]) -> Session:
    model = load(path, backends=["numpy"], cache_k="f32", cache_v="f32", **options)
    return model.session(n_ctx=N_CTX, n_batch=n_batch)


def check(logits: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    error = max(map(relative_error, logits, expected))
    print(f"error {error:.1e}")
    assert error < TOLERANCE
    assert np.array_equal(logits.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("n_batch", [N_CTX, 7])
@pytest.mark.parametrize("options", OPTIONS)
def test_prompt(oracle: Oracle, options: str, n_batch: int) -> None:
    """The whole prompt, and the prompt in chunks."""
    s = session(oracle.path, n_batch, OPTIONS[options])
    check(s.forward(oracle.tokens, outputs="all"), oracle.logits)


@pytest.mark.parametrize("options", ["flash", "scores", "unfused"])
def test_one_token_at_a_time(oracle: Oracle, options: str) -> None:
    s = session(oracle.path, 1, OPTIONS[options])
    logits = [s.forward([token])[0] for token in oracle.tokens]
    check(np.stack(logits), oracle.logits)


def test_last_token_after_a_prompt(oracle: Oracle) -> None:
    s = session(oracle.path, 16, {})
    n = N_TOKENS - 5
    check(s.forward(oracle.tokens[:n]), oracle.logits[n - 1 : n])
    check(s.forward(oracle.tokens[n:]), oracle.logits[-1:])

"""A real model, SmolLM2-135M-Instruct in Q4_1, against transformers and llama.cpp."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.oracle
pytest.importorskip("transformers", reason="needs torch and transformers (the extra 'oracle')")


import torch  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

from pyggml import gguf  # noqa: E402
from pyggml.generate.session import Session  # noqa: E402
from pyggml.gguf.quantize import quantize  # noqa: E402
from pyggml.models.model import load  # noqa: E402
from pyggml.parity.tolerance import nmse  # noqa: E402
from tests.models.convert import restore  # noqa: E402
from tests.oracle.packages import package  # noqa: E402

#: The capital of France is Paris. The capital of Italy is
PROMPT = [504, 3575, 282, 4649, 314, 7042, 30, 378, 3575, 282, 7562, 314]
N_GENERATED = 64


@pytest.fixture(scope="module")
def path() -> Path:
    (path,) = package("smollm2").glob("*.gguf")
    return path


def session(path: Path) -> Session:
    model = load(path, backends=["numpy"], cache_k="f32", cache_v="f32")
    return model.session(n_ctx=len(PROMPT) + N_GENERATED)


def test_greedy_tokens_are_those_of_transformers(path: Path) -> None:
    """Logits of the decoded weights, and 64 tokens wherever the best is clear."""
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with gguf.open(path) as file:
        restore(model, file)
    tokens = PROMPT + list(session(path).generate(PROMPT, N_GENERATED))
    with torch.no_grad():
        theirs = model(torch.tensor([tokens[:-1]])).logits[0].numpy()
    best = np.sort(theirs, axis=1)[len(PROMPT) - 1 :]
    clear = best[:, -1] - best[:, -2] > 1e-3
    assert clear.sum() >= 60
    choices = theirs[len(PROMPT) - 1 :].argmax(1)
    assert np.array_equal(choices[clear], np.array(tokens[len(PROMPT) :])[clear])
    ours = session(path).forward(tokens[:-1], outputs="all")
    assert nmse(ours, theirs) < 1e-9


def test_llama_cpp(path: Path, tmp_path: Path) -> None:
    """The file as it is: llama.cpp multiplies its blocks by activations of 8 bits. And the same
    weights as f32, for which it rounds nothing: so the 8 bits are the whole difference.
    """
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python (the extra 'oracle')")
    from tests.oracle.test_models_llama_cpp import llama_cpp_logits

    decoded = tmp_path / "f32.gguf"
    with gguf.open(path) as file:
        quantize(file, decoded, "f32", requantize=True)
    ours = session(path).forward(PROMPT, outputs="all")
    exact = session(decoded).forward(PROMPT, outputs="all")
    assert nmse(ours, exact) < 1e-10
    theirs = llama_cpp_logits(decoded, PROMPT)
    assert nmse(exact, theirs) < 1e-10
    assert np.array_equal(ours.argmax(1), theirs.argmax(1))
    rounded = llama_cpp_logits(path, PROMPT)
    error = nmse(rounded, theirs)  # llama.cpp against itself
    assert error < 5e-3
    assert nmse(ours, rounded) < 1.1 * error
    assert np.array_equal(ours.argmax(1), rounded.argmax(1))

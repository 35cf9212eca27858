"""Files that pyggml writes, with each architecture, open in gguf and run in llama.cpp."""

from __future__ import annotations

from pathlib import Path

import gguf as reference
import numpy as np
import pytest

from pyggml import gguf
from pyggml.gguf.quantize import quantize
from pyggml.models.model import load
from pyggml.models.presets import PRESETS
from pyggml.models.synth import synth
from pyggml.parity.tolerance import nmse

TOKENS = [3, 17, 99, 400, 5, 250, 31, 8]


@pytest.fixture(params=[name for name in PRESETS if name.startswith("tiny")])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def paths(name: str, tmp_path: Path) -> list[Path]:
    """A file of `synth`, and one of `quantize`."""
    paths = [tmp_path / "f32.gguf", tmp_path / "q8_0.gguf"]
    synth(paths[0], PRESETS[name], dtype="f32")
    with gguf.open(paths[0]) as file:
        quantize(file, paths[1], "q8_0")
    return paths


def test_gguf(paths: list[Path]) -> None:
    for path in paths:
        reader = reference.GGUFReader(path)
        with gguf.open(path) as file:
            ours = {name: (list(t.ne), t.dtype.name) for name, t in file.tensors.items()}
            assert set(file.fields) <= set(reader.fields)
        theirs = {t.name: (t.shape.tolist(), t.tensor_type.name.lower()) for t in reader.tensors}
        assert theirs == ours


@pytest.mark.oracle
def test_llama_cpp(paths: list[Path]) -> None:
    pytest.importorskip("transformers", reason="needs the extra 'oracle'")
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python (the extra 'oracle')")
    from tests.oracle.test_models_llama_cpp import llama_cpp_logits

    errors = []
    for path in paths:
        theirs = llama_cpp_logits(path, TOKENS)
        with load(path, backends=["numpy"], cache_k="f32", cache_v="f32") as model:
            ours = model.session(n_ctx=64).forward(TOKENS, "all")
        errors.append([nmse(*rows) for rows in zip(ours, theirs, strict=True)])
    assert max(errors[0]) < 1e-9
    # With q8_0, llama.cpp rounds activations to 8 bits, and a few tokens choose other experts.
    assert np.median(errors[1]) < 5e-3

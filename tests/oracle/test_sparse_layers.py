"""The float64 layers of sparse attention against the attention of transformers' layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.oracle
pytest.importorskip("transformers", reason="needs torch and transformers (the extra 'oracle')")

from pyggml import gguf  # noqa: E402
from pyggml.parity.tolerance import relative_error  # noqa: E402
from tests.models.convert import convert, random_model  # noqa: E402
from tests.models.tiny import MODELS  # noqa: E402
from tests.reference.compressed_layer import CompressedLayer  # noqa: E402
from tests.reference.sparse_layer import SparseLayer, best_f64  # noqa: E402

#: transformers computes rotations, norms and softmax in f32; the largest error is 1e-6.
TOLERANCE = 5e-6
NAMES = [name for name in MODELS if name.startswith(("deepseek32", "glm-dsa", "deepseek4"))]
#: Tokens at the end whose attention is computed from the rows of all.
LAST = 30


@pytest.mark.parametrize("name", NAMES)
def test_attention_of_every_layer(name: str, tmp_path: Path) -> None:
    """The last tokens of a prompt, from the input that the layer has in transformers."""
    import torch

    tiny, path = MODELS[name], tmp_path / "model.gguf"
    model = random_model(tiny.config, tiny.seed)
    convert(model, path, tiny.dtype, merged=tiny.merged)
    calls: list[tuple[np.ndarray, np.ndarray]] = []

    def record(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        calls.append((x[0].numpy().astype("f8"), output[0][0].numpy()))

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(record, with_kwargs=True)
    with torch.no_grad():
        model(torch.tensor([tiny.tokens]))
    assert len(calls) == tiny.config.num_hidden_layers
    with gguf.open(path) as file:
        compressed = file.fields["general.architecture"] == "deepseek4"
        seen = None
        for il, (x, theirs) in enumerate(calls):
            layer = (CompressedLayer if compressed else SparseLayer).of(file, il)
            rows, last = layer.rows(x), x[-LAST:]
            if rows.index_keys is not None:
                top_k = layer.k["attention.indexer.top_k"]
                seen = best_f64(layer.scores(last, rows), top_k).chosen
                assert seen.sum(axis=1).max() <= top_k
            elif compressed:
                seen = layer.visible(last, rows)
            ours = layer.attention(last, rows, seen)
            errors = [relative_error(*pair) for pair in zip(ours, theirs[-LAST:])]
            assert max(errors) < TOLERANCE, (il, max(errors))

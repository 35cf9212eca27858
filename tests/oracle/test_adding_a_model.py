"""The architecture that docs/adding-a-model.md adds: its logits against transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.oracle
pytest.importorskip("transformers", reason="needs torch and transformers (the extra 'oracle')")

import torch  # noqa: E402
from transformers import Qwen2Config  # noqa: E402

from pyggml.models import base  # noqa: E402
from pyggml.models.model import load  # noqa: E402
from pyggml.parity.tolerance import relative_error  # noqa: E402
from tests.models.convert import convert, random_model  # noqa: E402
from tests.models.recipes import RECIPES, Recipe  # noqa: E402
from tests.models.tiny import SIZES, TOKENS  # noqa: E402
from tests.test_documents import ROOT, blocks  # noqa: E402


@pytest.mark.parametrize("tied", [False, True])
def test_logits(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("document")
    monkeypatch.setitem(sys.modules, "document", module)
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    exec(blocks(ROOT / "docs" / "adding-a-model.md")[0], module.__dict__)
    monkeypatch.setitem(RECIPES, "qwen2", Recipe(name="qwen2"))
    config = Qwen2Config(
        **SIZES, hidden_size=48, intermediate_size=72, num_attention_heads=6, num_key_value_heads=2,
        head_dim=8, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.set_num_threads(1)
    model = random_model(config)
    convert(model, tmp_path / "m.gguf")
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    with load(tmp_path / "m.gguf", backends=["numpy"], cache_k="f32", cache_v="f32") as ours:
        for n_batch in (48, 7):
            logits = ours.session(48, n_batch).forward(TOKENS, "all")
            assert relative_error(logits, expected) < 2e-5

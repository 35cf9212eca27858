"""`pyggml diff` against what llama.cpp computes, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.oracle
pytest.importorskip("llama_cpp", reason="needs llama-cpp-python (the extra 'oracle')")

from examples.dump_llama_cpp import dump  # noqa: E402
from pyggml.models.model import load  # noqa: E402
from pyggml.models.presets import preset  # noqa: E402
from pyggml.models.synth import synth  # noqa: E402
from pyggml.parity.against import Difference, against  # noqa: E402
from pyggml.parity.dump import TOKENS, read_dump  # noqa: E402


def compared(folder: Path, name: str, dtype: str, mla: int = 3) -> Difference:
    path = folder / "m.gguf"
    synth(path, preset(name), dtype=dtype, seed=1)
    dump(path, [1, 5, 9, 3, 7, 2], folder / "dump.npz")
    arrays = read_dump(folder / "dump.npz")
    tokens = arrays.pop(TOKENS).tolist()
    with load(path, backends=["numpy"], mla=mla) as model:
        return against(model, tokens, arrays)


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_llama(dtype: str, tmp_path: Path) -> None:
    result = compared(tmp_path, "tiny-llama", dtype)
    assert result.ok, result.first
    assert len(result.pairs) == 23 and {p.label for p in result.pairs} >= {
        "inp_embd", "attn_norm-0", "Qcur-0", "Kcur-1", "kqv_out-1", "ffn_norm-1", "result_output",
    }  # fmt: skip


def test_deepseek_in_its_latent_form(tmp_path: Path) -> None:
    """Heads come before tokens in some tensors. The experts of both engines are the same."""
    result = compared(tmp_path, "tiny", "f16", mla=1)
    assert result.ok, result.first
    notes = {pair.label: pair.note for pair in result.pairs}
    assert notes["Qcur-1"] == "heads and tokens swapped" and notes["ffn_moe_topk-1"] == ""

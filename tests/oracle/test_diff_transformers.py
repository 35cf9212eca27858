"""`pyggml diff` against dumps of transformers: tiny models agree, and a planted fault is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.oracle
pytest.importorskip("transformers", reason="needs torch and transformers (the extra 'oracle')")

import torch  # noqa: E402

from examples.dump_transformers import dump  # noqa: E402
from pyggml.cli import main  # noqa: E402
from pyggml.models.model import load  # noqa: E402
from pyggml.parity.against import Difference, against  # noqa: E402
from pyggml.parity.dump import TOKENS as KEY  # noqa: E402
from pyggml.parity.dump import read_dump  # noqa: E402
from tests.models.convert import convert, random_model  # noqa: E402
from tests.models.tiny import MODELS, TOKENS  # noqa: E402

#: One model of each architecture, and one with weights in blocks.
NAMES = ("llama", "llama q8_0", "qwen3moe", "glm4moe", "deepseek2 v3", "gpt-oss")


def write(name: str, folder: Path) -> tuple[Any, Path]:
    """A random model, and the file that was converted from it."""
    tiny = next(MODELS[known] for known in MODELS if known.startswith(name))
    torch.set_num_threads(1)
    model = random_model(tiny.config)
    convert(model, folder / "m.gguf", tiny.dtype, merged=tiny.merged)
    return model, folder / "m.gguf"


def compared(model: Any, path: Path, **options: Any) -> Difference:
    dump(model, TOKENS, path.with_suffix(".npz"))
    arrays = read_dump(path.with_suffix(".npz"))
    tokens = arrays.pop(KEY).tolist()
    with load(path, backends=["numpy"], **options) as ours:
        return against(ours, tokens, arrays)


@pytest.mark.parametrize("name", NAMES)
def test_models_agree(name: str, tmp_path: Path) -> None:
    model, path = write(name, tmp_path)
    result = compared(model, path)
    assert result.ok, result.first
    labels = {pair.label for pair in result.pairs}
    n_layer = model.config.num_hidden_layers
    assert {"inp_embd", "result_norm", "result_output"} <= labels
    for kind in ("attn_norm", "attn_out", "ffn_norm", "ffn_out", "l_out"):
        assert {f"{kind}-{il}" for il in range(n_layer)} <= labels
    assert all(
        pair.comparison is not None and pair.comparison.bound <= 1e-2 for pair in result.pairs
    )


def faults(layer: Any) -> dict[str, torch.nn.Parameter]:
    """The label at which a scaled parameter of layer 1 must be found, and the parameter."""
    return {
        "attn_norm-1": layer.input_layernorm.weight,
        "attn_out-1": layer.self_attn.o_proj.weight,
        "ffn_norm-1": layer.post_attention_layernorm.weight,
        "ffn_out-1": layer.mlp.down_proj.weight,
    }


@pytest.mark.parametrize("label", ["attn_norm-1", "attn_out-1", "ffn_norm-1", "ffn_out-1"])
def test_a_planted_fault_is_found_at_its_node(
    label: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row of a parameter is a tenth larger in transformers than in the file."""
    model, path = write("llama", tmp_path)
    with torch.no_grad():
        faults(model.model.layers[1])[label][3] *= 1.1
    result = compared(model, path)
    assert result.first is not None and result.first.label == label
    assert (
        not result.ok
        and result.first.comparison is not None
        and result.first.comparison.at is not None
    )
    before = [pair for pair in result.pairs if pair.label.endswith("-0")]
    assert before and all(pair.ok for pair in before)
    words = ["diff", "-m", str(path), "--against", str(path.with_suffix(".npz"))]
    assert main([*words, "--backend", "numpy"]) == 1
    out = capsys.readouterr().out
    assert f"\nfirst: {label} = " in out and f"\n! {label} " in out and "pyggml/models" in out
    assert main([*words, "--backend", "numpy", "--node", label]) == 1
    out = capsys.readouterr().out
    column = int(result.first.comparison.at[-1])
    assert out.startswith(f"{label} = ") and out.count("\n") == 11 and f", {column})" in out
    assert column == 3

"""Files with random weights, and whether their tensors fit their keys."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyggml import gguf
from pyggml.errors import DTypeError, GGUFError, ShapeError, UnknownNameError
from pyggml.models.deepseek2 import DeepSeek2
from pyggml.models.known import check_tensors, tensor_sizes
from pyggml.models.presets import TINY, preset
from pyggml.models.synth import synth
from tests.models.stand_ins import file_of


def deepseek2(name: str = "tiny", **options: Any) -> DeepSeek2:
    arch = preset(name, **options)
    assert isinstance(arch, DeepSeek2)
    return arch


def test_presets_refuse_nonsense(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="tiny"):
        preset("big")
    for layers in (0, 10**9):
        with pytest.raises(ShapeError, match="layers"):
            preset("tiny", layers=layers)
    with pytest.raises(DTypeError, match="choose from"):
        synth(tmp_path / "x", preset("tiny"), dtype="q8_K")
    with pytest.raises(ShapeError, match="seed"):
        synth(tmp_path / "x", preset("tiny"), seed=-1)
    assert deepseek2("deepseek-v3", layers=2).n_layer_dense == 2


@pytest.mark.parametrize("kv_b", ["split", "joined"])
@pytest.mark.parametrize("type_", ["f32", "bf16", "q4_K", "iq4_nl"])
def test_a_tiny_file_end_to_end(tmp_path: Path, type_: str, kv_b: Any) -> None:
    arch = deepseek2(kv_b=kv_b)
    size = synth(tmp_path / "t.gguf", arch, dtype=type_, seed=1)
    with gguf.open(tmp_path / "t.gguf") as file:
        assert os_size(file) == size
        read = DeepSeek2.of(file)
        assert replace(read, rms_eps=1e-6, yarn_log_mul=0.1) == arch  # f32 in the file
        assert {n: t.ne for n, t in file.tensors.items()} == tensor_sizes(arch)
        types = {n: t.dtype.name for n, t in file.tensors.items()}
        assert types["blk.0.attn_norm.weight"] == types["blk.1.ffn_gate_inp.weight"] == "f32"
        assert types["blk.2.exp_probs_b.bias"] == "f32"
        assert types["blk.1.ffn_gate_exps.weight"] == type_
        fallback = {"q4_K": "q8_0"}.get(type_, type_)
        assert types["blk.1.ffn_down_exps.weight"] == fallback  # rows of 128
        assert types["output.weight"] == ("q6_K" if type_ in ("q4_K", "iq4_nl") else type_)
        norm = file.array("output_norm.weight")
        assert 0.9 < norm.mean() < 1.1 and norm.std() > 0
        assert len(file.fields["tokenizer.ggml.tokens"]) == arch.n_vocab  # type: ignore[arg-type]


def test_keys_that_llama_cpp_requires_are_written() -> None:
    """Even if their value is pyggml's default."""
    arch = replace(TINY, n_layer_dense=0, experts=replace(TINY.experts, n_shared=0))
    fields = arch.fields()
    for key in ("leading_dense_block_count", "expert_shared_count", "feed_forward_length"):
        assert f"deepseek2.{key}" in fields
    assert fields["deepseek2.rope.freq_base"] == 10000
    assert fields["deepseek2.leading_dense_block_count"] == 0
    for key in ("nextn_predict_layers", "attention.temperature_scale"):
        assert f"deepseek2.{key}" not in fields


def os_size(file: gguf.GGUFFile) -> int:
    return Path(file.paths[0]).stat().st_size


@pytest.mark.parametrize("kv_b", ["split", "joined"])
def test_matrices_preserve_the_scale_of_activations(tmp_path: Path, kv_b: Any) -> None:
    arch = deepseek2(kv_b=kv_b)
    synth(tmp_path / "t", arch, dtype="f32")
    # attn_k_b is stored transposed: its ne[1] is the latent, over which attn_kv_b sums.
    fan_in = {"attn_k_b": arch.kv_lora_rank, "attn_v_b": arch.kv_lora_rank,
              "attn_kv_b": arch.kv_lora_rank, "attn_q_a": arch.n_embd,
              "ffn_gate_inp": arch.n_embd, "ffn_down_exps": arch.experts.n_ff}  # fmt: skip
    with gguf.open(tmp_path / "t") as file:
        leaves = [leaf for leaf in fan_in if f"blk.1.{leaf}.weight" in file.tensors]
        for leaf in leaves:
            std = float(file.array(f"blk.1.{leaf}.weight").std())
            assert std * math.sqrt(fan_in[leaf]) == pytest.approx(1, rel=0.05), leaf
    assert len(leaves) == (5 if kv_b == "split" else 4)


def test_v3_header_with_its_real_sizes(tmp_path: Path) -> None:
    synth(tmp_path / "v3.gguf", preset("deepseek-v3"), dtype="q4_K", header_only=True)
    with gguf.open(tmp_path / "v3.gguf", allow_missing_data=True) as file:
        assert not file.complete and os_size(file) < 8 << 20
        assert sum(t.n_elements for t in file.tensors.values()) == 671_026_419_200
        assert DeepSeek2.of(file).n_layer == 61
        with pytest.raises(GGUFError, match="not in the file"):
            file.array("output.weight")


def test_a_layer_keeps_its_weights_if_others_are_removed(tmp_path: Path) -> None:
    for layers in (2, 3):
        synth(tmp_path / f"{layers}", preset("tiny", layers=layers), dtype="q8_0")
    with gguf.open(tmp_path / "2") as two, gguf.open(tmp_path / "3") as three:
        for name in two.tensors:
            np.testing.assert_array_equal(two.array(name), three.array(name))


def test_check_tensors_names_the_wrong_tensor(tmp_path: Path) -> None:
    synth(tmp_path / "t", TINY, header_only=True)
    with gguf.open(tmp_path / "t", allow_missing_data=True) as file:
        tensors = dict(file.tensors)
    with pytest.raises(GGUFError, match=r"'blk.0.attn_q_a.weight': ne=\[256, 96\].*\[256, 64\]"):
        check_tensors(replace(TINY, q_lora_rank=64), tensors)
    with pytest.raises(GGUFError, match=r"'blk.0.attn_q.weight' .*is missing"):
        check_tensors(replace(TINY, q_lora_rank=None), tensors)
    for name, ne in {"blk.1.ffn_up_exps.scale": (8,), "blk.1.attn_q_a.scale": (1,),
                     "blk.1.attn_output.scale": ()}.items():  # fmt: skip
        good, wrong = (replace(tensors["output_norm.weight"], ne=n) for n in (ne, (3,)))
        check_tensors(TINY, tensors | {name: good})
        with pytest.raises(GGUFError, match=rf"'{name}': ne=\[3\], but"):
            check_tensors(TINY, tensors | {name: wrong})


def test_tensors_that_a_file_may_leave_out() -> None:
    """The output matrix, a layer's bias for the choice, and up and gate if they are merged."""
    assert DeepSeek2.of(file_of(TINY, {}, {"output.weight": None})) == replace(TINY, tied=True)
    one = DeepSeek2.of(file_of(TINY, {}, {"blk.1.exp_probs_b.bias": None}))
    assert one == replace(TINY, experts=replace(TINY.experts, choice_bias=False))
    separate = {
        f"blk.{il}.ffn_{part}_exps.weight": None for il in (1, 2) for part in ("up", "gate")
    }
    merged = {f"blk.{il}.ffn_gate_up_exps.weight": (256, 256, 8) for il in (1, 2)}
    assert DeepSeek2.of(file_of(TINY, {}, separate | merged)) == replace(TINY, merged=True)
    with pytest.raises(GGUFError, match=r"ffn_gate_exps.weight' of ne=\[256, 128, 8\] is missing"):
        DeepSeek2.of(file_of(TINY, {}, separate))

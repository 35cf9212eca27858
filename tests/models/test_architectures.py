"""Files of llama, qwen3, qwen3moe and glm4moe: how they are read, and the errors of bad ones."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pyggml import gguf
from pyggml.dtypes import F32
from pyggml.errors import GGUFError
from pyggml.gguf.synth import random_tensor
from pyggml.gguf.writer import Tensor, write
from pyggml.models.base import Architecture, architecture, architectures
from pyggml.models.glm4moe import Glm4Moe
from pyggml.models.gqa import Heads
from pyggml.models.known import tensor_sizes
from pyggml.models.layers import Rope
from pyggml.models.llama import Llama
from pyggml.models.model import load
from pyggml.models.moe import Experts
from pyggml.models.qwen3 import Qwen3, Qwen3Moe

SIZES: dict[str, Any] = {
    "n_block": 2, "n_ctx_train": 64, "n_embd": 32, "rms_eps": 2.0**-16, "n_vocab": 50, "n_ff": 48,
    "heads": Heads(n_head=4, n_head_kv=2, d_k=12, d_v=10, n_rot=12),
    "rope": Rope(factor=1.0, n_ctx_orig=64),
}  # fmt: skip
EXPERTS = Experts(n_expert=6, n_used=2, n_ff=16, gating_func=1, weights_norm=True)
TINY: dict[str, Any] = {
    "llama": Llama(**SIZES),
    "qwen3": Qwen3(**SIZES, tied=True),
    "qwen3moe": Qwen3Moe(**SIZES, experts=EXPERTS),
    "glm4moe": Glm4Moe(
        **SIZES | {"heads": Heads(n_head=4, n_head_kv=2, d_k=12, d_v=10, n_rot=6)},
        n_layer_dense=1,
        qk_norm=True,
        experts=replace(EXPERTS, gating_func=2, n_shared=1, weights_scale=2.5, choice_bias=True),
    ),
}
REQUIRED = (
    "block_count", "context_length", "embedding_length", "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)  # fmt: skip
EVERY = pytest.mark.parametrize("name", TINY)


def tensor(name: str, ne: tuple[int, ...]) -> Tensor:
    mean = float("norm" in name)
    return random_tensor(name, F32, ne, std=0.3 * ne[0] ** -0.5, mean=mean)


def write_file(
    folder: Path,
    arch: Architecture,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, tuple[int, ...] | None] | None = None,
) -> Path:
    """A file of the model; `keys` (without prefix) and `tensors` change it, None removes one."""
    fields = arch.fields() | {f"{arch.name}.{k}": value for k, value in (keys or {}).items()}
    sizes: dict[str, Any] = {**tensor_sizes(arch), **(tensors or {})}
    path = folder / "model.gguf"
    write(
        path,
        {key: value for key, value in fields.items() if value is not None},
        [tensor(name, ne) for name, ne in sizes.items() if ne is not None],
    )
    return path


def read(path: Path) -> Any:
    with gguf.open(path) as file:
        return architecture(file.fields["general.architecture"]).of(file)


def logits(path: Path) -> NDArray[np.float32]:
    model = load(path, backends=["numpy"], cache_k="f32", cache_v="f32")
    return model.session(n_ctx=16, n_batch=4).forward(range(7), outputs="all")


# -- files that are right -----------------------------------------------------------------------


def test_registry() -> None:
    for name in architectures():
        if name in TINY:
            assert architecture(name) is type(TINY[name])


@EVERY
def test_keys_round_trip(name: str, tmp_path: Path) -> None:
    arch = TINY[name]
    assert read(write_file(tmp_path, arch)) == arch
    turned = replace(arch, tied=not arch.tied)
    assert read(write_file(tmp_path, turned)) == turned


@EVERY
def test_model_runs(name: str, tmp_path: Path) -> None:
    rows = logits(write_file(tmp_path, TINY[name]))
    assert rows.shape == (7, 50)
    assert np.isfinite(rows).all()
    assert np.ptp(rows) > 0.1


@EVERY
def test_defaults_are_llama_cpps(name: str, tmp_path: Path) -> None:
    removed = dict.fromkeys(
        ("attention.head_count_kv", "attention.value_length", "rope.dimension_count",
         "rope.scaling.factor", "rope.scaling.original_context_length")
    )  # fmt: skip
    heads = Heads(n_head=4, n_head_kv=4, d_k=12, d_v=8, n_rot=12)
    arch = replace(TINY[name], heads=heads, rope=Rope(factor=1.0, n_ctx_orig=64))
    assert read(write_file(tmp_path, arch, removed)) == arch
    keys = removed | {"attention.key_length": None}
    plain = replace(arch, heads=replace(heads, d_k=8, n_rot=8))
    assert read(write_file(tmp_path, plain, keys)) == plain


@EVERY
def test_a_bias_is_added(name: str, tmp_path: Path) -> None:
    arch = TINY[name]
    plain = logits(write_file(tmp_path, arch))
    for matrix, ne in arch.heads.tensors(arch.n_embd).items():
        biased = logits(write_file(tmp_path, arch, tensors={f"blk.1.{matrix}.bias": ne[1:]}))
        assert np.abs(biased - plain).max() > 1e-3, matrix


def test_rope_factors_of_llama(tmp_path: Path) -> None:
    plain = logits(write_file(tmp_path, TINY["llama"]))
    path = write_file(tmp_path, TINY["llama"], tensors={"rope_freqs.weight": (6,)})
    assert np.abs(logits(path) - plain).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "tied"),
    [("token_embd", False), ("token_embd", True), ("output", False), ("blk.1.attn_q", False)],
)
def test_a_factor_scales_every_use_of_a_matrix(name: str, tied: bool, tmp_path: Path) -> None:
    """The factor with the matrix divided by it gives the logits without."""
    arch = replace(TINY["llama"], tied=tied)
    with gguf.open(write_file(tmp_path, arch)) as file:
        arrays = {key: np.array(file.array(key)) for key in file.tensors}
    expected = logits(tmp_path / "model.gguf")
    arrays[f"{name}.weight"] /= 8
    bare = write_arrays(tmp_path / "bare.gguf", arch, arrays)
    assert np.abs(logits(bare) - expected).max() > 1e-3
    arrays[f"{name}.scale"] = np.full(1, 8, np.float32)
    scaled = write_arrays(tmp_path / "scaled.gguf", arch, arrays)
    np.testing.assert_allclose(logits(scaled), expected, atol=1e-5)


def write_arrays(path: Path, arch: Architecture, arrays: Mapping[str, NDArray[Any]]) -> Path:
    tensors = [
        Tensor(key, F32, a.shape[::-1], lambda a=a: [a])  # type: ignore[misc]
        for key, a in arrays.items()
    ]
    write(path, arch.fields(), tensors)
    return path


@pytest.mark.parametrize("name", ["qwen3moe", "glm4moe"])
def test_merged_experts(name: str, tmp_path: Path) -> None:
    """One tensor with the rows of gate and then of up gives the logits of two."""
    arch = TINY[name]
    split = write_file(tmp_path, arch)
    expected = logits(split)
    with gguf.open(split) as file:
        arrays = {key: np.array(file.array(key)) for key in file.tensors}
    for il in range(arch.n_layer):
        pair = [arrays.pop(f"blk.{il}.ffn_{part}_exps.weight", None) for part in ("gate", "up")]
        if pair[0] is not None:
            merged = np.concatenate(pair, axis=1)  # type: ignore[arg-type]
            arrays[f"blk.{il}.ffn_gate_up_exps.weight"] = merged
    path = write_arrays(tmp_path / "merged.gguf", arch, arrays)
    assert read(path) == replace(arch, merged=True)
    np.testing.assert_allclose(logits(path), expected, atol=1e-5)


def test_qwen3moe_always_normalizes_a_softmax(tmp_path: Path) -> None:
    keys = {"expert_gating_func": 2, "expert_weights_norm": False}
    assert read(write_file(tmp_path, TINY["qwen3moe"], keys)) == TINY["qwen3moe"]


def test_glm4moe_without_optional_keys(tmp_path: Path) -> None:
    """Sigmoids are the default, and the sections of M-RoPE change nothing for text."""
    keys = {"expert_gating_func": None, "rope.dimension_sections": np.array([1, 1, 1, 0], np.int32)}
    assert read(write_file(tmp_path, TINY["glm4moe"], keys)) == TINY["glm4moe"]


def test_glm4moe_without_norms_of_heads(tmp_path: Path) -> None:
    air = replace(TINY["glm4moe"], qk_norm=False)
    assert read(write_file(tmp_path, air)) == air


def test_blocks_of_mtp_are_left_out(tmp_path: Path) -> None:
    arch = TINY["glm4moe"]
    expected = logits(write_file(tmp_path, arch))
    block = {name: ne for name, ne in tensor_sizes(arch).items() if name.startswith("blk.1.")}
    extra = {name.replace("blk.1.", "blk.2."): ne for name, ne in block.items()}
    extra |= {"blk.2.nextn.eh_proj.weight": (64, 32), "blk.2.nextn.enorm.weight": (32,)}
    path = write_file(tmp_path, arch, {"block_count": 3, "nextn_predict_layers": 1}, extra)
    with pytest.warns(UserWarning, match="the last 1 of 3 blocks predict further tokens"):
        assert np.array_equal(logits(path), expected)
    with pytest.raises(GGUFError, match=r"'glm4moe.nextn_predict_layers': 3, must be below 3"):
        read(write_file(tmp_path, arch, {"block_count": 3, "nextn_predict_layers": 3}, extra))


# -- files that are wrong -----------------------------------------------------------------------


@EVERY
def test_missing_keys(name: str, tmp_path: Path) -> None:
    missing = REQUIRED if name == "qwen3moe" else (*REQUIRED, "feed_forward_length")
    if name in ("qwen3moe", "glm4moe"):
        missing += ("expert_count", "expert_used_count", "expert_feed_forward_length")
    for key in missing:
        with pytest.raises(GGUFError, match=f"'{name}.{key}'"):
            read(write_file(tmp_path, TINY[name], {key: None}))
    with pytest.raises(GGUFError, match=f"'{name}.vocab_size': is missing, and the file has no"):
        read(write_file(tmp_path, TINY[name], {"vocab_size": None}))


@EVERY
def test_unknown_keys(name: str, tmp_path: Path) -> None:
    message = f"key '{name}.attention.sharpness': unknown for architecture '{name}'"
    with pytest.raises(GGUFError, match=message):
        read(write_file(tmp_path, TINY[name], {"attention.sharpness": 2.0}))
    with pytest.raises(GGUFError, match=f"'{name}.attention.sliding_window': .* compute 4096"):
        read(write_file(tmp_path, TINY[name], {"attention.sliding_window": 4096}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(write_file(tmp_path, TINY[name], {"attention.scale": 0.0})) == TINY[name]


@EVERY
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention.head_count": "4"}, "'NAME.attention.head_count': must be int, got str"),
        ({"attention.head_count": 0}, "'NAME.attention.head_count': 0, must be 1 to"),
        ({"attention.head_count_kv": 3}, "'NAME.attention.head_count_kv': 3, must divide 4"),
        ({"rope.dimension_count": 5}, "'NAME.rope.dimension_count': 5, must be even and at most"),
        ({"rope.dimension_count": 14}, "'NAME.rope.dimension_count': 14, must be even and"),
        ({"rope.scaling.type": "longrope"}, "'NAME.rope.scaling.type': 'longrope', must be one of"),
        ({"embedding_length": 36}, r"'token_embd.weight': ne=\[32, 50\], but .* imply \[36, 50\]"),
    ],
)  # fmt: skip
def test_wrong_values(name: str, keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=message.replace("NAME", name)):
        read(write_file(tmp_path, TINY[name], keys))


def test_wrong_values_of_experts(tmp_path: Path) -> None:
    for name in ("qwen3moe", "glm4moe"):
        with pytest.raises(GGUFError, match=f"'{name}.expert_used_count': 7, must be 1 to 6"):
            read(write_file(tmp_path, TINY[name], {"expert_used_count": 7}))
    with pytest.raises(GGUFError, match="leading_dense_block_count': 3, must be at most 2"):
        read(write_file(tmp_path, TINY["glm4moe"], {"leading_dense_block_count": 3}))


@EVERY
def test_missing_tensors(name: str, tmp_path: Path) -> None:
    """Each one; but without `output` or the first attn_q_norm, a file is of another model."""
    for missing in tensor_sizes(TINY[name]):
        if missing != "output.weight" and not (
            name == "glm4moe" and "blk.0.attn_q_norm" in missing
        ):
            with pytest.raises(GGUFError, match=f"tensor '{missing}' of ne=.* is missing"):
                read(write_file(tmp_path, TINY[name], tensors={missing: None}))


@EVERY
def test_wrong_sizes(name: str, tmp_path: Path) -> None:
    for tensor_name, ne in tensor_sizes(TINY[name]).items():
        wrong = {tensor_name: (*ne[:-1], ne[-1] + 1)}
        with pytest.raises(GGUFError, match=f"'{tensor_name}': ne=.*, but the file's keys imply"):
            read(write_file(tmp_path, TINY[name], tensors=wrong))


@EVERY
def test_unknown_tensors(name: str, tmp_path: Path) -> None:
    for unknown in ("blk.0.attn_gate.weight", "blk.2.attn_q.weight", "output_extra.weight"):
        with pytest.raises(GGUFError, match=f"tensor '{unknown}': unknown for architecture"):
            read(write_file(tmp_path, TINY[name], tensors={unknown: (32, 8)}))


def test_unknown_architecture(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, {"general.architecture": "rwkv7"}, [])
    with pytest.raises(GGUFError, match=r"architecture 'rwkv7' is unknown; pyggml has .*llama"):
        load(path)
    write(path, {"general.name": "x"}, [])
    with pytest.raises(GGUFError, match=r"key 'general.architecture' is missing"):
        load(path)

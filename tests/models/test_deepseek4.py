"""Files of DeepSeek V4: how they are read, what changes their logits, and errors of bad ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pyggml import gguf
from pyggml.errors import GGUFError
from pyggml.gguf.writer import Tensor, write
from pyggml.models.deepseek4 import DeepSeek4
from pyggml.models.known import tensor_sizes
from pyggml.models.model import load
from pyggml.models.presets import TINY_V4, V4_FLASH, preset
from pyggml.models.synth import synth
from tests.models.stand_ins import file_of

TOKENS = [(37 * i * i + 5 * i) % 512 for i in range(150)]
#: Numbers that f32 holds exactly, so that a file gives back what was written.
EXACT = replace(TINY_V4, rms_eps=2.0**-16, hc_eps=2.0**-20)
REQUIRED = (
    "block_count", "context_length", "embedding_length", "attention.head_count",
    "attention.key_length", "attention.layer_norm_rms_epsilon", "attention.q_lora_rank",
    "attention.sliding_window", "attention.output_group_count", "attention.output_lora_rank",
    "attention.indexer.head_count", "attention.indexer.key_length", "attention.indexer.top_k",
    "attention.compress_rope_freq_base", "attention.compress_ratios", "rope.dimension_count",
    "hash_layer_count", "hyper_connection.count", "hyper_connection.sinkhorn_iterations",
    "hyper_connection.epsilon", "expert_count", "expert_used_count", "expert_feed_forward_length",
    "expert_gating_func", "swiglu_clamp_exp",
)  # fmt: skip


def read(
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, tuple[int, ...] | None] | None = None,
    base: DeepSeek4 = EXACT,
) -> DeepSeek4:
    return DeepSeek4.of(file_of(base, keys, tensors))


# -- files that are right -----------------------------------------------------------------------


def test_keys_round_trip() -> None:
    assert read() == EXACT
    assert read(base=replace(EXACT, clamp=(1.0, 0.0, 2.0, 3.0))).clamp == (1.0, 0.0, 2.0, 3.0)


def test_one_limit_is_for_all_layers() -> None:
    arch = read({"swiglu_clamp_exp": 7.0, "swiglu_clamp_shexp": None})
    assert arch.clamp == arch.clamp_shared == 4 * (7.0,)


def test_longer_arrays_belong_to_mtp() -> None:
    ratios = np.array([0, 4, 128, 4, 0, 0], np.int32)
    assert read({"attention.compress_ratios": ratios}).ratios == EXACT.ratios


def test_mtp_blocks_are_left_out_if_the_file_has_any() -> None:
    """The key may be there without them: then it is about another file."""
    assert read({"nextn_predict_layers": 1}) == EXACT
    own = {"nextn_predict_layers": 1, "block_count": 5}
    with pytest.warns(UserWarning, match="last 1 of 5 blocks predict further tokens"):
        arch = read(own, {"blk.4.nextn.eh_proj.weight": (256, 128)})
    assert arch.n_layer == 4 and arch.ratios == EXACT.ratios


def test_the_layers_of_the_published_models() -> None:
    for name, counts in (("deepseek-v4-flash", (2, 21, 20)), ("deepseek-v4-pro", (0, 30, 31))):
        arch = preset(name)
        assert isinstance(arch, DeepSeek4)
        assert tuple(map(arch.ratios.count, (0, 4, 128))) == counts
    cut = preset("deepseek-v4-flash", layers=5)
    assert isinstance(cut, DeepSeek4) and cut.ratios == (0, 0, 4, 128, 4) and len(cut.clamp) == 5


def test_ropes_of_layers() -> None:
    """YaRN's factor of the cosines, 1 + 0.1 ln 16, is undone. Plain layers have no scaling."""
    plain = V4_FLASH.attn.rope(V4_FLASH.rope, 0)
    assert (plain.freq_base, plain.freq_scale, plain.ext_factor) == (10000.0, 1.0, 0.0)
    for ratio in (4, 128):
        rope = V4_FLASH.attn.rope(V4_FLASH.rope, ratio)
        assert (rope.freq_base, rope.freq_scale, rope.ext_factor) == (160000.0, 1 / 16, 1.0)
        assert rope.attn_factor * (1 + 0.1 * np.log(16)) == pytest.approx(1)
    unscaled = replace(V4_FLASH.rope, scaling="linear", factor=1.0)
    assert V4_FLASH.attn.rope(unscaled, 4).attn_factor == 1


# -- files that are wrong -----------------------------------------------------------------------


@pytest.mark.parametrize("key", REQUIRED)
def test_required_keys(key: str) -> None:
    with pytest.raises(GGUFError, match=f"'deepseek4.{key}': (is missing|0, must be 1)"):
        read({key: None})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.compress_ratios", np.array([0, 4, 8, 4], np.int32), "8 in layer 2, must be 0"),
        ("attention.compress_ratios", np.array([0, 4], np.int32), "has 2 values, must have one"),
        ("attention.compress_ratios", np.zeros(4, np.float32), "must be int or an array, got"),
        ("attention.head_count_kv", 2, "2, must be 1 because of the one head of keys"),
        ("attention.value_length", 32, "32, must be 64 because of attention.key_length"),
        ("attention.output_group_count", 3, "3, must divide 4 heads"),
        ("rope.dimension_count", 66, "66, must be even and at most 64"),
        ("rope.scaling.attn_factor", 2.0, "2.0, must be 1"),
        ("expert_gating_func", 2, r"2, must be 4 \(the root of softplus\)"),
        ("expert_group_count", 4, "4, must be 1 or absent"),
        ("swiglu_clamp_exp", np.array([1, 1, 1, -1], np.float32), "must be finite and not neg"),
        ("swiglu_clamp_shexp", float("nan"), "must be finite and not negative"),
        ("embedding_length_out", 128, "128, must be 512 because of hyper_connection.count"),
        ("hyper_connection.count", 0, "0, must be 1 to"),
    ],
)  # fmt: skip
def test_wrong_values(key: str, value: Any, message: str) -> None:
    with pytest.raises(GGUFError, match=f"'deepseek4.{key}': .*{message}"):
        read({key: value})


def test_unknown_keys_and_tensors() -> None:
    with pytest.raises(GGUFError, match=r"'deepseek4.engram.size': unknown for architecture"):
        read({"engram.size": 5})
    with pytest.raises(GGUFError, match=r"'blk.0.attn_gate.weight': unknown for architecture"):
        read(tensors={"blk.0.attn_gate.weight": (128, 4)})
    assert read(tensors={"blk.1.exp_probs_b_vl.bias": (8,)}) == EXACT  # for images


@pytest.mark.parametrize("name", tensor_sizes(EXACT))
def test_tensors_of_wrong_sizes_or_none(name: str) -> None:
    ne = tensor_sizes(EXACT)[name]
    with pytest.raises(GGUFError, match=f"'{name}': ne=.* imply"):
        read(tensors={name: (*ne[:-1], ne[-1] + 1)})
    if name != "output.weight":
        with pytest.raises(GGUFError, match=f"tensor '{name}' of ne=.* is missing"):
            read(tensors={name: None})


def test_which_layers_have_which_tensors() -> None:
    names = {il: set(EXACT.layer_tensors(il)) for il in range(4)}
    assert "ffn_gate_tid2eid" in names[0] and "exp_probs_b.bias" not in names[0]
    assert "ffn_gate_tid2eid" not in names[1] and "exp_probs_b.bias" in names[1]
    compressed = {il: sum("compressor" in name for name in names[il]) for il in names}
    assert compressed == {0: 0, 1: 8, 2: 4, 3: 8}
    assert ["indexer.proj" in names[il] for il in names] == [False, True, False, True]


# -- graphs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    synth(path, TINY_V4, dtype="f32")
    return path


def logits(path: Path, n: int = 150, **options: Any) -> NDArray[np.float32]:
    model = load(path, backends=["numpy"], cache_k="f32", cache_i="f32", **options)
    return model.session(n_ctx=160, n_batch=160).forward(TOKENS[:n], "all")


@pytest.fixture(scope="module")
def plain(path: Path) -> NDArray[np.float32]:
    return logits(path)


def changed(
    path: Path, new: Path, keys: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
) -> Path:
    """A copy of a file with other keys and tensors."""
    with gguf.open(path) as file:
        fields = dict(file.fields) | {f"deepseek4.{key}": value for key, value in keys.items()}
        tensors = []
        for name, info in file.tensors.items():
            array = arrays.get(name, file.array(name))
            ne = array.shape[::-1]
            tensors.append(Tensor(name, info.dtype, ne, lambda a=array: [a]))  # type: ignore[misc]
        write(new, fields, tensors)
    return new


def test_the_group_matrices_may_be_stacked(
    path: Path, plain: NDArray[np.float32], tmp_path: Path
) -> None:
    names = [f"blk.{il}.attn_output_a.weight" for il in range(4)]
    with gguf.open(path) as file:
        arrays = {name: np.array(file.array(name)) for name in names}
    flat = {name: a.reshape(-1, a.shape[-1]) for name, a in arrays.items()}
    assert np.array_equal(logits(changed(path, tmp_path / "new.gguf", {}, flat)), plain)


@pytest.mark.parametrize(
    ("key", "value", "first"),
    [
        ("attention.sliding_window", 17, 16),  # the first token that sees one more
        ("attention.indexer.top_k", 9, 35),  # row 8 exists: 9 rows, of which 8 were chosen
        ("swiglu_clamp_exp", 0.5, 0),
        ("swiglu_clamp_shexp", 0.5, 0),
        ("expert_weights_scale", 2.0, 0),
        ("rope.freq_base", 5000.0, 1),
        ("attention.compress_rope_freq_base", 5000.0, 1),
    ],
)
def test_what_a_key_changes(
    path: Path, plain: NDArray[np.float32], tmp_path: Path, key: str, value: Any, first: int
) -> None:
    """The logits from token `first` on, and none before."""
    got = logits(changed(path, tmp_path / "new.gguf", {key: value}, {}))
    differs = np.abs(got - plain).max(1) > 1e-5 * np.abs(plain).max()
    assert int(differs.argmax()) == first and differs[first]


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("blk.0.ffn_gate_tid2eid.weight", 0),
        ("blk.1.attn_sinks.weight", 0),
        ("blk.1.exp_probs_b.bias", 0),
        ("blk.1.attn_compressor_ape.weight", 3),  # the first compressed row of 4 tokens
        ("blk.1.indexer.proj.weight", 35),  # the first token with more rows than it chooses
        ("blk.1.indexer_compressor_norm.weight", 35),
        ("blk.2.attn_compressor_kv.weight", 127),  # the first of 128 tokens
        ("blk.2.hc_attn_base.weight", 0),
        ("output_hc_base.weight", 0),
    ],
)
def test_what_a_tensor_changes(
    path: Path, plain: NDArray[np.float32], tmp_path: Path, name: str, first: int
) -> None:
    rng = np.random.default_rng(1)
    with gguf.open(path) as file:
        array = np.array(file.array(name))
    if array.dtype.kind == "i":
        array = (array + 1) % 8
    else:
        array = array + rng.standard_normal(array.shape).astype(np.float32)
    got = logits(changed(path, tmp_path / "new.gguf", {}, {name: array}))
    differs = np.abs(got - plain).max(1) > 1e-5 * np.abs(plain).max()
    late = 8 if "indexer" in name else 0  # the first choice may be the same
    assert differs.any() and first <= int(differs.argmax()) <= first + late


def test_experts_of_a_hash_layer_depend_on_the_token_only(tmp_path: Path) -> None:
    """If all layers are hashed, the last one looks up the tokens of the outputs."""
    arch = replace(TINY_V4, n_hash=4)
    synth(tmp_path / "hashed.gguf", arch, dtype="f32")
    model = load(tmp_path / "hashed.gguf", backends=["numpy"], cache_k="f32", cache_i="f32")
    every = model.session(40, 40).forward(TOKENS[:30], "all")
    last = model.session(40, 40).forward(TOKENS[:30])
    assert np.abs(every[-1] - last[0]).max() < 1e-5 * np.abs(last).max()


def test_unfused_graphs_give_the_same_logits(path: Path, plain: NDArray[np.float32]) -> None:
    assert np.abs(logits(path, fused=False) - plain).max() < 1e-5 * np.abs(plain).max()


# -- without flash attention --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cache", "most"), [("f32", 2e-6), ("f16", 1e-4), ("bf16", 2e-4), ("q8_0", 5e-3)]
)
def test_scores_and_a_softmax_give_the_same_logits(path: Path, cache: str, most: float) -> None:
    """In every kind of layer: the window alone, all compressed rows, and chosen ones. With q8_0 the
    indexer chooses other rows for a few tokens."""
    types = {"cache_k": cache, "cache_i": "f32"}
    ways = [load(path, backends=["numpy"], flash=flash, **types) for flash in (True, False)]
    flash, scores = (m.session(n_ctx=160, n_batch=160).forward(TOKENS[:150], "all") for m in ways)
    errors = np.abs(scores - flash).max(axis=1) / np.abs(flash).max()
    assert 0 < np.median(errors) < most


def test_the_budget_cuts_scores(path: Path, plain: NDArray[np.float32]) -> None:
    peaks = []
    for amb in (None, 1.0):
        options = {"cache_k": "f32", "cache_i": "f32", "flash": False, "amb": amb}
        session = load(path, backends=["numpy"], **options).session(n_ctx=160, n_batch=160)
        logits = session.forward(TOKENS[:150], "all")
        assert np.abs(logits - plain).max() < 1e-5 * np.abs(plain).max()
        peaks.append(session.memory().score_peak)
    assert peaks[1] <= 2**20 < peaks[0]

"""All forms of the attention layer against transformers and against float64."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

import pyggml as gg
from pyggml import gguf, quants
from pyggml.dtypes import TYPES
from pyggml.models.config import DeepSeek2Config
from pyggml.models.deepseek2 import AttentionOptions, Cache, Layer, attention, temperature
from pyggml.models.feed_forward import layer_output
from pyggml.models.presets import PRESETS, config_fields, random_tensors, synth
from pyggml.models.tensors import check_tensors, tensor_sizes
from pyggml.parity.tolerance import relative_error
from tests.fixtures.case import HERE
from tests.reference.deepseek import attention_f64

FORMS = [
    ("standard", True),
    ("standard", False),
    ("latent", True),
    ("latent", False),
    ("expanded", True),
]
IDS = ["standard-fa", "standard", "latent-fa", "latent", "expanded-fa"]
all_forms = pytest.mark.parametrize(("form", "flash"), FORMS, ids=IDS)
both_layouts = pytest.mark.parametrize("kv_b", ["joined", "split"])
#: Bound of f32 sums against float64; measured errors are 5e-7 to 1e-6.
EXACT = 1e-5

Array = np.ndarray[Any, Any]


@dataclass
class Case:
    """A layer, tokens, and the layer's output for them."""

    layer: Layer
    x: Array
    want: Array
    first_position: int = 0

    def plan(
        self,
        options: AttentionOptions,
        n_tokens: int,
        n_kv: int,
        store: gg.Store,
        n_ctx: int | None = None,
        amb: float | None = None,
        ids: str = "i32",
    ) -> gg.Plan:
        config = self.layer.config
        x = gg.input("x", ne=(config.n_embd, n_tokens))
        pos = gg.input("pos", "i32", ne=(n_tokens,))
        seen = gg.input("seen", "i32", ne=(n_tokens,))
        rows = gg.input("ids", ids, ne=(n_tokens,))
        cache = Cache.of(config, options, n_ctx or n_kv, self.layer.il)
        mask = gg.causal_mask(seen, n_kv=n_kv)
        y = attention(x, pos, rows, mask, self.layer, cache, options)
        return gg.compile({"y": y}, store=store, amb=amb)

    def feed(self, plan: gg.Plan, start: int, stop: int) -> Array:
        rows = np.arange(start, stop)
        return plan.run(x=self.x[start:stop], pos=rows + self.first_position, seen=rows, ids=rows)[
            "y"
        ]

    def run(
        self,
        options: AttentionOptions,
        parts: Sequence[int],
        n_kv: int = 32,
        store: gg.Store | None = None,
        **more: Any,
    ) -> Array:
        """The layer's output for consecutive parts of the tokens; one run for each part."""
        store = store or gg.Store()
        plans = {n: self.plan(options, n, n_kv, store, **more) for n in set(parts)}
        ends = np.cumsum(parts)
        return np.concatenate([self.feed(plans[n], end - n, end) for n, end in zip(parts, ends)])


def split(weights: dict[str, Array], n_head: int, d_nope: int) -> dict[str, Array]:
    """attn_kv_b as attn_k_b and attn_v_b."""
    weights = dict(weights)
    joined = weights.pop("attn_kv_b")
    by_head = joined.reshape(n_head, -1, joined.shape[-1])
    weights["attn_k_b"] = np.ascontiguousarray(by_head[:, :d_nope].swapaxes(1, 2))
    weights["attn_v_b"] = np.ascontiguousarray(by_head[:, d_nope:])
    return weights


def sizes_of(config: DeepSeek2Config) -> dict[str, Any]:
    """The keywords of attention_f64."""
    return {
        "n_head": config.n_head,
        "qk_nope": config.d_nope,
        "qk_rope": config.n_rot,
        "v_dim": config.d_v,
        "kv_lora": config.kv_lora_rank,
        "eps": config.rms_eps,
        "kq_scale": config.kq_scale,
        "freq_base": config.rope_freq_base,
        "freq_scale": config.freq_scale,
        "ext_factor": config.ext_factor,
        "attn_factor": config.rope_attn_factor,
        "n_ctx_orig": config.n_ctx_orig,
        "beta_fast": config.yarn_beta_fast,
        "beta_slow": config.yarn_beta_slow,
        "temperature_scale": config.temperature_scale,
        "temperature_length": config.temperature_length,
    }


# -- transformers -------------------------------------------------------------------------------

#: Fixture -> q_lora_rank and rope scaling, as a GGUF file has them.
FIXTURES: dict[str, dict[str, Any]] = {
    "v2_lite": {"q_lora_rank": None},
    "v2": {"q_lora_rank": 20, "rope_scaling": "yarn", "rope_factor": 40.0, "yarn_log_mul": 0.0707},
    "v3": {"q_lora_rank": 24, "rope_scaling": "yarn", "rope_factor": 8.0, "yarn_log_mul": 0.1},
    "v3_plain": {"q_lora_rank": None},
}


def fixture(name: str, kv_b: str) -> Case:
    with np.load(HERE / f"deepseek_{name}.npz") as file:
        arrays = dict(file)
    config = replace(
        PRESETS["tiny"],
        n_embd=40,
        n_head=4,
        kv_lora_rank=24,
        d_nope=12,
        n_rot=16,
        d_v=10,
        n_ctx_orig=4096,
        **{"rope_scaling": "none", "rope_factor": 1.0, "yarn_log_mul": 0.0} | FIXTURES[name],
    )
    for key, value in json.loads(str(arrays["sizes"])).items():
        if key in sizes_of(config):
            assert sizes_of(config)[key] == pytest.approx(value, rel=1e-12), key
    weights = {
        key.removesuffix(".weight"): array
        for key, array in arrays.items()
        if key.endswith(".weight")
    }
    weights = split(weights, 4, 12) if kv_b == "split" else weights
    layer = Layer(config, {key: gg.constant(array, name=key) for key, array in weights.items()})
    return Case(layer, arrays["x"].astype(np.float32), arrays["out"], arrays["positions"][0])


@all_forms
@both_layouts
@pytest.mark.parametrize("name", FIXTURES)
def test_a_prompt_and_three_tokens_match_transformers(
    name: str, kv_b: str, form: str, flash: bool
) -> None:
    case = fixture(name, kv_b)
    got = case.run(AttentionOptions(form, flash, "f32"), [11, 1, 1, 1], n_kv=16)
    assert relative_error(got[:11], case.want[:11]) < EXACT
    assert relative_error(got[11:], case.want[11:]) < EXACT


# -- random layers ------------------------------------------------------------------------------


def random_case(
    n_head: int,
    kv_b: str,
    type: str = "f32",
    n_tokens: int = 24,
    q_lora: int | None = None,
    factors: bool = False,
    **changes: Any,
) -> Case:
    """A layer with V3's YaRN, weights of `type`, and sizes that are multiples of 32.

    `factors` gives every product a factor and divides its weights by it.
    """
    config = replace(
        PRESETS["tiny"],
        n_embd=96,
        n_head=n_head,
        q_lora_rank=q_lora,
        kv_lora_rank=64,
        d_nope=32,
        n_rot=32,
        d_v=64,
        kv_b=kv_b,
        **changes,
    )
    rng = np.random.default_rng(n_head)
    shapes = {
        "attn_kv_a_mqa": (96, 96),
        "attn_kv_b": (n_head * 96, 64),
        "attn_output": (96, n_head * 64),
    }
    if q_lora is None:
        shapes["attn_q"] = (n_head * 64, 96)
    else:
        shapes |= {"attn_q_a": (q_lora, 96), "attn_q_b": (n_head * 64, q_lora)}
    weights = {k: rng.standard_normal(s) * s[-1] ** -0.5 for k, s in shapes.items()}
    weights = split(weights, n_head, 32) if kv_b == "split" else weights
    scales = {}
    if factors:
        scales = {f"{k}.scale": np.float32([2.0 ** -(9 + i)]) for i, k in enumerate(weights)}
        weights = {k: w / scales[f"{k}.scale"] for k, w in weights.items()}
    nodes = {k: gg.constant(w.astype("f4"), dtype=type, name=k) for k, w in weights.items()}
    if type == "q8_0":
        raw = {k: np.asarray(gg.ops.leaf.data_of(node)) for k, node in nodes.items()}
        weights = {k: dequantize(r, GGMLQuantizationType.Q8_0) for k, r in raw.items()}
    elif type != "f32":
        weights = {k: w.astype(np.float16) for k, w in weights.items()}
    norms = {"attn_kv_a_norm": 64} | ({"attn_q_a_norm": q_lora} if q_lora else {})
    for key, n in norms.items():
        weights[key] = 1 + 0.3 * rng.standard_normal(n).astype("f4")
        nodes[key] = gg.constant(weights[key], name=key)
    nodes |= {k: gg.constant(w, name=k) for k, w in scales.items()}
    x = rng.standard_normal((n_tokens, 96)).astype("f4")
    want = attention_f64(
        {f"{k}.weight": w for k, w in weights.items()} | scales,
        x,
        np.arange(n_tokens),
        **sizes_of(config),
    )
    return Case(Layer(config, nodes, il=3), x, want)


@all_forms
@both_layouts
@pytest.mark.parametrize("n_head", [1, 3, 7])
def test_odd_head_counts(n_head: int, kv_b: str, form: str, flash: bool) -> None:
    case = random_case(n_head, kv_b)
    got = case.run(AttentionOptions(form, flash, "f32"), [20, 1, 1, 1, 1])
    assert relative_error(got, case.want) < EXACT


@all_forms
@both_layouts
@pytest.mark.parametrize(
    ("cache_type", "bound"),
    [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 2e-2), ("q4_0", 2e-1)],
)
def test_cache_types(cache_type: str, bound: float, kv_b: str, form: str, flash: bool) -> None:
    case = random_case(3, kv_b, q_lora=48)
    got = case.run(AttentionOptions(form, flash, cache_type), [20, 1, 1, 1, 1])
    error = relative_error(got, case.want)
    assert bound / 100 < error < bound


@all_forms
@both_layouts
@pytest.mark.parametrize("type", ["f16", "q8_0"])
def test_weights_that_the_graph_must_transpose(
    type: str, kv_b: str, form: str, flash: bool
) -> None:
    case = random_case(3, kv_b, type)
    got = case.run(AttentionOptions(form, flash, "f32"), [20, 1, 1, 1, 1])
    assert relative_error(got, case.want) < (EXACT if type == "f16" else 1e-3)


@all_forms
@pytest.mark.parametrize(("cache_type", "bound"), [("f32", EXACT), ("f16", 1e-4)])
def test_two_ubatches_are_one_prompt(cache_type: str, bound: float, form: str, flash: bool) -> None:
    """Up to the order of sums, which occasionally rounds to the other f16."""
    case = random_case(3, "joined")
    options = AttentionOptions(form, flash, cache_type)
    whole, halves = gg.Store(), gg.Store()
    prompt = case.run(options, [24], store=whole)
    ubatches = case.run(options, [13, 11], store=halves)
    assert relative_error(ubatches, prompt) < bound
    names = ["cache_k_l3", "cache_v_l3"] if form == "standard" else ["cache_kv_l3"]
    for name in names:
        assert np.any(whole.read(name))
        np.testing.assert_allclose(halves.read(name), whole.read(name), rtol=2e-3, atol=1e-6)


def test_an_expanded_prompt_continues_with_latent_decoding() -> None:
    case = random_case(4, "split")
    store = gg.Store()
    prompt = case.plan(AttentionOptions("expanded", True, "f32"), 20, 32, store)
    single = case.plan(AttentionOptions("latent", True, "f32"), 1, 32, store)
    got = [case.feed(prompt, 0, 20)] + [case.feed(single, i, i + 1) for i in range(20, 24)]
    assert relative_error(np.concatenate(got), case.want) < EXACT
    weights = {p: {n for n in p.graph.nodes if n.op.name == "constant"} for p in (prompt, single)}
    assert weights[prompt] == weights[single] == set(case.layer.weights.values())


@all_forms
def test_rows_past_the_tokens_change_nothing(form: str, flash: bool) -> None:
    """A larger n_kv, a larger cache and garbage in unwritten rows leave the result as it is."""
    case = random_case(2, "joined")
    options = AttentionOptions(form, flash, "f16")
    small = case.run(options, [24], n_kv=24)
    store = gg.Store()
    plan = case.plan(options, 24, 40, store, n_ctx=64, ids="i64").bind()
    for name in ["cache_k_l3", "cache_v_l3"] if form == "standard" else ["cache_kv_l3"]:
        store.write(name, np.full(store.read(name).shape, 1000.0, np.float32))
    assert relative_error(case.feed(plan, 0, 24), small) < EXACT


@all_forms
@both_layouts
@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_within_a_budget_the_result_is_the_same(
    cache_type: str, kv_b: str, form: str, flash: bool
) -> None:
    case = random_case(5, kv_b, n_tokens=40)
    options = AttentionOptions(form, flash, cache_type)
    plain = case.plan(options, 40, 1024, gg.Store())
    whole = case.feed(plain, 0, 40)
    peak = plain.memory.score_peak
    if flash and form != "expanded":
        assert peak == 0
        return
    with pytest.raises(gg.BudgetError) as caught:
        case.plan(options, 40, 1024, gg.Store(), amb=1 / 2**20)
    least = int(caught.value.least * 2**20)
    assert least < peak
    # BLAS may round pieces of a product differently in the last bit of f32. If K and V are expanded
    # as f16, they may then round to another f16: errors of 42 plans were up to 1.9e-5.
    bound = 4e-5 if form == "expanded" and cache_type == "f16" else EXACT
    for amb in (least, (least + peak) // 2, peak - 1):
        plan = case.plan(options, 40, 1024, gg.Store(), amb=amb / 2**20)
        assert any(step.loop is not None for step in plan.steps)
        assert plan.memory.score_peak <= amb
        assert relative_error(case.feed(plan, 0, 40), whole) < bound


@all_forms
def test_a_run_allocates_almost_nothing(form: str, flash: bool) -> None:
    case = random_case(4, "split", "q8_0", n_tokens=64)
    plan = case.plan(AttentionOptions(form, flash, "q8_0"), 64, 256, gg.Store())
    case.feed(plan, 0, 64)
    tracemalloc.start()
    case.feed(plan, 0, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 1024 + 2 * 64 * 96 * 4  # copies of the output and of the inputs


@all_forms
@both_layouts
@pytest.mark.parametrize("cache_type", ["f32", "f16"])
def test_products_of_weights_with_factors(
    cache_type: str, kv_b: str, form: str, flash: bool
) -> None:
    """The weights are 2^9 to 2^15 times as large, so a product without its factor exceeds f16."""
    case = random_case(3, kv_b, q_lora=48, factors=True)
    got = case.run(AttentionOptions(form, flash, cache_type), [20, 1, 1, 1, 1])
    assert relative_error(got, case.want) < (EXACT if cache_type == "f32" else 1e-3)


@all_forms
@both_layouts
@pytest.mark.parametrize("length", [1, 5, 7, 24])
def test_queries_have_a_temperature(length: int, kv_b: str, form: str, flash: bool) -> None:
    """It grows at every multiple of the length. Without it, results differ visibly."""
    case = random_case(3, kv_b, temperature_scale=0.9, temperature_length=length)
    got = case.run(AttentionOptions(form, flash, "f32"), [20, 1, 1, 1, 1])
    assert relative_error(got, case.want) < EXACT
    plain = random_case(3, kv_b)
    assert (relative_error(plain.want, case.want) > 100 * EXACT) == (length < 24)


@pytest.mark.parametrize("length", [1, 3, 10, 8192, 16384])
def test_a_temperature_is_exact_around_every_multiple(length: int) -> None:
    """A rounded quotient could land on the wrong side there. Negative positions count as 0."""
    rng = np.random.default_rng(length)
    periods = rng.integers(0, 2**24 // length, 2000)
    pos = np.concatenate([periods * length + d for d in (-1, 0, 1)]).astype(np.int32)
    config = replace(PRESETS["tiny"], temperature_scale=0.1, temperature_length=length)
    t = temperature(config, gg.input("pos", "i32", ne=(len(pos),)))
    got = gg.compile({"t": t}).run(pos=pos)["t"].reshape(-1)
    valid = np.maximum(pos.astype(np.int64), 0)
    np.testing.assert_allclose(got, 1 + 0.1 * np.log1p(valid // length), rtol=3e-7)


@all_forms
@both_layouts
@pytest.mark.parametrize("preset", PRESETS)
def test_every_label_names_one_tensor(preset: str, kv_b: str, form: str, flash: bool) -> None:
    """Each preset, with small sizes: `*` observes all labels, and an ambiguous one is an error."""
    config = replace(
        PRESETS[preset], n_head=2, n_embd=64, n_vocab=32, kv_lora_rank=64, d_nope=32, n_rot=32,
        d_v=32, n_ff=64, n_ff_exp=32, kv_b=kv_b,
    )  # fmt: skip
    pos, x = gg.input("pos", "i32", ne=(4,)), gg.input("x", ne=(64, 4))
    mask, options = gg.causal_mask(pos, n_kv=16), AttentionOptions(form, flash, "f16")
    for il in (0, config.n_layer_dense):
        weights = {
            name.removeprefix(f"blk.{il}.").removesuffix(".weight"): gg.constant(
                np.ones(ne[::-1], np.float32), name=name
            )
            for name, ne in tensor_sizes(config).items()
            if name.startswith(f"blk.{il}.")
        }
        cache = Cache.of(config, options, 16, il)
        y = layer_output(x, pos, pos, mask, Layer(config, weights, il), cache, options)
        plan = gg.compile({"y": y}, observe=["*"])
        observed = plan.run(x=np.ones((4, 64), np.float32), pos=np.arange(4))
        assert {f"Kcur-{il}", f"Qcur-{il}", f"kqv_out-{il}"} <= set(observed)


# -- files, names, errors -----------------------------------------------------------------------


@all_forms
@both_layouts
@pytest.mark.parametrize("q_lora", [None, 96])
def test_a_layer_of_a_file(
    tmp_path: Path, q_lora: int | None, kv_b: str, form: str, flash: bool
) -> None:
    path = tmp_path / "tiny.gguf"
    synth(path, replace(PRESETS["tiny"], kv_b=kv_b, q_lora_rank=q_lora), type="f16")
    with gguf.open(path) as file:
        config = DeepSeek2Config.from_gguf(file.fields, file.tensors)
        layer = Layer.of(file, config, 2)
        weights = {
            f"{key}.weight": np.asarray(file.array(f"blk.2.{key}.weight"), np.float64)
            for key in layer.weights
            if key.startswith("attn_")
        }
    x = np.random.default_rng(0).standard_normal((12, config.n_embd)).astype("f4")
    want = attention_f64(weights, x, np.arange(12), **sizes_of(config))
    got = Case(layer, x, want).run(AttentionOptions(form, flash, "f32"), [10, 1, 1])
    assert relative_error(got, want) < EXACT


@all_forms
@pytest.mark.parametrize("type", ["f16", "q8_0", "iq4_nl"])
def test_a_layer_with_both_layouts_and_stacked_heads(
    tmp_path: Path, type: str, form: str, flash: bool
) -> None:
    """ik_llama.cpp writes attn_k_b and attn_v_b with two dimensions, and attn_kv_b too."""
    joined = replace(PRESETS["tiny"], n_layer=1, kv_b="joined", n_layer_dense=1)
    both = {t.name: t for t in random_tensors(joined, TYPES[type], 0)}
    for tensor in random_tensors(replace(joined, kv_b="split"), TYPES[type], 0):
        if tensor.name.endswith(("attn_k_b.weight", "attn_v_b.weight")):
            ne = tensor.ne
            both[tensor.name] = replace(tensor, ne=(ne[0], ne[1] * ne[2]))
    x = np.random.default_rng(0).standard_normal((12, joined.n_embd)).astype("f4")
    for omission in ("nothing", "attn_kv_b"):
        path = tmp_path / f"{omission}.gguf"
        gguf.write(path, config_fields(joined), [t for n, t in both.items() if omission not in n])
        with gguf.open(path) as file:
            config = DeepSeek2Config.from_gguf(file.fields, file.tensors)
            check_tensors(config, file.tensors)
            layer = Layer.of(file, config)
            weights = {
                name.removeprefix("blk.0."): quants.decode_rows(info.dtype, file.array(name))
                for name, info in file.tensors.items()
                if "attn_" in name
            }
        assert config.kv_b == "split"
        assert layer.weights["attn_k_b"].ne == (32, 64, 4, 1)
        assert layer.weights["attn_v_b"].ne == (64, 32, 4, 1)
        if form == "latent" or omission == "attn_kv_b":  # the layer uses attn_k_b and attn_v_b
            weights.pop("attn_kv_b.weight", None)
            for key in ("attn_k_b.weight", "attn_v_b.weight"):
                weights[key] = weights[key].reshape(4, -1, weights[key].shape[-1])
        want = attention_f64(weights, x, np.arange(12), **sizes_of(config))
        got = Case(layer, x, want).run(AttentionOptions(form, flash, "f32"), [10, 1, 1])
        assert relative_error(got, want) < (EXACT if type == "f16" else 1e-3)
    wrong = replace(both["blk.0.attn_k_b.weight"], ne=(32, 255))
    tensors = [*(both | {wrong.name: wrong}).values()]
    gguf.write(path, config_fields(joined), tensors, header_only=True)
    os.truncate(path, 64 << 20)  # the weights are zeros
    with gguf.open(path) as file:
        with pytest.raises(gg.GGUFError, match=r"attn_k_b.*\[32, 255\]"):
            check_tensors(config, file.tensors)
        with pytest.raises(gg.GGUFError, match="255 rows do not divide into 4 heads"):
            Layer.of(file, config)


def test_intermediate_tensors_have_the_names_of_llama_cpp() -> None:
    case = random_case(2, "joined")
    for form, flash in FORMS:
        plan = case.plan(AttentionOptions(form, flash), 4, 32, gg.Store())
        labels = {label for node in plan.graph.nodes for label in gg.labels(node)}
        expected = {"q-3", "kv_cmpr-3", "k_pe-3", "Qcur-3", "Kcur-3", "kqv-3", "kqv_out-3"}
        assert expected | ({"kq-3", "kq_soft_max-3"} if not flash else set()) <= labels
        states = {n.attrs["name"] for n in plan.graph.nodes if n.op.name == "state"}
        assert states == ({"cache_k_l3", "cache_v_l3"} if form == "standard" else {"cache_kv_l3"})


def test_cache_rows_of_the_published_models() -> None:
    for name, heads in (("deepseek-v2-lite", 16), ("deepseek-v3", 128)):
        standard = Cache.of(PRESETS[name], AttentionOptions("standard"), 4096)
        assert standard.v is not None
        assert (standard.k.ne, standard.v.ne) == ((192, 4096, heads, 1), (128, 4096, heads, 1))
        latent = Cache.of(PRESETS[name], AttentionOptions(cache_type="q8_0"), 4096)
        assert (latent.k.ne, latent.v) == ((576, 4096, 1, 1), None)


def test_options_that_do_not_exist() -> None:
    with pytest.raises(gg.UnknownNameError, match="no attention form 'mla'"):
        AttentionOptions("mla")
    with pytest.raises(gg.ShapeError, match="needs flash attention"):
        AttentionOptions("expanded", flash=False)
    with pytest.raises(gg.DTypeError, match="unknown type 'f7'"):
        AttentionOptions(cache_type="f7")


@pytest.mark.parametrize(("other", "form"), [("standard", "latent"), ("latent", "standard")])
def test_a_cache_of_another_form(other: str, form: str) -> None:
    case = random_case(2, "joined")
    pos = gg.input("pos", "i32", ne=(4,))
    cache = Cache.of(case.layer.config, AttentionOptions(other), 32)
    with pytest.raises(gg.GraphError, match=f"form '{form}'"):
        attention(
            gg.input("x", ne=(96, 4)),
            pos,
            pos,
            gg.causal_mask(pos, n_kv=32),
            case.layer,
            cache,
            AttentionOptions(form),
        )


def test_blocks_that_do_not_divide_the_rows() -> None:
    case = fixture("v3", "joined")
    with pytest.raises(gg.ShapeError, match="q8_0"):
        Cache.of(case.layer.config, AttentionOptions("latent", True, "q8_0"), 16)


def test_ids_past_the_cache() -> None:
    case = random_case(2, "joined")
    plan = case.plan(AttentionOptions(), 2, 16, gg.Store())
    with pytest.raises(gg.IdError, match="past the end"):
        plan.run(x=case.x[:2], pos=[0, 1], seen=[0, 1], ids=[15, 16])


def test_layers_and_weights_that_do_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    synth(path, PRESETS["tiny"], type="f16")
    with gguf.open(path) as file:
        config = DeepSeek2Config.from_gguf(file.fields, file.tensors)
        for il in (-1, 3):
            with pytest.raises(gg.UnknownNameError, match=f"no layer {il}: the file has 3"):
                Layer.of(file, config, il)
        with pytest.raises(gg.UnknownNameError, match="attn_q"):
            Layer.of(file, config).weights["attn_q"]

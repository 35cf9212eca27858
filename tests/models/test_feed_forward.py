"""The feed-forward half of a layer, and the whole layer, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml.models.config import DeepSeek2Config
from pyggml.models.deepseek2 import AttentionOptions, Cache, Layer
from pyggml.models.feed_forward import LEAST_SUM, feed_forward, layer_output, route
from pyggml.models.presets import PRESETS
from pyggml.models.tensors import tensor_sizes
from pyggml.parity.tolerance import relative_error
from tests.reference.deepseek_layer import feed_forward_f64, layer_f64, route_f64

#: Bound of f32 sums against float64; measured errors are 1e-7 to 4e-7.
EXACT = 2e-6
N_TOKENS = 33

Array = np.ndarray[Any, Any]
Weights = dict[str, Array]

V2 = replace(
    PRESETS["tiny"], gating="softmax", weights_norm=False, weights_scale=1.0, n_group=1,
    n_group_used=1, n_expert=16, n_expert_used=3, q_lora_rank=None,
)  # fmt: skip
V3 = replace(PRESETS["tiny"], n_expert=16, n_expert_used=3)
CONFIGS = {
    "v2": V2,
    "v2-norm": replace(V2, weights_norm=True),
    "v2-scale": replace(V2, weights_scale=16.0),
    "v2-scale-0-is-none": replace(V2, weights_scale=0.0),
    "v2-groups": replace(V2, n_group=8, n_group_used=3),
    "v2-no-shared": replace(V2, n_expert_shared=0),
    "v2-all": replace(V2, n_expert_used=16),
    "v3": V3,
    "v3-no-norm": replace(V3, weights_norm=False),
    "v3-no-groups": replace(V3, n_group=1, n_group_used=1),
    "v3-no-shared": replace(V3, n_expert_shared=0),
    "v3-two-shared": replace(V3, n_expert_shared=2),
}
all_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def random_weights(config: DeepSeek2Config, il: int = 1, bias: bool = True) -> Weights:
    """The weights of a layer (0 is dense) by their names in a file, in NumPy shape, f32."""
    rng = np.random.default_rng(il)
    weights: Weights = {}
    for name, ne in tensor_sizes(config).items():
        key = name.removeprefix(f"blk.{il}.")
        values = rng.standard_normal(ne[::-1], dtype=np.float32)
        if name.endswith("norm.weight"):
            weights[key] = 1 + 0.1 * values
        elif key == "exp_probs_b.bias":
            weights[key] = 0.3 * values
        elif key != name:
            weights[key] = values * ne[0] ** -0.5
    if not bias:
        weights.pop("exp_probs_b.bias", None)
    return weights


def layer_of(config: DeepSeek2Config, weights: Weights, il: int = 1) -> Layer:
    nodes = {
        key.removesuffix(".weight"): gg.constant(array, name=f"blk.{il}.{key}")
        for key, array in weights.items()
    }
    return Layer(config, nodes, il)


def tokens(config: DeepSeek2Config, n: int = N_TOKENS) -> Array:
    return np.random.default_rng(7).standard_normal((n, config.n_embd), dtype=np.float32)


def routing_of(config: DeepSeek2Config) -> dict[str, Any]:
    """The keywords of route_f64."""
    return {
        "n_expert_used": config.n_expert_used,
        "gating": config.gating,
        "weights_norm": config.weights_norm,
        "weights_scale": config.weights_scale or 1.0,
        "n_group": config.n_group,
        "n_group_used": config.n_group_used,
    }


def run(config: DeepSeek2Config, weights: Weights, x: Array, *, fused: bool = True) -> Array:
    node = gg.input("x", ne=(config.n_embd, len(x)))
    y = feed_forward(node, layer_of(config, weights), fused=fused)
    return gg.compile({"y": y}).run(x=x)["y"]


@all_configs
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_experts_and_their_weights(config: DeepSeek2Config, bias: bool) -> None:
    weights, x = random_weights(config, bias=bias), tokens(config)
    if bias and config.gating == "softmax":
        weights["exp_probs_b.bias"] = np.linspace(-0.1, 0.1, config.n_expert, dtype=np.float32)
    ids, shares = route(gg.input("x", ne=(config.n_embd, N_TOKENS)), layer_of(config, weights))
    got = gg.compile({"ids": ids, "weights": shares}).run(x=x)
    want = route_f64(weights, x, **routing_of(config))
    assert want.margin.min() > 1e-5  # closer scores would be ties in f32
    np.testing.assert_array_equal(got["ids"], want.ids)
    assert got["weights"].shape == (N_TOKENS, config.n_expert_used, 1)
    assert relative_error(got["weights"][..., 0], want.weights) < EXACT


@all_configs
@pytest.mark.parametrize("n_tokens", [1, N_TOKENS])
def test_feed_forward_matches_float64(config: DeepSeek2Config, n_tokens: int) -> None:
    weights, x = random_weights(config), tokens(config, n_tokens)
    want = feed_forward_f64(weights, x, route_f64(weights, x, **routing_of(config)))
    fused, plain = (run(config, weights, x, fused=fused) for fused in (True, False))
    assert relative_error(fused, want) < EXACT
    assert relative_error(plain, fused) < 1e-6


def test_a_dense_layer() -> None:
    config = PRESETS["tiny"]
    weights, x = random_weights(config, 0), tokens(config)
    assert "ffn_gate_inp.weight" not in weights
    fused, plain = (run(config, weights, x, fused=fused) for fused in (True, False))
    assert relative_error(fused, feed_forward_f64(weights, x)) < EXACT
    assert relative_error(plain, fused) < 1e-6


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("il", [0, 1], ids=["dense", "experts"])
@pytest.mark.parametrize(
    "scaled", ["gate", "up", "down", "inp", "all"], ids=lambda name: f"scaled-{name}"
)
def test_products_of_weights_with_factors(scaled: str, il: int, fused: bool) -> None:
    """One factor for a matrix, one per expert for experts; on one weight or on all."""
    weights, x = random_weights(V3, il), tokens(V3)
    rng = np.random.default_rng(5)
    for key in [k for k in weights if k.startswith("ffn_") and "norm" not in k]:
        if scaled in (*key.removesuffix(".weight").split("_"), "all"):
            n = V3.n_expert if "_exps" in key else 1
            weights[key.replace(".weight", ".scale")] = rng.uniform(0.2, 3, n).astype("f4")
    assert_like_float64(weights, x, il, fused)


def assert_like_float64(weights: Weights, x: Array, il: int, fused: bool = True) -> None:
    routing = route_f64(weights, x, **routing_of(V3)) if il else None
    want = feed_forward_f64(weights, x, routing)
    node = gg.input("x", ne=(V3.n_embd, len(x)))
    y = feed_forward(node, layer_of(V3, weights, il), fused=fused)
    got = gg.compile({"y": y}).run(x=x)["y"]
    assert relative_error(got, want) < EXACT
    bare = {key: w for key, w in weights.items() if not key.endswith(".scale")}
    if len(bare) < len(weights):
        routing = route_f64(bare, x, **routing_of(V3)) if il else None
        assert relative_error(feed_forward_f64(bare, x, routing), want) > 0.05


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("factors", [False, True], ids=["", "factors"])
@pytest.mark.parametrize("n_tokens", [1, N_TOKENS])
def test_gate_and_up_of_experts_as_one_tensor(n_tokens: int, factors: bool, fused: bool) -> None:
    weights, x = random_weights(V3), tokens(V3, n_tokens)
    separate = feed_forward_f64(weights, x, route_f64(weights, x, **routing_of(V3)))
    parts = [weights.pop(f"ffn_{part}_exps.weight") for part in ("gate", "up")]
    weights["ffn_gate_up_exps.weight"] = np.concatenate(parts, axis=1)
    if factors:
        weights["ffn_gate_up_exps.scale"] = np.linspace(0.5, 3, V3.n_expert, dtype="f4")
    else:
        want = feed_forward_f64(weights, x, route_f64(weights, x, **routing_of(V3)))
        np.testing.assert_allclose(want, separate, rtol=1e-12)
    assert_like_float64(weights, x, 1, fused)


def test_shared_experts_are_added() -> None:
    """Together they are one dense net, added to the routed experts."""
    weights, x = random_weights(V3), tokens(V3)
    shared = {key.replace("_shexp", ""): w for key, w in weights.items() if "_shexp" in key}
    others = {key: w for key, w in weights.items() if "_shexp" not in key}
    sum_ = run(V3, others, x) + run(V3, shared, x)
    assert relative_error(run(V3, weights, x), sum_) < EXACT


def test_a_bias_affects_the_choice_but_not_the_weights() -> None:
    config = replace(V3, n_group=1, n_group_used=1, weights_norm=False, weights_scale=0.0)
    weights, x = random_weights(config), tokens(config)
    bias = np.zeros(16, np.float32)
    bias[[2, 5, 11]] = 3, 5, 4  # larger than any sigmoid
    weights["exp_probs_b.bias"] = bias
    ids, shares = route(gg.input("x", ne=(config.n_embd, N_TOKENS)), layer_of(config, weights))
    got = gg.compile({"ids": ids, "weights": shares}).run(x=x)
    assert (got["ids"] == [5, 11, 2]).all()
    p = 1 / (1 + np.exp(-x.astype("f8") @ weights["ffn_gate_inp.weight"].T.astype("f8")))
    assert relative_error(got["weights"][..., 0], p[:, [5, 11, 2]]) < EXACT


def test_weights_with_a_tiny_sum_are_divided_by_the_lower_limit() -> None:
    config = replace(V3, n_group=1, n_group_used=1, weights_scale=0.0)
    x = np.ones((2, config.n_embd), np.float32)
    weights = random_weights(config, bias=False)
    weights["ffn_gate_inp.weight"] = np.full((16, config.n_embd), -20 / config.n_embd, "f4")
    _, shares = route(gg.input("x", ne=(config.n_embd, 2)), layer_of(config, weights))
    got = gg.compile({"weights": shares}).run(x=x)["weights"]
    np.testing.assert_allclose(got, 1 / (1 + np.exp(20.0)) / LEAST_SUM, rtol=1e-4)


@pytest.mark.parametrize("config", [V2, V3], ids=["v2", "v3"])
@pytest.mark.parametrize("il", [0, 1], ids=["dense", "experts"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_a_whole_layer(config: DeepSeek2Config, il: int, fused: bool) -> None:
    """A prompt, then two tokens from the cache; float64 chooses the same experts."""
    weights, x = random_weights(config, il), tokens(config)
    layer, options, store = (
        layer_of(config, weights, il),
        AttentionOptions("latent", True, "f32"),
        gg.Store(),
    )
    cache = Cache.of(config, options, 48, il)

    def plan(n: int) -> gg.Plan:
        node, pos = gg.input("x", ne=(config.n_embd, n)), gg.input("pos", "i32", ne=(n,))
        mask = gg.causal_mask(pos, n_kv=48)
        y = layer_output(node, pos, pos, mask, layer, cache, options, fused=fused)
        observe = [f"ffn_moe_topk-{il}"] if il else []
        return gg.compile({"y": y}, store=store, observe=observe)

    pos, past = np.arange(N_TOKENS), N_TOKENS - 2
    runs = [plan(past).run(x=x[:past], pos=pos[:past])]
    runs += [plan(1).run(x=x[i : i + 1], pos=pos[i : i + 1]) for i in (past, past + 1)]
    want, routing = layer_f64(weights, x, pos, config)
    assert relative_error(np.concatenate([outputs["y"] for outputs in runs]), want) < EXACT
    assert (routing is None) == (il == 0)
    if routing is not None:
        assert routing.margin.min() > 1e-5
        ids = np.concatenate([outputs[f"ffn_moe_topk-{il}"] for outputs in runs])
        np.testing.assert_array_equal(ids, routing.ids)


def test_intermediate_tensors_have_the_names_of_llama_cpp() -> None:
    y = feed_forward(gg.input("x", ne=(V3.n_embd, 4)), layer_of(V3, random_weights(V3)))
    labels = {label for node in gg.Graph({"y": y}).nodes for label in gg.labels(node)}
    parts = ("logits", "probs", "topk", "weights", "down", "out")
    assert {"ffn_out-1", "ffn_shexp-1", *(f"ffn_moe_{part}-1" for part in parts)} <= labels


def test_the_margin_is_the_distance_to_the_best_expert_not_chosen() -> None:
    logits = np.log([[0.4, 0.1, 0.3, 0.2]])
    weights = {"ffn_gate_inp.weight": logits.T}
    two = route_f64(weights, np.ones((1, 1)), n_expert_used=2)
    assert two.ids.tolist() == [[0, 2]]
    np.testing.assert_allclose(two.margin, [1 / 3])
    # The best of the groups, 0.4 and 0.3, are closer than 0.4 and 0.1 within the chosen group.
    grouped = route_f64(weights, np.ones((1, 1)), n_expert_used=1, n_group=2, n_group_used=1)
    assert grouped.ids.tolist() == [[0]]
    np.testing.assert_allclose(grouped.margin, [0.25])
    assert route_f64(weights, np.ones((1, 1)), n_expert_used=4).margin == np.inf

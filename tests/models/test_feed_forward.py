"""The feed-forward half of a layer, and the whole layer, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml.models.batch import Batch, Options
from pyggml.models.deepseek2 import DeepSeek2
from pyggml.models.known import tensor_sizes
from pyggml.models.moe import LEAST_SUM, route
from pyggml.models.presets import TINY
from pyggml.parity.tolerance import relative_error
from tests.models.stand_ins import layer_of
from tests.reference.deepseek_layer import feed_forward_f64, layer_f64, route_f64

#: Bound of f32 sums against float64; measured errors are 1e-7 to 4e-7.
EXACT = 2e-6
N_TOKENS = 33

Array = np.ndarray[Any, Any]
Weights = dict[str, Array]


def with_experts(arch: DeepSeek2, **changes: Any) -> DeepSeek2:
    return replace(arch, experts=replace(arch.experts, **changes))


V2 = replace(
    with_experts(
        TINY, gating_func=1, weights_norm=False, weights_scale=1.0, n_group=1, n_group_used=1,
        n_expert=16, n_used=3,
    ),
    q_lora_rank=None,
)  # fmt: skip
V3 = with_experts(TINY, n_expert=16, n_used=3)
MODELS = {
    "v2": V2,
    "v2-norm": with_experts(V2, weights_norm=True),
    "v2-scale": with_experts(V2, weights_scale=16.0),
    "v2-scale-0-is-none": with_experts(V2, weights_scale=0.0),
    "v2-groups": with_experts(V2, n_group=8, n_group_used=3),
    "v2-all-groups": with_experts(V2, n_group=8, n_group_used=0),
    "v2-no-groups": with_experts(V2, n_group=0, n_group_used=0),
    "v2-no-shared": with_experts(V2, n_shared=0),
    "v2-all": with_experts(V2, n_used=16),
    "v3": V3,
    "v3-no-norm": with_experts(V3, weights_norm=False),
    "v3-no-groups": with_experts(V3, n_group=1, n_group_used=1),
    "v3-no-shared": with_experts(V3, n_shared=0),
    "v3-two-shared": with_experts(V3, n_shared=2),
}
all_models = pytest.mark.parametrize("arch", MODELS.values(), ids=MODELS)


def random_weights(arch: DeepSeek2, il: int = 1, bias: bool = True) -> Weights:
    """The weights of a layer (0 is dense) by their names in a file, in NumPy shape, f32."""
    rng = np.random.default_rng(il)
    weights: Weights = {}
    for name, ne in tensor_sizes(arch).items():
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


def tokens(arch: DeepSeek2, n: int = N_TOKENS) -> Array:
    return np.random.default_rng(7).standard_normal((n, arch.n_embd), dtype=np.float32)


def routing_of(arch: DeepSeek2) -> dict[str, Any]:
    """The keywords of route_f64."""
    e = arch.experts
    return {
        "n_expert_used": e.n_used,
        "gating": e.gating,
        "weights_norm": e.weights_norm,
        "weights_scale": e.weights_scale or 1.0,
        "n_group": e.n_group,
        "n_group_used": e.n_group_used or e.n_group,
    }


def feed_forward(
    arch: DeepSeek2, weights: Weights, n_tokens: int, *, il: int = 1, fused: bool = True
) -> gg.Node:
    batch = Batch(n_tokens, 32, Options(fused=fused))
    x = gg.input("x", ne=(arch.n_embd, n_tokens))
    return arch.feed_forward(x, layer_of(weights, il), batch)


def run(arch: DeepSeek2, weights: Weights, x: Array, *, il: int = 1, fused: bool = True) -> Array:
    y = feed_forward(arch, weights, len(x), il=il, fused=fused)
    return gg.compile({"y": y}).run(x=x)["y"]


def routed(arch: DeepSeek2, weights: Weights, n_tokens: int = N_TOKENS) -> tuple[gg.Node, gg.Node]:
    x = gg.input("x", ne=(arch.n_embd, n_tokens))
    return route(layer_of(weights, 1), x, arch.experts)


@all_models
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_experts_and_their_weights(arch: DeepSeek2, bias: bool) -> None:
    weights, x = random_weights(arch, bias=bias), tokens(arch)
    if bias and arch.experts.gating == "softmax":
        weights["exp_probs_b.bias"] = np.linspace(-0.1, 0.1, arch.experts.n_expert, dtype="f4")
    ids, shares = routed(arch, weights)
    got = gg.compile({"ids": ids, "weights": shares}).run(x=x)
    want = route_f64(weights, x, **routing_of(arch))
    assert want.margin.min() > 1e-5  # closer scores would be ties in f32
    np.testing.assert_array_equal(got["ids"], want.ids)
    assert got["weights"].shape == (N_TOKENS, arch.experts.n_used, 1)
    assert relative_error(got["weights"][..., 0], want.weights) < EXACT


@all_models
@pytest.mark.parametrize("n_tokens", [1, N_TOKENS])
def test_feed_forward_matches_float64(arch: DeepSeek2, n_tokens: int) -> None:
    weights, x = random_weights(arch), tokens(arch, n_tokens)
    want = feed_forward_f64(weights, x, route_f64(weights, x, **routing_of(arch)))
    fused, plain = (run(arch, weights, x, fused=fused) for fused in (True, False))
    assert relative_error(fused, want) < EXACT
    assert relative_error(plain, fused) < 1e-6


def test_a_dense_layer() -> None:
    arch = TINY
    weights, x = random_weights(arch, 0), tokens(arch)
    assert "ffn_gate_inp.weight" not in weights
    fused, plain = (run(arch, weights, x, il=0, fused=fused) for fused in (True, False))
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
            n = V3.experts.n_expert if "_exps" in key else 1
            weights[key.replace(".weight", ".scale")] = rng.uniform(0.2, 3, n).astype("f4")
    assert_like_float64(weights, x, il, fused)


def assert_like_float64(weights: Weights, x: Array, il: int, fused: bool = True) -> None:
    routing = route_f64(weights, x, **routing_of(V3)) if il else None
    want = feed_forward_f64(weights, x, routing)
    got = run(V3, weights, x, il=il, fused=fused)
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
        weights["ffn_gate_up_exps.scale"] = np.linspace(0.5, 3, V3.experts.n_expert, dtype="f4")
    else:
        want = feed_forward_f64(weights, x, route_f64(weights, x, **routing_of(V3)))
        np.testing.assert_allclose(want, separate, rtol=1e-12)
    assert_like_float64(weights, x, 1, fused)


def test_shared_experts_are_added() -> None:
    """Together they are one dense net, added to the routed experts."""
    weights, x = random_weights(V3), tokens(V3)
    shared = {key.replace("_shexp", ""): w for key, w in weights.items() if "_shexp" in key}
    others = {key: w for key, w in weights.items() if "_shexp" not in key}
    sum_ = run(V3, others, x) + run(V3, shared, x, il=0)
    assert relative_error(run(V3, weights, x), sum_) < EXACT


def test_a_bias_affects_the_choice_but_not_the_weights() -> None:
    arch = with_experts(V3, n_group=1, n_group_used=1, weights_norm=False, weights_scale=0.0)
    weights, x = random_weights(arch), tokens(arch)
    bias = np.zeros(16, np.float32)
    bias[[2, 5, 11]] = 3, 5, 4  # larger than any sigmoid
    weights["exp_probs_b.bias"] = bias
    ids, shares = routed(arch, weights)
    got = gg.compile({"ids": ids, "weights": shares}).run(x=x)
    assert (got["ids"] == [5, 11, 2]).all()
    p = 1 / (1 + np.exp(-x.astype("f8") @ weights["ffn_gate_inp.weight"].T.astype("f8")))
    assert relative_error(got["weights"][..., 0], p[:, [5, 11, 2]]) < EXACT


def test_weights_with_a_tiny_sum_are_divided_by_the_lower_limit() -> None:
    arch = with_experts(V3, n_group=1, n_group_used=1, weights_scale=0.0)
    x = np.ones((2, arch.n_embd), np.float32)
    weights = random_weights(arch, bias=False)
    weights["ffn_gate_inp.weight"] = np.full((16, arch.n_embd), -20 / arch.n_embd, "f4")
    _, shares = routed(arch, weights, 2)
    got = gg.compile({"weights": shares}).run(x=x)["weights"]
    np.testing.assert_allclose(got, 1 / (1 + np.exp(20.0)) / LEAST_SUM, rtol=1e-4)


@pytest.mark.parametrize("arch", [V2, V3], ids=["v2", "v3"])
@pytest.mark.parametrize("il", [0, 1], ids=["dense", "experts"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_a_whole_layer(arch: DeepSeek2, il: int, fused: bool) -> None:
    """A prompt, then two tokens from the cache; float64 chooses the same experts."""
    weights, x = random_weights(arch, il), tokens(arch)
    layer, options, store = (
        layer_of(weights, il),
        Options(mla=1, fused=fused, cache_k="f32"),
        gg.Store(),
    )
    cache = arch.cache(il, 48, N_TOKENS, options)

    def plan(n: int) -> gg.Plan:
        batch = Batch(n, 48, options, n, padded=False)
        y = arch.layer(gg.input("x", ne=(arch.n_embd, n)), layer, cache, batch)
        observe = [f"ffn_moe_topk-{il}"] if il else []
        return gg.compile({"y": y}, store=store, observe=observe)

    pos, past = np.arange(N_TOKENS), N_TOKENS - 2
    runs = [plan(past).run(x=x[:past], pos=pos[:past])]
    runs += [plan(1).run(x=x[i : i + 1], pos=pos[i : i + 1]) for i in (past, past + 1)]
    want, routing = layer_f64(weights, x, pos, arch)
    assert relative_error(np.concatenate([outputs["y"] for outputs in runs]), want) < EXACT
    assert (routing is None) == (il == 0)
    if routing is not None:
        assert routing.margin.min() > 1e-5
        ids = np.concatenate([outputs[f"ffn_moe_topk-{il}"] for outputs in runs])
        np.testing.assert_array_equal(ids, routing.ids)


def test_intermediate_tensors_have_the_names_of_llama_cpp() -> None:
    y = feed_forward(V3, random_weights(V3), 4)
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

"""Experts, in float64 and as a graph, against the DeepSeek V2 and V3 of transformers.

Names in a Hugging Face module and in a GGUF file (matrices are the same, out x in):

    gate.weight             ffn_gate_inp       gate.e_score_correction_bias    exp_probs_b.bias
    experts.gate_up_proj    ffn_gate_exps followed by ffn_up_exps
    experts.down_proj       ffn_down_exps      shared_experts.gate_proj, ...   ffn_gate_shexp, ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="needs torch and transformers (the extra 'oracle')")
pytest.importorskip("transformers", reason="needs torch and transformers (the extra 'oracle')")

from transformers import DeepseekV2Config, DeepseekV3Config  # noqa: E402
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe  # noqa: E402
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE  # noqa: E402

import pyggml as gg  # noqa: E402
from pyggml.models.moe import Experts, moe  # noqa: E402
from pyggml.parity.tolerance import relative_error  # noqa: E402
from tests.models.stand_ins import layer_of  # noqa: E402
from tests.reference.deepseek_layer import feed_forward_f64, route_f64  # noqa: E402

N_EMBD, N_FF, N_TOKENS = 40, 24, 17
PLAIN: dict[str, Any] = {"n_expert_used": 3, "weights_scale": 1.0, "n_group": 1, "n_group_used": 1}
#: name -> version and the keywords of route_f64.
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "v2_lite": (2, PLAIN),
    "v2": (2, {"n_expert_used": 5, "weights_scale": 16.0, "n_group": 8, "n_group_used": 3}),
    "v3": (3, {"n_expert_used": 6, "weights_scale": 2.5, "n_group": 4, "n_group_used": 2}),
    "v3_plain": (3, {**PLAIN, "weights_norm": False}),
}


@dataclass
class Run:
    """A module's weights under GGUF names, its input and its outputs."""

    weights: dict[str, np.ndarray]
    x: np.ndarray
    ids: np.ndarray
    shares: np.ndarray
    out: np.ndarray
    routing: dict[str, Any]


def module_of(version: int, at: dict[str, Any]) -> Any:
    sizes = {
        "hidden_size": N_EMBD,
        "num_attention_heads": 4,
        "moe_intermediate_size": N_FF,
        "n_routed_experts": 16,
        "n_shared_experts": 2,
        "num_experts_per_tok": at["n_expert_used"],
        "routed_scaling_factor": at["weights_scale"],
        "n_group": at["n_group"],
        "topk_group": at["n_group_used"],
    }
    if version == 3:
        norm = at.get("weights_norm", True)
        return DeepseekV3MoE(DeepseekV3Config(**sizes, norm_topk_prob=norm))
    method = "greedy" if at["n_group"] == 1 else "group_limited_greedy"
    return DeepseekV2Moe(DeepseekV2Config(**sizes, topk_method=method))


@torch.no_grad()
def run(name: str, seed: int) -> Run:
    """Run the module with random weights, with float64 wherever transformers uses float32."""
    version, at = MODELS[name]
    module = module_of(version, at).double().eval()
    rng = np.random.default_rng(seed)
    for key, tensor in module.state_dict().items():
        spread = 0.2 if key.endswith("bias") else tensor.shape[-1] ** -0.5
        tensor.copy_(torch.from_numpy(rng.standard_normal(tuple(tensor.shape)) * spread))
    x = torch.from_numpy(rng.standard_normal((N_TOKENS, N_EMBD)))
    with patch.object(torch, "float32", torch.float64):
        _, shares, ids = module.gate(x)
        out = module(x[None])[0]
    order = torch.argsort(ids, dim=1)
    routing = dict(at)
    if version == 3:
        routing = {"gating": "sigmoid", "weights_norm": True} | routing
    return Run(
        weights_of(module),
        x.numpy(),
        ids.gather(1, order).numpy(),
        shares.gather(1, order).numpy(),
        out.numpy(),
        routing,
    )


def weights_of(module: Any) -> dict[str, np.ndarray]:
    state = {key: tensor.numpy().copy() for key, tensor in module.state_dict().items()}
    gate, up = np.split(state.pop("experts.gate_up_proj"), 2, axis=1)
    weights = {
        "ffn_gate_inp.weight": state.pop("gate.weight"),
        "ffn_gate_exps.weight": gate,
        "ffn_up_exps.weight": up,
        "ffn_down_exps.weight": state.pop("experts.down_proj"),
    }
    for part in ("gate", "up", "down"):
        weights[f"ffn_{part}_shexp.weight"] = state.pop(f"shared_experts.{part}_proj.weight")
    if "gate.e_score_correction_bias" in state:
        weights["exp_probs_b.bias"] = state.pop("gate.e_score_correction_bias")
    assert not state
    return weights


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_float64(name: str, seed: int) -> None:
    theirs = run(name, seed)
    assert theirs.out.dtype == theirs.shares.dtype == np.float64
    routing = route_f64(theirs.weights, theirs.x, **theirs.routing)
    order = np.argsort(routing.ids, axis=1)
    np.testing.assert_array_equal(np.take_along_axis(routing.ids, order, axis=1), theirs.ids)
    shares = np.take_along_axis(routing.weights, order, axis=1)
    assert relative_error(shares, theirs.shares) < 1e-13
    assert relative_error(feed_forward_f64(theirs.weights, theirs.x, routing), theirs.out) < 1e-13


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("name", MODELS)
def test_graph(name: str, fused: bool) -> None:
    theirs = run(name, 3)
    layer = layer_of({key: w.astype(np.float32) for key, w in theirs.weights.items()})
    y = moe(layer, gg.input("x", ne=(N_EMBD, N_TOKENS)), experts_of(theirs), fused=fused)
    plan = gg.compile({"y": y}, observe=["ffn_moe_topk-0"])
    got = plan.run(x=theirs.x.astype(np.float32))
    np.testing.assert_array_equal(np.sort(got["ffn_moe_topk-0"], axis=1), theirs.ids)
    assert relative_error(got["y"], theirs.out) < 1e-6


def experts_of(theirs: Run) -> Experts:
    numbers = dict(theirs.routing)
    gating = {"softmax": 1, "sigmoid": 2}[numbers.pop("gating", "softmax")]
    return Experts(n_expert=16, n_used=numbers.pop("n_expert_used"), gating_func=gating, **numbers)

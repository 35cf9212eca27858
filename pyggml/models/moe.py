"""Mixtures of experts: routing, and the sum of the chosen experts.

T is the number of tokens. The gate is a softmax of the logits or a sigmoid (V3's bias and the group
limit affect only which experts are chosen; their weights are the gate's values without the bias).
Sources: DeepSeek-V2 (arXiv 2405.04434, 2.2) and DeepSeek-V3 (arXiv 2412.19437, 2.1.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pyggml.gguf import GGUFFile
from pyggml.models.keys import Keys, key
from pyggml.models.layers import extras, mlp_tensors, scaled, silu_gated, swiglu_mlp
from pyggml.models.weights import Layer
from pyggml.node import Node
from pyggml.ops import (
    add,
    add_id,
    clamp,
    div,
    get_rows,
    glu,
    grouped_topk,
    moe_up_gate,
    mul,
    mul_mat,
    mul_mat_id,
    mul_multi_add,
    reshape,
    scale,
    sigmoid,
    soft_max,
    softplus,
    sqrt,
    sum_rows,
    top_k,
)

Gated = Callable[[Node, Node], Node]
Gating = Literal["softmax", "sigmoid", "softmax_weight", "sqrt_softplus"]
_GATING: dict[int, Gating] = {
    0: "softmax", 1: "softmax", 2: "sigmoid", 3: "softmax_weight", 4: "sqrt_softplus",
}  # fmt: skip
#: Lower limit of the sum that normalizes expert weights: the smallest normal f16, as in llama.cpp.
LEAST_SUM = 6.103515625e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The experts of a model, from its keys.

    gating_func    1 softmax of the logits, 2 sigmoid, 3 softmax over the chosen experts' logits
                   only (gpt-oss), 4 the root of softplus (DeepSeek V4); 0: the architecture's
                   default
    weights_norm   divide the chosen experts' weights by their sum
    weights_scale  then multiply them; 0 and 1 scale nothing
    choice_bias    every layer has exp_probs_b.bias, which is added to the scores that choose
    n_group, n_group_used   choose the best groups of experts, and experts only of these groups.
                   A group's score is its best expert's (softmax) or the sum of its two best (V3's
                   sigmoid)
    """

    n_expert: int = key("expert_count", 0, least=0)
    n_used: int = key("expert_used_count", 0, least=0)
    n_ff: int = key("expert_feed_forward_length", 0, least=0)
    n_shared: int = key("expert_shared_count", 0, least=0)
    gating_func: int = key("expert_gating_func", 0, least=0, most=4, rare=True)
    weights_norm: bool = key("expert_weights_norm", False)
    weights_scale: float = key("expert_weights_scale", 0.0, zero=True)
    choice_bias: bool = False
    n_group: int = key("expert_group_count", 1, least=0)
    n_group_used: int = key("expert_group_used_count", 0, least=0)

    @property
    def n_ff_shared(self) -> int:
        """Width of the shared experts, which are one feed-forward net."""
        return self.n_ff * self.n_shared

    @property
    def gating(self) -> Gating:
        return _GATING[self.gating_func]

    def check(self, keys: Keys, n_layer: int, n_dense: int = 0) -> None:
        """Raise a GGUFError for numbers that do not fit a model of `n_layer` layers.

        n_dense  the first layers, which have no experts
        """
        if n_dense > n_layer:
            keys.fail("leading_dense_block_count", f"{n_dense}, must be at most {n_layer}")
        if n_dense < n_layer:
            self._check_counts(keys)
        reason = "expert_shared_count x expert_feed_forward_length"
        keys.equal("expert_shared_feed_forward_length", self.n_ff_shared, reason)

    def _check_counts(self, keys: Keys) -> None:
        for name, n in (("expert_count", self.n_expert), ("expert_used_count", self.n_used),
                        ("expert_feed_forward_length", self.n_ff)):  # fmt: skip
            if n < 1:
                keys.integer(name)  # raises: it is missing or 0
        if self.n_used > self.n_expert:
            keys.fail("expert_used_count", f"{self.n_used}, must be 1 to {self.n_expert}")
        if self.n_group > 1:
            self._check_groups(keys)

    def _check_groups(self, keys: Keys) -> None:
        n, used = self.n_group, self.n_group_used or self.n_group
        size, remainder = divmod(self.n_expert, n)
        if remainder or size < 2:
            problem = f"{n}, must divide {self.n_expert} experts into groups of at least 2"
            keys.fail("expert_group_count", problem)
        if used > n:
            keys.fail("expert_group_used_count", f"{used}, must be 1 to {n}")
        if size * used < self.n_used:
            problem = f"{used} groups of {size} have fewer than the {self.n_used} experts used"
            keys.fail("expert_group_used_count", problem)

    def tensors(self, n_embd: int, *, merged: bool = False) -> dict[str, tuple[int, ...]]:
        """The tensors of a layer; merged: up and gate as one, ffn_gate_up_exps."""
        n, n_ff = self.n_expert, self.n_ff
        sizes: dict[str, tuple[int, ...]] = {"ffn_gate_inp": (n_embd, n)}
        if self.choice_bias:
            sizes["exp_probs_b.bias"] = (n,)
        if merged:
            sizes["ffn_gate_up_exps"] = (n_embd, 2 * n_ff, n)
        else:
            sizes |= {"ffn_gate_exps": (n_embd, n_ff, n), "ffn_up_exps": (n_embd, n_ff, n)}
        sizes["ffn_down_exps"] = (n_ff, n_embd, n)
        if self.n_shared:
            sizes |= mlp_tensors(n_embd, self.n_ff_shared, "_shexp")
        return sizes


def has_merged(file: GGUFFile) -> bool:
    """Whether experts' up and gate are one tensor, ffn_gate_up_exps."""
    return any(name.endswith("ffn_gate_up_exps.weight") for name in file.tensors)


def route(layer: Layer, x: Node, e: Experts, ids: Node | None = None) -> tuple[Node, Node]:
    """Choose experts: their ids, i32 [n_expert_used, T], and weights, f32 [1, n_expert_used, T].

    x    f32 [n_embd, T]
    ids  the experts, if something else has chosen them already
    """
    n_tokens = x.ne[1]
    logits = scaled(layer, "ffn_gate_inp", mul_mat(layer["ffn_gate_inp"], x, prec="f32"))
    probs = logits = layer.label(logits, "ffn_moe_logits")
    if e.gating != "softmax_weight":
        probs = layer.label(_GATES[e.gating](logits), "ffn_moe_probs")
    if ids is None:
        ids = _best(layer, probs, e)
    ids = layer.label(ids, "ffn_moe_topk")
    weights = get_rows(reshape(probs, ne=(1, e.n_expert, n_tokens)), ids)
    flat = reshape(weights, ne=(e.n_used, n_tokens))
    if e.gating == "softmax_weight":
        weights = reshape(soft_max(flat), ne=weights.ne[:3])
    if e.weights_norm:
        sums = clamp(sum_rows(flat), min=LEAST_SUM, max=float("inf"))
        weights = reshape(div(flat, sums), ne=weights.ne[:3])
    if e.weights_scale not in (0.0, 1.0):
        weights = scale(weights, s=e.weights_scale)
    return ids, layer.label(weights, "ffn_moe_weights")


_GATES: dict[Gating, Callable[[Node], Node]] = {
    "softmax": soft_max,
    "sigmoid": sigmoid,
    "sqrt_softplus": lambda logits: sqrt(softplus(logits)),
}


def _best(layer: Layer, probs: Node, e: Experts) -> Node:
    """The ids of the best experts by their gate's values and the layer's bias."""
    bias = layer.get("exp_probs_b.bias")
    scores = probs if bias is None else add(probs, bias)
    if e.n_group <= 1:
        return top_k(scores, k=e.n_used)
    return grouped_topk(
        scores, n_group=e.n_group, n_group_used=e.n_group_used or e.n_group,
        n_top=2 if e.gating == "sigmoid" else 1, k=e.n_used,
    )  # fmt: skip


def moe(
    layer: Layer,
    x: Node,
    experts: Experts,
    *,
    fused: bool,
    gated: Gated | None = None,
    ids: Node | None = None,
    limit: float | None = None,
    limit_shared: float | None = None,
) -> Node:
    """The weighted sum of each token's experts, plus the shared experts if there are any.

    gated         the activation of (gate, up) in place of `silu_gated`
    ids           the experts, if they do not depend on x (see `route`)
    limit, limit_shared   of `silu_gated` in the experts and in the shared experts
    """
    routed = routed_sum(layer, x, experts, fused=fused, gated=gated, ids=ids, limit=limit)
    if "ffn_gate_shexp" not in layer:
        return layer.label(routed, "ffn_out")
    shared = swiglu_mlp(layer, x, "_shexp", fused=fused, limit=limit_shared)
    return layer.label(add(routed, layer.label(shared, "ffn_shexp")), "ffn_out")


def routed_sum(
    layer: Layer,
    x: Node,
    experts: Experts,
    *,
    fused: bool,
    gated: Gated | None = None,
    ids: Node | None = None,
    limit: float | None = None,
) -> Node:
    """The weighted sum of each token's n_expert_used experts, f32 [n_embd, T]."""
    ids, weights = route(layer, x, experts, ids)
    b = reshape(x, ne=(x.ne[0], 1, x.ne[1]))
    up, gate = "ffn_up_exps", "ffn_gate_exps"
    if gated is not None:
        gate_x = expert_product(layer, gate, b, ids)
        hidden = gated(gate_x, expert_product(layer, up, b, ids))
    elif "ffn_gate_up_exps" in layer:
        both = expert_product(layer, "ffn_gate_up_exps", b, ids)  # rows of gate, then of up
        hidden = glu(both, limit=limit)
    elif fused and not extras(layer, up, gate):
        hidden = moe_up_gate(layer[up], layer[gate], b, ids, limit=limit)
    else:
        gate_x = expert_product(layer, gate, b, ids)
        hidden = silu_gated(gate_x, expert_product(layer, up, b, ids), limit)
    hidden = layer.label(hidden, "ffn_moe_hidden")
    down = layer.label(expert_product(layer, "ffn_down_exps", hidden, ids), "ffn_moe_down")
    return layer.label(mul_multi_add(down, weights), "ffn_moe_out")


def expert_product(layer: Layer, name: str, b: Node, ids: Node) -> Node:
    """Each token times its experts' matrices, with their factors and biases, if any."""
    y = mul_mat_id(layer[name], b, ids)
    n_used, n_tokens = ids.ne[:2]
    factors, biases = layer.get(f"{name}.scale"), layer.get(f"{name}.bias")
    if factors is not None:
        table = reshape(factors, ne=(1, factors.ne[0]))
        chosen = get_rows(table, reshape(ids, ne=(n_used * n_tokens,)))
        y = mul(y, reshape(chosen, ne=(1, n_used, n_tokens)))
    return y if biases is None else add_id(y, biases, ids)

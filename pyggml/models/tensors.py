"""Names and sizes of the tensors of a DeepSeek-2 file, from its hyperparameters."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pyggml.errors import GGUFError
from pyggml.gguf.format import TensorInfo
from pyggml.models.config import DeepSeek2Config, KvB

Sizes = dict[str, tuple[int, ...]]

#: Optional tensors: models may tie the output matrix or have a router without selection bias.
_OPTIONAL = ("output.weight", ".exp_probs_b.bias")
#: Experts' tensors that a file may merge into one, ffn_gate_up_exps.
_MERGED = re.compile(r"(blk\.\d+\.)ffn_(gate|up)_exps\.weight")


def tensor_sizes(config: DeepSeek2Config) -> Sizes:
    """Name -> ne (ggml's order) of every tensor of the model, in the order of use."""
    sizes: Sizes = {"token_embd.weight": (config.n_embd, config.n_vocab)}
    for i in range(config.n_layer):
        sizes |= {f"blk.{i}.{name}": ne for name, ne in _layer(config, i).items()}
    sizes["output_norm.weight"] = (config.n_embd,)
    sizes["output.weight"] = (config.n_embd, config.n_vocab)
    return sizes


def check_tensors(config: DeepSeek2Config, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise a GGUFError for the first tensor that is missing or has the wrong size."""
    required, allowed = tensor_sizes(config), _other_sizes(config)
    for name, ne in required.items():
        if name in tensors or name.endswith(_OPTIONAL):
            continue
        if _MERGED.sub(r"\1ffn_gate_up_exps.weight", name) not in tensors:
            raise GGUFError(f"tensor {name!r} of ne={list(ne)} is missing")
    for name, info in tensors.items():
        ne = required.get(name, allowed.get(name, info.ne))
        if _four(info.ne) != _four(ne) and info.ne != _flat(name, ne):
            raise GGUFError(
                f"tensor {name!r}: ne={list(info.ne)}, but the file's keys imply {list(ne)}"
            )


def _flat(name: str, ne: tuple[int, ...]) -> tuple[int, ...]:
    """The size that ik_llama.cpp stores: in attn_k_b and attn_v_b it stacks the heads' rows."""
    if name.endswith(("attn_k_b.weight", "attn_v_b.weight")):
        return (ne[0], ne[1] * ne[2])
    return ne


def _other_sizes(config: DeepSeek2Config) -> Sizes:
    """Sizes of tensors that a file may have besides `tensor_sizes`, or instead of them: the other
    layout of kv_b, merged experts, factors of products.
    """
    c = config
    sizes: Sizes = {"output.scale": (1,)}
    for i in range(c.n_layer):
        layer = _layer(c, i) | _kv_b(c, "joined") | _kv_b(c, "split")
        if i >= c.n_layer_dense:
            layer["ffn_gate_up_exps.weight"] = (c.n_embd, 2 * c.n_ff_exp, c.n_expert)
        scales = {
            name.replace(".weight", ".scale"): (c.n_expert if "_exps" in name else 1,)
            for name in layer
            if name.endswith(".weight") and "norm" not in name
        }
        sizes |= {f"blk.{i}.{name}": ne for name, ne in (layer | scales).items()}
    return sizes


def _layer(c: DeepSeek2Config, il: int) -> Sizes:
    return _attention(c) | (_dense(c) if il < c.n_layer_dense else _experts(c))


def _kv_b(c: DeepSeek2Config, kv_b: KvB) -> Sizes:
    if kv_b == "joined":
        return {"attn_kv_b.weight": (c.kv_lora_rank, c.n_head * (c.d_nope + c.d_v))}
    return {
        "attn_k_b.weight": (c.d_nope, c.kv_lora_rank, c.n_head),
        "attn_v_b.weight": (c.kv_lora_rank, c.d_v, c.n_head),
    }


def _four(ne: tuple[int, ...]) -> tuple[int, ...]:
    return ne + (1,) * (4 - len(ne))


def _attention(c: DeepSeek2Config) -> Sizes:
    sizes: Sizes = {"attn_norm.weight": (c.n_embd,)}
    if c.q_lora_rank is None:
        sizes["attn_q.weight"] = (c.n_embd, c.n_head * c.d_k)
    else:
        sizes["attn_q_a.weight"] = (c.n_embd, c.q_lora_rank)
        sizes["attn_q_a_norm.weight"] = (c.q_lora_rank,)
        sizes["attn_q_b.weight"] = (c.q_lora_rank, c.n_head * c.d_k)
    sizes["attn_kv_a_mqa.weight"] = (c.n_embd, c.kv_lora_rank + c.n_rot)
    sizes["attn_kv_a_norm.weight"] = (c.kv_lora_rank,)
    sizes |= _kv_b(c, c.kv_b)
    sizes["attn_output.weight"] = (c.n_head * c.d_v, c.n_embd)
    return sizes


def _feed_forward(n_embd: int, n_ff: int, suffix: str = "", experts: tuple[int, ...] = ()) -> Sizes:
    return {
        f"ffn_gate{suffix}.weight": (n_embd, n_ff, *experts),
        f"ffn_up{suffix}.weight": (n_embd, n_ff, *experts),
        f"ffn_down{suffix}.weight": (n_ff, n_embd, *experts),
    }


def _dense(c: DeepSeek2Config) -> Sizes:
    return {"ffn_norm.weight": (c.n_embd,)} | _feed_forward(c.n_embd, c.n_ff)


def _experts(c: DeepSeek2Config) -> Sizes:
    sizes: Sizes = {"ffn_norm.weight": (c.n_embd,), "ffn_gate_inp.weight": (c.n_embd, c.n_expert)}
    if c.gating == "sigmoid":
        sizes["exp_probs_b.bias"] = (c.n_expert,)
    sizes |= _feed_forward(c.n_embd, c.n_ff_exp, "_exps", (c.n_expert,))
    if c.n_expert_shared:
        sizes |= _feed_forward(c.n_embd, c.n_ff_shared, "_shexp")
    return sizes

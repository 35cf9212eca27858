"""The tensors of a DeepSeek-2 file: names and sizes that follow from its hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping

from pyggml.errors import GGUFError
from pyggml.gguf.format import TensorInfo
from pyggml.models.config import DeepSeek2Config

Sizes = dict[str, tuple[int, ...]]

#: A file may lack these: a tied output matrix, a router without selection bias.
_OPTIONAL = ("output.weight", ".exp_probs_b.bias")


def tensor_sizes(config: DeepSeek2Config) -> Sizes:
    """Name -> ne (ggml's order) of every tensor of such a model, in the order of use."""
    sizes: Sizes = {"token_embd.weight": (config.n_embd, config.n_vocab)}
    for i in range(config.n_layer):
        feed_forward = _dense if i < config.n_layer_dense else _experts
        layer = _attention(config) | feed_forward(config)
        sizes |= {f"blk.{i}.{name}": ne for name, ne in layer.items()}
    sizes["output_norm.weight"] = (config.n_embd,)
    sizes["output.weight"] = (config.n_embd, config.n_vocab)
    return sizes


def check_tensors(config: DeepSeek2Config, tensors: Mapping[str, TensorInfo]) -> None:
    """GGUFError naming the first tensor that is missing or whose size contradicts the keys."""
    for name, ne in tensor_sizes(config).items():
        if name not in tensors:
            if name.endswith(_OPTIONAL):
                continue
            raise GGUFError(f"tensor {name!r} of ne={list(ne)} is missing")
        found = tensors[name].ne
        if _four(found) != _four(ne):
            raise GGUFError(f"tensor {name!r}: ne={list(found)}, but the keys make it {list(ne)}")


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
    if c.kv_b == "split":
        sizes["attn_k_b.weight"] = (c.d_nope, c.kv_lora_rank, c.n_head)
        sizes["attn_v_b.weight"] = (c.kv_lora_rank, c.d_v, c.n_head)
    else:
        sizes["attn_kv_b.weight"] = (c.kv_lora_rank, c.n_head * (c.d_nope + c.d_v))
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

"""Convert models of transformers to GGUF files, with the names and keys of llama.cpp's converter.

    model = random_model(LlamaConfig(...))
    convert(model, path, "q8_0")

`convert` stores matrices in the type it is given, and all else in f32. With nvfp4, only matrices of
layers have it, each with a factor (NAME.scale). Afterwards the model has the values that the file
stores, so that logits can be compared for every type.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any

import gguf as reference
import numpy as np
import torch
from gguf.quants import quantize
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from pyggml.dtypes import dtype as as_dtype
from pyggml.gguf import GGUFFile
from pyggml.gguf.writer import Tensor, write
from pyggml.quants import ENCODABLE, decode_rows, encode_rows
from tests.models import nvfp4
from tests.models.recipes import COMMON, LAYER, MODEL, RECIPES, ROPE, Recipe

Array = NDArray[Any]

# -- models -------------------------------------------------------------------------------------


@torch.no_grad()
def random_model(config: Any, seed: int = 0) -> Any:
    """A model in f32 whose layers all matter: products keep the size of their input."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    rng = np.random.default_rng(seed)
    for name, value in model.state_dict().items():
        if name.endswith("tid2eid"):  # different experts for each token
            experts = np.arange(config.n_routed_experts)
            table = rng.permuted(np.tile(experts, (len(value), 1)), axis=1)
            value.copy_(torch.from_numpy(table[:, : value.shape[1]]))
            continue
        values = rng.standard_normal(tuple(value.shape))
        if name.endswith(("norm.weight", "layernorm.weight")):
            values = 1 + 0.3 * values
        elif value.ndim == 1:
            values *= 0.3
        elif "embed" not in name:
            values *= value.shape[-1] ** -0.5
        value.copy_(torch.from_numpy(values))
    return model


# -- files --------------------------------------------------------------------------------------


@torch.no_grad()
def convert(
    model: Any,
    path: str | PathLike[str],
    dtype: str = "f32",
    *,
    merged: bool = False,
    keys: Mapping[str, Any] | None = None,
) -> None:
    """Write a model, with matrices in `dtype`, and round the model's own values to the file's.

    merged  keep the experts' gate and up in one tensor
    keys    more keys, without the architecture's prefix
    """
    recipe = RECIPES[model.config.model_type]
    tensors = [
        _tensor(name, type_, rows)
        for name, type_, rows in _stored(model, recipe, dtype)
        for name, rows in _parts(name, rows, model.config, recipe, merged=merged)
    ]
    if model.config.rope_parameters.get("rope_type") == "llama3":
        tensors.append(_tensor("rope_freqs.weight", "f32", _llama3_factors(model.config)))
    more = {f"{recipe.name}.{key}": value for key, value in (keys or {}).items()}
    write(path, fields_of(model.config) | more, tensors)


@torch.no_grad()
def restore(model: Any, file: GGUFFile) -> None:
    """Give a model without experts the values of a file, decoded."""
    recipe = RECIPES[model.config.model_type]
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        tensor = _tensor_name(name, recipe)
        rows = decode_rows(file.tensors[tensor].dtype, file.array(tensor))
        if n_head := _permuted_heads(name, model.config, recipe):
            rows = _halves(rows, n_head)
        value.copy_(torch.from_numpy(rows))


def fields_of(config: Any) -> dict[str, Any]:
    """The keys of a file of a model with this config."""
    recipe = RECIPES[config.model_type]
    own = dict(recipe.fields)
    for attribute, names in (COMMON | recipe.keys).items():
        value = getattr(config, attribute, None)
        own |= {name: value for name in names if value is not None}
    own |= recipe.more(config)
    rope = config.rope_parameters
    if "compress" in rope:  # the scaling is that of layers with compressors, but not the base
        rope = rope["compress"] | {"rope_theta": rope["main"]["rope_theta"]}
        del rope["partial_rotary_factor"]
    scaled = rope["rope_type"] in ("linear", "yarn")
    if scaled:
        own["rope.scaling.type"] = rope["rope_type"]
    for name, key in ROPE.items():
        if name in rope and (scaled or name == "rope_theta"):
            own[f"rope.{key}"] = rope[name] if "original" in name else float(rope[name])
    if "mscale_all_dim" in rope:
        own["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    if recipe.absorbed:
        own["attention.key_length"] = config.kv_lora_rank + config.qk_rope_head_dim
    if getattr(config, "indexer_types", None) is not None:
        own["attention.indexer.types"] = np.array([t == "full" for t in config.indexer_types])
    if "partial_rotary_factor" in rope:
        own["rope.dimension_count"] = int(config.head_dim * rope["partial_rotary_factor"])
    fields = {"general.architecture": recipe.name, "tokenizer.ggml.model": "no_vocab"}
    return fields | {f"{recipe.name}.{key}": value for key, value in own.items()}


def tensor_names(model: Any) -> Iterator[str]:
    """The tensors of a file of the model, with separate gate and up of the experts."""
    for name in model.state_dict():
        recipe = RECIPES[model.config.model_type]
        tensor = _tensor_name(name, recipe)
        if recipe.absorbed and "attn_kv_b" in tensor:
            yield from {tensor.replace("kv_b", "k_b"), tensor.replace("kv_b", "v_b")}
        else:
            yield from {tensor.replace("gate_up", "gate"), tensor.replace("gate_up", "up")}
    if model.config.rope_parameters.get("rope_type") == "llama3":
        yield "rope_freqs.weight"


def _stored(model: Any, recipe: Recipe, dtype: str) -> Iterator[tuple[str, str, Array]]:
    """(tensor's name, type, rows as the file stores them) of every parameter."""
    config = model.config
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensor = _tensor_name(name, recipe)
        if not value.is_floating_point():
            yield tensor, "i32", value.numpy().astype(np.int32)
            continue
        plain = value.ndim == 1 or tensor.endswith(".bias")
        plain = plain or "ffn_gate_inp" in tensor or "indexer.proj" in tensor
        plain = plain or "_ape." in tensor or "hc_" in tensor
        plain = plain or (dtype == "nvfp4" and not tensor.startswith("blk."))
        type_ = "f32" if plain else dtype
        if recipe.absorbed and "attn_kv_b" in tensor and as_dtype(type_).block > 1:
            type_ = "f16"  # its halves have other rows
        matrix = value
        if recipe.transposed and value.ndim == 3:
            matrix = value.transpose(1, 2)
        values = np.ascontiguousarray(matrix.numpy())
        if type_ == "nvfp4":
            values = values.copy()
            parts = _split(tensor, values, recipe)
            factors = [nvfp4.factors_of(part) for _, part in parts]
            for (_, part), factor in zip(parts, factors, strict=True):
                part /= factor
            rows, values = nvfp4.quantize(values)
            for (part_name, part), factor in zip(
                _split(tensor, values, recipe), factors, strict=True
            ):
                part *= factor
                for suffix, numbers in (("scale", factor), ("input_scale", np.full(1, 0.5, "f4"))):
                    full = np.broadcast_to(numbers.reshape(-1), factor.size)
                    yield part_name.replace(".weight", f".{suffix}"), "f32", full
        else:
            rows = _encoded(type_, values)
            values = decode_rows(type_, rows)
        matrix.copy_(torch.from_numpy(values))
        if n_head := _permuted_heads(name, config, recipe):
            rows = _neighbours(rows, n_head)
        yield tensor, type_, rows


def _encoded(dtype: str, rows: Array) -> Array:
    """Rows as a file stores them; gguf's encoder for the types that pyggml only decodes."""
    if dtype in ENCODABLE:
        return encode_rows(dtype, rows)
    type_ = reference.GGMLQuantizationType[dtype.upper()]
    return quantize(rows, type_)


def _tensor_name(name: str, recipe: Recipe) -> str:
    """The tensor of a parameter."""
    module, _, kind = name.removeprefix("model.").rpartition(".")
    prefix = ""
    if module.startswith("layers."):
        _, il, module = module.split(".", 2)
        prefix = f"blk.{il}."
    names = LAYER | recipe.tensors if prefix else MODEL
    # A parameter such as experts.down_proj has a name of its own; most are a module's weight.
    full = f"{module}.{kind}"
    tensor = names[full] if full in names else f"{names[module]}.{kind}"
    return prefix + (tensor if tensor.endswith((".weight", ".bias")) else f"{tensor}.weight")


def _permuted_heads(name: str, config: Any, recipe: Recipe) -> int:
    """The number of heads whose rows the file has in another order; 0 if the order is the same."""
    if not any(f"{module}." in name for module in recipe.permuted):
        return 0
    return config.num_key_value_heads if "k_proj" in name else config.num_attention_heads


def _neighbours(rows: Array, n_head: int) -> Array:
    """Rows i and i + d/2 of each head of d rows become neighbours."""
    halves = rows.reshape(n_head, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _halves(rows: Array, n_head: int) -> Array:
    """Undo `_neighbours`."""
    pairs = rows.reshape(n_head, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _split(name: str, rows: Array, recipe: Recipe) -> list[tuple[str, Array]]:
    """The rows, or biases, of gate and of up, if the tensor has both."""
    if "gate_up" not in name:
        return [(name, rows)]
    half = rows.shape[1] // 2
    gate, up = rows[:, :half], rows[:, half:]
    if recipe.transposed:
        gate, up = rows[:, ::2], rows[:, 1::2]
    return [(name.replace("gate_up", "gate"), gate), (name.replace("gate_up", "up"), up)]


def _parts(
    name: str, rows: Array, config: Any, recipe: Recipe, *, merged: bool
) -> list[tuple[str, Array]]:
    """The tensors that a file has of one parameter."""
    if not (recipe.absorbed and "attn_kv_b" in name):
        return [(name, rows)] if merged else _split(name, rows, recipe)
    heads = rows.reshape(config.num_attention_heads, -1, rows.shape[-1])
    k, v = np.split(heads, [config.qk_nope_head_dim], axis=1)
    return [(name.replace("kv_b", "k_b"), k.swapaxes(1, 2)), (name.replace("kv_b", "v_b"), v)]


def _tensor(name: str, dtype: str, rows: Array) -> Tensor:
    type_ = as_dtype(dtype)
    rows = np.ascontiguousarray(rows)
    n = rows.nbytes // math.prod(rows.shape[:-1]) // type_.nbytes * type_.block
    return Tensor(name, type_, (n, *rows.shape[-2::-1]), lambda: [rows])


def _llama3_factors(config: Any) -> Array:
    """What divides each frequency: 1 for short waves, `factor` for long ones, between them a
    straight line from one frequency to the other (Llama 3.1).
    """
    rope, d = config.rope_parameters, config.head_dim
    frequencies = rope["rope_theta"] ** -(np.arange(0, d, 2) / d)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    part = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - part) / rope["factor"] + part)).astype(np.float32)

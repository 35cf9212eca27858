"""Rejects files with keys or tensors that pyggml does not know.

A key or tensor of the architecture that no graph reads is an error, because it may change what the
model computes. Known keys are those that the architecture's class looked up; known tensors are
those that it lists. Keys of the tokenizer, `general.*` and other namespaces do not belong to the
architecture and are not checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pyggml.errors import GGUFError
from pyggml.gguf.format import TensorInfo
from pyggml.models.keys import Keys
from pyggml.where import warn

if TYPE_CHECKING:
    from pyggml.models.base import Architecture

Sizes = dict[str, tuple[int, ...]]

_BLOCK = re.compile(r"blk\.(\d+)\.")
#: Name prefixes of tensors outside the language model: vision, projectors, audio.
_OTHER_TOWERS = ("v.", "mm.", "a.", "resampler.")

#: Keys of other architectures -> the values that switch them off.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "moe_every_n_layers": (0, 1),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.alpha": (0.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "router_logit_softcapping": (0.0,),
}
HARMLESS = frozenset(
    {
        "attention.layer_norm_epsilon", "classifier.output_labels", "pooling_type",
        "rope.scaling.finetuned", "tensor_data_layout", "use_parallel_residual",
    }
)  # fmt: skip


def check_file(
    config: Architecture,
    keys: Keys,
    tensors: Mapping[str, TensorInfo],
    neutral: Mapping[str, tuple[Any, ...]],
) -> None:
    """`check_keys` and `check_tensors`, and one warning that names all that is not used."""
    unused = check_keys(keys, neutral) + check_tensors(config, tensors)
    if unused:
        warn(f"{config.name}: not used: {', '.join(sorted(unused))}")


def check_keys(keys: Keys, neutral: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """Raise a GGUFError for keys of the architecture that nothing has looked up.

    Return the keys that never change the result.

    neutral  keys of features that the architecture's graphs do not compute -> the values that
             switch them off; NEUTRAL holds for all architectures
    """
    unknown: list[str] = []
    unused: list[str] = []
    neutral = {**NEUTRAL, **neutral}
    for key, value in keys.fields.items():
        name = key.removeprefix(f"{keys.architecture}.")
        if name == key or name in keys.lookups:
            continue
        if name in HARMLESS:
            unused.append(key)
        elif name not in neutral:
            unknown.append(key)
        elif isinstance(value, np.ndarray) or value not in neutral[name]:
            expected = " or ".join(map(str, neutral[name]))
            raise GGUFError(f"key '{key}': pyggml does not compute {value}; it must be {expected}")
    if unknown:
        raise GGUFError(
            f"key{'s' * (len(unknown) > 1)} {_listing(unknown)}: unknown for architecture "
            f"{keys.architecture!r}, and the result may depend on it; try a newer pyggml"
        )
    return unused


def check_tensors(config: Architecture, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Raise a GGUFError for a tensor that is missing, has the wrong size, or is unknown.

    Return the tensors outside the language model. Blocks after the model's layers (multi-token
    prediction) are not checked.
    """
    required, known = tensor_sizes(config), all_sizes(config)
    for name, ne in required.items():
        if name not in tensors:
            raise GGUFError(f"tensor {name!r} of ne={list(ne)} is missing")
    unknown: list[str] = []
    unused: list[str] = []
    for name, info in tensors.items():
        expected = known.get(name)
        if expected is None:
            if name.startswith(_OTHER_TOWERS):
                unused.append(name)
            elif not _left_out(config, name):
                unknown.append(name)
        elif _four(info.ne) != _four(expected) and info.ne not in config.stored_sizes(
            name, expected
        ):
            raise GGUFError(
                f"tensor {name!r}: ne={list(info.ne)}, but the file's keys imply {list(expected)}"
            )
    if unknown:
        raise GGUFError(
            f"tensor{'s' * (len(unknown) > 1)} {_listing(unknown)}: unknown for architecture "
            f"{config.name!r} with {config.n_block} blocks, and the result may depend on it; try a "
            "newer pyggml"
        )
    return unused


def tensor_sizes(config: Architecture) -> Sizes:
    """Name -> ne of every tensor that a file of the model must have, in the order of use."""
    head = dict(_full("", config.model_tensors()))
    first = {"token_embd.weight": head.pop("token_embd.weight")}
    layers = (_full(f"blk.{il}.", config.layer_tensors(il)) for il in range(config.n_layer))
    return first | {name: ne for layer in layers for name, ne in layer} | head


def all_sizes(config: Architecture) -> Sizes:
    """Name -> ne of every tensor that a file of the model may have, and each matrix's factor."""
    parts = [("", config.model_tensors())]
    parts += [
        (f"blk.{il}.", config.layer_tensors(il) | config.optional_tensors(il))
        for il in range(config.n_layer)
    ]
    names = (pair for prefix, sizes in parts for pair in _full(prefix, sizes))
    return dict(names) | dict(pair for part in parts for pair in _factors(*part))


def _full(prefix: str, sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, ne in sizes.items():
        yield prefix + (name if name.endswith(".bias") else f"{name}.weight"), ne


def _factors(prefix: str, sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, ne in sizes.items():
        if len(ne) > 1:
            for suffix in ("scale", "input_scale"):  # input_scale is for 4-bit activations
                yield f"{prefix}{name}.{suffix}", ne[2:] if name.endswith("_exps") else (1,)


def _left_out(config: Architecture, name: str) -> bool:
    block = _BLOCK.match(name)
    return block is not None and config.n_layer <= int(block[1]) < config.n_block


def _four(ne: tuple[int, ...]) -> tuple[int, ...]:
    return ne + (1,) * (4 - len(ne))


def _listing(names: list[str]) -> str:
    first = ", ".join(map(repr, names[:3]))
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"

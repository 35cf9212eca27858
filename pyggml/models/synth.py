"""Files with random weights, for any architecture."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from typing import Any

import numpy as np

from pyggml.dtypes import F32, TYPES, DType
from pyggml.errors import ShapeError
from pyggml.generate.tokenizer import byte_characters
from pyggml.gguf.format import DEFAULT_ALIGNMENT, FILE_TYPES
from pyggml.gguf.synth import drawn_type, fitting_type, random_ids, random_tensor
from pyggml.gguf.writer import Progress, Tensor, write
from pyggml.models.base import Architecture
from pyggml.models.known import tensor_sizes
from pyggml.renamed import refuses_old_keywords

#: The tensor, in a layer of DeepSeek V4, of each token's experts.
IDS = "ffn_gate_tid2eid.weight"


@refuses_old_keywords
def synth(
    path: str | PathLike[str],
    arch: Architecture,
    *,
    dtype: str = "iq4_nl",
    seed: int = 0,
    name: str = "random",
    header_only: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write a GGUF file of the model with random weights, and return its size in bytes.

    Matrices have a standard deviation of 1/sqrt(fan-in); norms and rope_freqs are about 1. Vectors
    are f32, and so are the router, indexer.proj, and what hyper-connections and compressors
    (DeepSeek V4) have in f32. Rows that are not whole blocks of `dtype` become q8_0, or f16.
    output.weight is q6_K if `dtype` has fewer bits, as quantizers do it. With mxfp4, only experts
    have it and the others are q8_0.
    """
    if seed < 0:
        raise ShapeError(f"seed must not be negative, got {seed}")
    preferred = drawn_type(dtype)
    tensors = list(random_tensors(arch, preferred, seed))
    general: dict[str, Any] = {
        "general.architecture": arch.name,
        "general.name": name,
        "general.alignment": DEFAULT_ALIGNMENT,
        "general.file_type": FILE_TYPES[preferred.name],
        "general.quantization_version": 2,
    }
    fields = general | arch.fields() | _vocabulary(arch.n_vocab)
    return write(path, fields, tensors, header_only=header_only, progress=progress)


def random_tensors(arch: Architecture, preferred: DType, seed: int) -> Iterator[Tensor]:
    """The tensors of the model with random values, their types chosen as `synth` describes."""
    sizes = tensor_sizes(arch)
    for name, ne in sizes.items():
        leaf = leaf_of(name)
        if leaf == IDS:
            yield random_ids(name, ne, end=sizes[router_of(name)][1], seed=seed)
        else:
            std, mean = scale_of(leaf, ne)
            type_ = fitting_type(_type_of(leaf, ne, preferred), ne[0])
            yield random_tensor(name, type_, ne, std=std, mean=mean, seed=seed)


def leaf_of(name: str) -> str:
    """A tensor's name in its layer."""
    return name.split(".", 2)[-1] if name.startswith("blk.") else name


def router_of(name: str) -> str:
    """The router of a layer's `IDS`: it has a row for each expert."""
    return name.replace("_tid2eid", "_inp")


def scale_of(leaf: str, ne: tuple[int, ...]) -> tuple[float, float]:
    """The standard deviation and the mean of a tensor's random values."""
    if _is_factor(leaf):
        return 0.05, 1.0
    if len(ne) < 2 or leaf.endswith(".bias"):
        return 0.05, 0.0
    # attn_k_b is stored transposed: the model sums over its ne[1].
    fan_in = ne[1] if leaf == "attn_k_b.weight" else ne[0]
    return fan_in**-0.5, 0.0


def _is_factor(leaf: str) -> bool:
    return leaf.endswith("norm.weight") or leaf == "rope_freqs.weight"


def _type_of(leaf: str, ne: tuple[int, ...], preferred: DType) -> DType:
    in_f32 = leaf in ("ffn_gate_inp.weight", "indexer.proj.weight") or "hc_" in leaf
    if in_f32 or len(ne) < 2 or leaf.endswith((".bias", "_ape.weight")) or _is_factor(leaf):
        return F32
    if preferred.name == "mxfp4" and "_exps." not in leaf:
        return TYPES["q8_0"]  # as in the published files of gpt-oss
    q6 = TYPES["q6_K"]
    if leaf == "output.weight" and preferred.nbytes * q6.block < q6.nbytes * preferred.block:
        return q6
    return preferred


#: A conversation as <s>role: text</s> for each message.
_CHAT = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def _vocabulary(n_vocab: int) -> dict[str, Any]:
    """A tokenizer for any text: BOS, EOS, the bytes, one merge, and placeholders <258>, <259>, ...

    A small n_vocab has only a part of them.
    """
    tokens = ["<s>", "</s>", "a", "b", "ab"]
    tokens += [char for char in byte_characters() if char not in tokens]
    tokens = [*tokens, *(f"<{i}>" for i in range(len(tokens), n_vocab))][:n_vocab]
    types = np.ones(n_vocab, np.int32)
    types[:2] = 3  # control
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": _CHAT,
    }

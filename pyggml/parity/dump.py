"""Dumps: tensors of a run of another engine, by name, and the labels that pyggml has for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from pyggml import gguf
from pyggml.errors import GGUFError
from pyggml.gguf import GGUFFile
from pyggml.gguf.replaced import put, replaced
from pyggml.parity.alone import Array
from pyggml.quants import decode_rows

#: Our label -> names of llama.cpp's graph, the one that is nearest to ours first. In layers, both
#: end in the layer's number (`l_out-0`). Labels that are not here are the same in llama.cpp.
LLAMA_CPP: Mapping[str, tuple[str, ...]] = {
    "inp_embd": ("inp_embd", "embd"),
    "kqv": ("__fattn__", "fattn", "kqv"),
    "ffn_norm": ("ffn_norm", "attn_post_norm"),
    "ffn_moe_weights": ("ffn_moe_weights_scaled", "ffn_moe_weights_norm", "ffn_moe_weights"),
    "ffn_moe_hidden": ("ffn_moe_swiglu", "ffn_moe_swiglu_oai", "ffn_moe_gate_par"),
}
#: Our label -> names of modules in transformers, whose results they are. `*` is a layer's number.
#: q_proj and k_proj are not here: our labels are those of the rotated heads.
TRANSFORMERS: Mapping[str, tuple[str, ...]] = {
    "inp_embd": ("model.embed_tokens",),
    "attn_norm-*": ("model.layers.*.input_layernorm",),
    "kv_cmpr_pe-*": ("model.layers.*.self_attn.kv_a_proj_with_mqa",),
    "kv_cmpr-*": ("model.layers.*.self_attn.kv_a_layernorm",),
    "Vcur-*": ("model.layers.*.self_attn.v_proj",),
    "attn_out-*": ("model.layers.*.self_attn.o_proj", "model.layers.*.self_attn"),
    "ffn_norm-*": ("model.layers.*.post_attention_layernorm",),
    "ffn_shexp-*": ("model.layers.*.mlp.shared_experts",),
    "ffn_out-*": ("model.layers.*.mlp",),
    "l_out-*": ("model.layers.*",),
    "result_norm": ("model.norm",),
    "result_output": ("lm_head",),
}
#: Name of the tokens in a dump.
TOKENS = "tokens"


def names_for(label: str) -> tuple[str, ...]:
    """The names that a dump may have for one of our labels, the best one first."""
    match = re.fullmatch(r"(.*)-(\d+)", label)
    kind, layer = (match[1], match[2]) if match else (label, None)
    end = "" if layer is None else "-*"
    names = [f"{name}{end}" for name in LLAMA_CPP.get(kind, (kind,))]
    names += TRANSFORMERS.get(f"{kind}{end}", ())
    return tuple(name.replace("*", layer or "*") for name in names)


def read_dump(path: Path) -> dict[str, Array]:
    """The tensors of an .npz or GGUF file by name, in NumPy's order of dimensions.

    Errors: GGUFError for a file that is neither; OSError.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        with gguf.open(path) as dump:
            return {name: _values(dump, name) for name in dump.tensors}
    if magic[:2] != b"PK":
        raise GGUFError(f"{path}: a dump is an .npz file of NumPy or a GGUF file")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, BadZipFile) as error:
        raise GGUFError(f"{path}: {error}") from None


def write_dump(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write an .npz file, which appears when it is complete."""
    content = BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    with replaced(path, content.getbuffer().nbytes) as file:
        put(file, content.getbuffer())


def _values(dump: GGUFFile, name: str) -> Array:
    """A tensor of a GGUF file as numbers."""
    dtype, array = dump.tensors[name].dtype, dump.array(name)
    return np.array(array if dtype.numpy is not None else decode_rows(dtype, array))


class Fitted(NamedTuple):
    """Two arrays of one shape, and a note on how they got it."""

    ours: Array
    theirs: Array
    note: str


def fitted(ours: Array, theirs: Array) -> list[Fitted]:
    """Both arrays in one shape, in every way that fits; empty if they are different tensors.

    Engines differ in dimensions of size 1, in whether heads are a dimension and whether it is
    before or after that of tokens, and some compute only the last rows of what pyggml computes for
    all tokens.
    """
    a, b = np.squeeze(ours), np.squeeze(theirs)
    ways = []
    if a.size == b.size and (a.shape == b.shape or a.shape[:1] == b.shape[:1]):
        ways.append(Fitted(a, b.reshape(a.shape), ""))
    if a.ndim == b.ndim == 3 and a.shape == b.swapaxes(0, 1).shape:
        ways.append(Fitted(a, b.swapaxes(0, 1), "heads and tokens swapped"))
    a, b = np.atleast_2d(a), np.atleast_2d(b)
    rows = len(b)
    if not ways and rows < len(a) and a[0].size == b[0].size:
        what = "row" if rows == 1 else f"{rows} rows"
        ways.append(Fitted(a[-rows:], b.reshape(a[-rows:].shape), f"the last {what}"))
    return ways

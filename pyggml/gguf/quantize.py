"""Converting the weights of a file to another type."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from os import PathLike
from typing import Any

import numpy as np

from pyggml import dtypes
from pyggml.dtypes import TYPES, DType, DTypeLike
from pyggml.errors import DTypeError, GGUFError
from pyggml.gguf.format import DEFAULT_ALIGNMENT, FILE_TYPES, TensorInfo
from pyggml.gguf.reader import GGUFFile
from pyggml.gguf.synth import fitting_type
from pyggml.gguf.writer import Progress, Tensor, write
from pyggml.quants import DECODABLE, ENCODABLE, decode_rows, encode_rows
from pyggml.renamed import refuses_old_keywords

#: Types of `quantize`, the largest first.
QUANTIZABLE: tuple[str, ...] = tuple(
    sorted(ENCODABLE, key=lambda name: (-TYPES[name].nbytes / TYPES[name].block, name))
)
_CHUNK_ELEMENTS = 1 << 20


@refuses_old_keywords
def quantize(
    file: GGUFFile,
    path: str | PathLike[str],
    dtype: DTypeLike,
    *,
    requantize: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write a copy of an open file with its matrices in another type; return its bytes.

    As in llama-quantize, vectors, norms, biases and the router keep their type, and output.weight
    (or token_embd.weight, if it is the output matrix, too) is larger than the rest: q8_0 for types
    of fewer bits, in place of llama-quantize's q6_K, which pyggml cannot encode. A row that is not
    whole blocks of the type becomes q8_0, or f16.

    requantize  convert block types, too, which loses quality twice; otherwise they are an error
    Errors: DTypeError for a type that pyggml cannot encode; GGUFError for a tensor that it cannot
    decode, or that already has a block type; OSError. Then `path` is as before.
    """
    target = dtypes.dtype(dtype)
    if target.name not in ENCODABLE:
        raise DTypeError(f"cannot encode {target}; choose from {', '.join(QUANTIZABLE)}")
    head = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
    tensors = []
    for info in file.tensors.values():
        new = _type_of(info, target, is_head=info.name == head)
        _check(file, info, new, requantize)
        tensors.append(Tensor(info.name, new, info.ne, partial(_chunks, file, info, new)))
    fields: dict[str, Any] = {
        key: value for key, value in file.typed_fields().items() if not key.startswith("split.")
    }
    if "general.alignment" in fields:
        fields["general.alignment"] = np.uint32(DEFAULT_ALIGNMENT)
    fields["general.file_type"] = np.uint32(FILE_TYPES[target.name])
    fields["general.quantization_version"] = np.uint32(2)
    return write(path, fields, tensors, progress=progress)


def _type_of(info: TensorInfo, target: DType, *, is_head: bool) -> DType:
    """The type of a tensor in the new file."""
    name = info.name
    if (
        len([n for n in info.ne if n > 1]) < 2
        or not name.endswith(".weight")
        or name.endswith(("norm.weight", "ffn_gate_inp.weight"))
        or info.dtype.kind not in ("float", "block")
    ):
        return info.dtype
    if is_head and _bits(target) < _bits(TYPES["q6_K"]):
        target = TYPES["q8_0"]
    return fitting_type(target, info.ne[0])


def _bits(type: DType) -> float:
    """Bits of an element."""
    return 8 * type.nbytes / type.block


def _check(file: GGUFFile, info: TensorInfo, new: DType, requantize: bool) -> None:
    if info.dtype == new:
        return
    if info.dtype.name not in DECODABLE:
        raise GGUFError(f"{file.paths[0]}: tensor {info.name!r}: cannot decode {info.dtype}")
    if info.dtype.kind == "block" and not requantize:
        raise GGUFError(
            f"{file.paths[0]}: tensor {info.name!r} is {info.dtype} already; converting it to "
            f"{new} loses quality twice. Use the original file, or requantize (--allow-requantize)"
        )


def _chunks(file: GGUFFile, info: TensorInfo, new: DType) -> Iterator[np.ndarray[Any, Any]]:
    array = file.array(info.name)
    rows = array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)
    count = max(_CHUNK_ELEMENTS // max(info.ne[0] if info.ne else 1, 1), 1)
    for start in range(0, len(rows), count):
        part = rows[start : start + count]
        yield part if info.dtype == new else encode_rows(new, decode_rows(info.dtype, part))

"""Operands as f32: kernels convert parts of them into scratch, and parts of results back."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.host_memory import Array, Floats, Raw, Scratch, aligned, raw_of, shape_of
from pyggml.backends.numpy.tiling import shaped
from pyggml.dtypes import F32, DType
from pyggml.node import Node
from pyggml.quants import decode, encode, work_bytes

#: Work memory of a codec; None if no type needs one.
Work = NDArray[np.uint8] | None


def load(dtype: DType, part: Raw, out: Raw, work: Work) -> Raw:
    """Fill `out` with the values of `part`, a part of a raw array of this type; returns `out`."""
    if dtype is F32 or dtype.kind == "int":
        np.copyto(out, part, casting="unsafe")
    else:
        decode(dtype, part, out, work=work)
    return out


def store(dtype: DType, values: Raw, part: Raw, work: Work) -> None:
    """Fill `part`, a part of a raw array of this type, with `values`."""
    if dtype.numpy is not None:
        np.copyto(part, values, casting="unsafe")
    else:
        encode(dtype, values, part, work=work)


def decoded(dtype: DType, part: Raw, memory: Raw, work: Work) -> Floats:
    """The values of a part of a raw array as f32, contiguous at the start of `memory`."""
    shape = part.shape
    if dtype.block > 1:
        shape = (*shape[:-2], shape[-2] * dtype.block)
    return load(dtype, part, shaped(memory, *shape), work)


def codec_bytes(*tensors: Node | None) -> int:
    """Bytes of scratch that `work_of` takes for the operands of these nodes."""
    return _codec_bytes([(t.dtype, t.spec.elements) for t in tensors if t is not None])


def work_of(scratch: Scratch, *operands: Array | None) -> Work:
    """Work memory for a codec that converts these operands; None if no operand needs one."""
    arrays = [x for x in operands if x is not None]
    size = _codec_bytes([(raw_of(x)[0], prod(shape_of(x))) for x in arrays])
    return scratch.array(size, np.uint8) if size else None


def _codec_bytes(operands: list[tuple[DType, int]]) -> int:
    """Bytes of work memory for operands of these types and numbers of elements."""
    elements = sum(n for dtype, n in operands if dtype is not F32 and dtype.kind != "int")
    return aligned(work_bytes(elements)) if elements else 0

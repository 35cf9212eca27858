"""Arrays from the user: those of the host turned into what a tensor stores, those of devices
checked, since nothing is converted there."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyggml.backends.base import Given
from pyggml.dtypes import DType
from pyggml.errors import DTypeError, ShapeError
from pyggml.node import Spec
from pyggml.quants import encode_rows


def raw_type(kind: DType) -> np.dtype[Any]:
    """NumPy's type of what is stored of a type that NumPy has not."""
    return np.dtype(np.uint16 if kind.block == 1 else np.uint8)


def raw_shape(spec: Spec) -> tuple[int, ...]:
    """NumPy shape of the stored array: the last size in bytes for block types."""
    kind = spec.dtype
    if kind.block == 1:
        return spec.shape
    return (*spec.shape[:-1], kind.row_bytes(spec.ne[0]))


def stored(what: str, spec: Spec, array: ArrayLike) -> NDArray[Any]:
    """An array of the host as the type is stored; errors say what was expected.

    Floats go into every float and block type, whole numbers into integer types if they fit;
    bf16 and block types also take their raw rows (uint16, uint8).
    """
    try:
        given = np.asanyarray(array)
    except (ValueError, TypeError, RuntimeError) as error:  # CuPy's and PyTorch's say how to copy
        raise DTypeError(f"{what}: no array can be made of it: {error}") from None
    if isinstance(given, np.ma.MaskedArray) or given.dtype.kind not in "fiu":
        raise DTypeError(f"{what} takes {spec}; it got an array of {given.dtype}")
    kind = spec.dtype
    if kind.numpy is None and given.dtype == raw_type(kind):
        _want_shape(what, spec, given.shape, raw_shape(spec))
        return np.ascontiguousarray(given)
    _want_shape(what, spec, given.shape, spec.shape)
    if kind.kind == "int":
        if given.dtype.kind == "f":
            raise DTypeError(f"{what} takes {spec}; it got {given.dtype}: give whole numbers")
        limit = np.iinfo(kind.numpy or "i4")
        if given.size and (given.min() < limit.min or given.max() > limit.max):
            raise DTypeError(f"{what}: values do not fit in {kind}")
    if kind.numpy is not None:
        return np.ascontiguousarray(given, dtype=kind.numpy)
    return encode_rows(kind, np.ascontiguousarray(given, dtype=np.float32))


def check(what: str, spec: Spec, given: Given) -> None:
    """ShapeError or DTypeError unless an array can be read as it lies in its device's memory."""
    kind = spec.dtype
    types = [np.dtype(kind.numpy or raw_type(kind)).name]
    if kind.name == "bf16":
        types.append("bfloat16")
    if given.type not in types:
        raise DTypeError(
            f"{what} takes {spec}; it got an array of {given.type}, and nothing is converted where "
            f"it lies: give {' or '.join(types)}"
        )
    _want_shape(what, spec, given.shape, raw_shape(spec))
    if not given.contiguous:
        raise ShapeError(
            f"{what} takes {spec} without gaps, in C order; the array's strides differ: make a "
            "contiguous copy of it"
        )


def _want_shape(what: str, spec: Spec, given: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if given != shape:
        raise ShapeError(f"{what} takes {spec}, NumPy shape {shape}; it got NumPy shape {given}")

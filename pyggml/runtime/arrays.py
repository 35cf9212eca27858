"""The caller's arrays: host arrays are converted to what a tensor stores, device arrays checked.

Foreign arrays need no API of their own: `bind(x=array)` uses their memory, and `views` returns
outputs where they are. An output on a GPU is a small object that other libraries read by DLPack
or `__cuda_array_interface__`, so pyggml needs none of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyggml.backends.base import Given
from pyggml.dtypes import DType
from pyggml.errors import DTypeError, ShapeError
from pyggml.quants import encode_rows
from pyggml.spec import Spec


def raw_type(dtype: DType) -> np.dtype[Any]:
    """NumPy's type for raw rows of a type that NumPy lacks: uint16 for bf16, uint8 for blocks."""
    return np.dtype(np.uint16 if dtype.block == 1 else np.uint8)


def raw_shape(spec: Spec) -> tuple[int, ...]:
    """The NumPy shape of the stored array; for block types the last size is in bytes."""
    if spec.dtype.block == 1:
        return spec.shape
    return (*spec.shape[:-1], spec.dtype.row_bytes(spec.ne[0]))


def stored(what: str, spec: Spec, array: ArrayLike) -> NDArray[Any]:
    """A host array in the form that the tensor's type stores.

    Float and block types take floats, integer types whole numbers that fit; bf16 and block types
    also take raw rows (uint16, uint8).
    Errors: DTypeError for the type or the values, ShapeError for the shape.

    what  the tensor, for error messages
    """
    try:
        values = np.asanyarray(array)
    except (ValueError, TypeError, RuntimeError) as error:
        # The messages of CuPy and PyTorch tell the user how to copy an array to the host.
        raise DTypeError(f"{what}: cannot convert it to a NumPy array: {error}") from None
    if isinstance(values, np.ma.MaskedArray) or values.dtype.kind not in "fiu":
        raise DTypeError(f"{what}: expected {spec}, got an array of {values.dtype}")
    dtype = spec.dtype
    if dtype.numpy is None and values.dtype == raw_type(dtype):
        _want_shape(what, spec, values.shape, raw_shape(spec))
        return np.ascontiguousarray(values)
    _want_shape(what, spec, values.shape, spec.shape)
    if dtype.kind == "int":
        if values.dtype.kind == "f":
            raise DTypeError(f"{what}: expected {spec}, got {values.dtype}; pass whole numbers")
        limit = np.iinfo(dtype.numpy or "i4")
        if values.size and (values.min() < limit.min or values.max() > limit.max):
            raise DTypeError(f"{what}: values do not fit in {dtype}")
    if dtype.numpy is not None:
        return np.ascontiguousarray(values, dtype=dtype.numpy)
    return encode_rows(dtype, np.ascontiguousarray(values, dtype=np.float32))


def check(what: str, spec: Spec, array: Given) -> None:
    """ShapeError or DTypeError unless a device array has exactly the form that the tensor stores.

    Arrays in a device's memory are never converted.
    """
    dtype = spec.dtype
    types = [np.dtype(dtype.numpy or raw_type(dtype)).name]
    if dtype.name == "bf16":
        types.append("bfloat16")
    if array.type not in types:
        raise DTypeError(
            f"{what}: expected {spec}, got an array of {array.type}; arrays in a device's memory "
            f"are not converted, so pass {' or '.join(types)}"
        )
    _want_shape(what, spec, array.shape, raw_shape(spec))
    if not array.contiguous:
        raise ShapeError(
            f"{what}: expected {spec}, contiguous in C order, but the array has other strides; "
            "pass a contiguous copy"
        )


def _want_shape(what: str, spec: Spec, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise ShapeError(
            f"{what}: expected {spec}, NumPy shape {expected}, got NumPy shape {shape}"
        )

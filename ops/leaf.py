"""Leaves: constants, inputs and states. What a graph reads and what outlives a run."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyggml.dtypes import TYPES, DType, DTypeLike
from pyggml.dtypes import dtype as dtype_of
from pyggml.errors import DTypeError, ShapeError
from pyggml.node import Node, Op, Spec, integers, located
from pyggml.node import label as add_label
from pyggml.quants import DECODABLE, encode_rows

__all__ = ["constant", "input", "state"]

_GRAPH_TYPES = DECODABLE | {"i32", "i64"}
_BY_NUMPY = {np.dtype(t.numpy): t for t in TYPES.values() if t.numpy and t.name in _GRAPH_TYPES}

# What a constant holds. A side table: two constants of equal bytes are still two tensors.
_data: WeakKeyDictionary[Node, NDArray[Any]] = WeakKeyDictionary()


def _leaf(*, name: str | None, made: Spec) -> Spec:
    return made


constant_op = Op(_leaf, name="constant", leaf=True)
input_op = Op(_leaf, name="input", leaf=True)
state_op = Op(_leaf, name="state", leaf=True)
piece_op = Op(_leaf, name="piece", leaf=True)


def _build(kind: Op[Any], label: str | None, made: Spec) -> Node:
    node = kind.make((), {"name": label}, made)
    return add_label(node, label) if label else node


def _named(kind: str, label: str) -> None:
    if not isinstance(label, str) or not label:
        raise DTypeError(f"{kind} needs a name, a string that is not empty; got {label!r}")


def _sizes(
    what: str, dtype: DTypeLike, ne: tuple[int, ...] | None, shape: tuple[int, ...] | None
) -> Spec:
    if (ne is None) == (shape is None):
        raise ShapeError(f"{what}: give exactly one of ne= (ggml's order) and shape= (NumPy's)")
    kind = dtype_of(dtype)
    if kind.name not in _GRAPH_TYPES:
        raise DTypeError(f"{what}: type {kind} cannot stand in a graph; cast it to f32 or i32")
    sizes = integers(f"{what}: {'shape' if ne is None else 'ne'}=", shape if ne is None else ne)
    try:
        return Spec.of(kind, sizes if ne is not None else sizes[::-1])
    except ShapeError as error:
        raise ShapeError(f"{what}: {error}") from None


@located
def input(
    name: str,
    dtype: DTypeLike = "f32",
    *,
    ne: tuple[int, ...] | None = None,
    shape: tuple[int, ...] | None = None,
) -> Node:
    """A tensor that the caller gives to every run, under `name`.

    ne or shape   its size, in ggml's or in NumPy's order
    Errors: ShapeError (sizes), DTypeError (type, name).
    """
    _named("input", name)
    return _build(input_op, name, _sizes(f"input {name!r}", dtype, ne, shape))


@located
def state(
    name: str,
    dtype: DTypeLike = "f32",
    *,
    ne: tuple[int, ...] | None = None,
    shape: tuple[int, ...] | None = None,
) -> Node:
    """A tensor that outlives runs, such as a KV cache.

    It starts as zeros; `set_rows` and `cpy` write it. Plans of one store share states by name.
    """
    _named("state", name)
    return _build(state_op, name, _sizes(f"state {name!r}", dtype, ne, shape))


@located
def constant(array: ArrayLike, *, dtype: DTypeLike | None = None, name: str | None = None) -> Node:
    """A weight: an array that never changes. It is read in place: do not write to it later.

    array  NumPy shape, C order. Without `dtype` its own type counts (float64 becomes f32).
           For bf16 and block types either the raw bytes (uint16 or uint8 [..., bytes of a row])
           as a GGUF file holds them, or floats, which are encoded here.
    """
    what = f"constant {name!r}" if name else "constant"
    try:
        held = np.asanyarray(array)
    except ValueError as error:
        raise DTypeError(f"{what}: no array can be made of it: {error}") from None
    if isinstance(held, np.ma.MaskedArray) or held.dtype.kind not in "fiub":
        raise DTypeError(f"{what}: cannot hold {held.dtype} values; give real numbers")
    if held.ndim == 0:
        held = held.reshape(1)
    kind = dtype_of(dtype) if dtype is not None else _BY_NUMPY.get(held.dtype)
    if kind is None:
        if held.dtype.kind != "f":
            raise DTypeError(f"{what}: an array of {held.dtype} has no type here; give dtype=")
        kind = dtype_of("f32")
    held, shape = _held(what, held, kind)
    node = _build(constant_op, name, _sizes(what, kind, None, shape))
    held = held.view()
    held.flags.writeable = False
    _data[node] = held
    return node


def _held(what: str, array: NDArray[Any], kind: DType) -> tuple[NDArray[Any], tuple[int, ...]]:
    """The array as the type is stored, and its NumPy shape in elements."""
    if kind.numpy is not None:
        if kind.kind == "int" and array.dtype.kind == "f":
            raise DTypeError(f"{what}: type {kind} takes whole numbers, not {array.dtype}")
        if kind.kind == "int" and array.size:
            limit = np.iinfo(kind.numpy)
            if array.min() < limit.min or array.max() > limit.max:
                raise DTypeError(f"{what}: values do not fit in {kind}")
        return np.ascontiguousarray(array, dtype=kind.numpy), array.shape
    raw = np.uint16 if kind.block == 1 else np.uint8
    if array.dtype == raw:
        row = array.shape[-1]
        unit = 1 if kind.block == 1 else kind.nbytes
        if row % unit:
            raise ShapeError(
                f"{what}: rows of {row} bytes are not whole {kind} blocks of {kind.nbytes} bytes"
            )
        return np.ascontiguousarray(array), (*array.shape[:-1], row // unit * kind.block)
    if array.dtype.kind != "f":
        raise DTypeError(f"{what}: type {kind} takes floats or raw {np.dtype(raw)}")
    kind.row_bytes(array.shape[-1])
    return encode_rows(kind, np.ascontiguousarray(array, dtype=np.float32)), array.shape


def data_of(node: Node) -> NDArray[Any]:
    """The array that a constant holds: NumPy shape, or raw bytes [..., bytes of a row]."""
    return _data[node]

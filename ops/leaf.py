"""Leaves: constants, inputs and states."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyggml.arguments import located
from pyggml.dtypes import TYPES, DType, DTypeLike
from pyggml.dtypes import dtype as dtype_of
from pyggml.errors import DTypeError, ShapeError
from pyggml.node import Node
from pyggml.node import label as add_label
from pyggml.operation import Op
from pyggml.quants import DECODABLE, encode_rows
from pyggml.spec import Ne, Spec, integers

__all__ = ["constant", "input", "state"]

_GRAPH_TYPES = DECODABLE | {"i32", "i64"}
_BY_NUMPY = {np.dtype(t.numpy): t for t in TYPES.values() if t.numpy and t.name in _GRAPH_TYPES}

Load: TypeAlias = Callable[[], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Derived:
    """How a derived constant is computed from other constants.

    key      the expression, in which a weight with a name is its name
    source   the expression, in which a weight is where its values come from
    weights  the constants in it
    compute  returns a new array in the stored form
    """

    key: Hashable
    source: Hashable
    weights: tuple[Node, ...]
    compute: Load

    def values(self) -> NDArray[Any]:
        """The array, which is kept only while somebody uses it."""
        values = _computed.get(self.source)
        if values is None:
            values = self.compute()
            values.flags.writeable = False
            _computed[self.source] = values
        return values.view()


# Constant -> its array, or what reads or computes it. Not an attribute: two constants with equal
# bytes are still two nodes.
_data: WeakKeyDictionary[Node, NDArray[Any] | Load | Derived] = WeakKeyDictionary()
# Constant -> where its values come from, if that is known.
_sources: WeakKeyDictionary[Node, Hashable] = WeakKeyDictionary()
# Source -> the array of a derived constant, as long as somebody uses it.
_computed: WeakValueDictionary[Hashable, NDArray[Any]] = WeakValueDictionary()


def _leaf(*, name: str | None, spec: Spec) -> Spec:
    return spec


constant_op = Op(_leaf, name="constant", leaf=True)
input_op = Op(_leaf, name="input", leaf=True)
state_op = Op(_leaf, name="state", leaf=True)
piece_op = Op(_leaf, name="piece", leaf=True)


def _build(op: Op[Any], label: str | None, spec: Spec) -> Node:
    node = op.make((), {"name": label}, spec)
    return add_label(node, label) if label else node


def _want_name(op_name: str, name: str) -> None:
    if not isinstance(name, str) or not name:
        raise DTypeError(f"{op_name} needs a name, a string that is not empty; got {name!r}")


def _sizes(
    what: str, dtype: DTypeLike, ne: tuple[int, ...] | None, shape: tuple[int, ...] | None
) -> Spec:
    if (ne is None) == (shape is None):
        raise ShapeError(f"{what}: give exactly one of ne= (ggml's order) and shape= (NumPy's)")
    element = dtype_of(dtype)
    if element.name not in _GRAPH_TYPES:
        raise DTypeError(f"{what}: graphs have no type {element}; convert it to f32 or i32")
    sizes = integers(f"{what}: {'shape' if ne is None else 'ne'}=", shape if ne is None else ne)
    try:
        return Spec.of(element, sizes if ne is not None else sizes[::-1])
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
    """A tensor that the caller passes to every run, as `name`.

    ne or shape   its size, in ggml's or in NumPy's order
    Errors: ShapeError for sizes, DTypeError for the type or the name.
    """
    _want_name("input", name)
    return _build(input_op, name, _sizes(f"input {name!r}", dtype, ne, shape))


@located
def state(
    name: str,
    dtype: DTypeLike = "f32",
    *,
    ne: tuple[int, ...] | None = None,
    shape: tuple[int, ...] | None = None,
) -> Node:
    """A tensor that keeps its values between runs, such as a KV cache.

    It starts as zeros; `set_rows` and `cpy` write it. Plans of one store share states by name.
    ne or shape   its size, in ggml's or in NumPy's order
    Errors: ShapeError for sizes, DTypeError for the type or the name.
    """
    _want_name("state", name)
    return _build(state_op, name, _sizes(f"state {name!r}", dtype, ne, shape))


@located
def constant(array: ArrayLike, *, dtype: DTypeLike | None = None, name: str | None = None) -> Node:
    """A weight: an array that never changes. It is not copied, so do not write to it afterwards.

    array  NumPy shape, C order. For bf16 and block types either the raw rows of a GGUF file
           (uint16 or uint8 [..., bytes of a row]), or floats, which are encoded here
    dtype  the array's type by default; float64 becomes f32
    Errors: DTypeError for the array, the type or values that do not fit it; ShapeError for sizes.
    """
    what = f"constant {name!r}" if name else "constant"
    try:
        values = np.asanyarray(array)
    except ValueError as error:
        raise DTypeError(f"{what}: cannot convert it to an array: {error}") from None
    if isinstance(values, np.ma.MaskedArray) or values.dtype.kind not in "fiub":
        raise DTypeError(f"{what}: expected real numbers, got {values.dtype}")
    if values.ndim == 0:
        values = values.reshape(1)
    element = dtype_of(dtype) if dtype is not None else _BY_NUMPY.get(values.dtype)
    if element is None:
        if values.dtype.kind != "f":
            raise DTypeError(f"{what}: no tensor type corresponds to {values.dtype}; give dtype=")
        element = dtype_of("f32")
    data, shape = _stored(what, values, element)
    node = _build(constant_op, name, _sizes(what, element, None, shape))
    data = data.view()
    data.flags.writeable = False
    _data[node] = data
    return node


def _stored(what: str, array: NDArray[Any], dtype: DType) -> tuple[NDArray[Any], tuple[int, ...]]:
    """The array in the form that `dtype` stores, and its NumPy shape in elements."""
    if dtype.numpy is not None:
        if dtype.kind == "int" and array.dtype.kind == "f":
            raise DTypeError(f"{what}: type {dtype} takes whole numbers, not {array.dtype}")
        if dtype.kind == "int" and array.size:
            limit = np.iinfo(dtype.numpy)
            if array.min() < limit.min or array.max() > limit.max:
                raise DTypeError(f"{what}: values do not fit in {dtype}")
        return np.ascontiguousarray(array, dtype=dtype.numpy), array.shape
    raw = np.uint16 if dtype.block == 1 else np.uint8
    if array.dtype == raw:
        row = array.shape[-1]
        unit = 1 if dtype.block == 1 else dtype.nbytes
        if row % unit:
            raise ShapeError(
                f"{what}: rows of {row} bytes are not whole {dtype} blocks of {dtype.nbytes} bytes"
            )
        return np.ascontiguousarray(array), (*array.shape[:-1], row // unit * dtype.block)
    if array.dtype.kind != "f":
        raise DTypeError(f"{what}: type {dtype} takes floats or raw rows of {np.dtype(raw)}")
    dtype.row_bytes(array.shape[-1])
    return encode_rows(dtype, np.ascontiguousarray(array, dtype=np.float32)), array.shape


def deferred(
    load: Load, *, dtype: DType, ne: tuple[int, ...], name: str, source: Hashable = None
) -> Node:
    """A weight whose array is read when it is first needed, by `load`; a plan needs only its size.

    load    returns the stored form: NumPy shape, or raw rows for bf16 and block types
    source  where the bytes come from: equal sources hold equal bytes
    """
    node = _build(constant_op, name, _sizes(f"constant {name!r}", dtype, ne, None))
    _data[node] = load
    if source is not None:
        _sources[node] = source, node.spec
    return node


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a tensor: its first element, its sizes and its steps, in ne order.

    name, spec  of the whole tensor
    """

    name: str | None
    spec: Spec
    start: Ne
    ne: Ne
    step: Ne

    @property
    def index(self) -> tuple[slice, ...]:
        """The part as slices of the whole's array, in NumPy order; blocks of axis 0 are whole."""
        dtype = self.spec.dtype
        units = [1, 1, 1, 1]
        if dtype.numpy is None and dtype.block > 1:  # raw rows: bytes
            units[0] = dtype.block
        scale = dtype.nbytes if units[0] > 1 else 1
        sizes = [
            slice(s // u * f, s // u * f + ((n - 1) * by // u + 1) * f, by if f == 1 else 1)
            for s, n, by, u, f in zip(self.start, self.ne, self.step, units, (scale, 1, 1, 1))
        ]
        return tuple(sizes[self.spec.rank - 1 :: -1])

    def __str__(self) -> str:
        cut = [
            f"ne{axis} {s}::{by}" if by > 1 else f"ne{axis} {s}:{s + n}"
            for axis, (s, n, by) in enumerate(zip(self.start, self.ne, self.step))
            if n != self.spec.ne[axis]
        ]
        return f"[{', '.join(cut)}]"


def part_of(leaf: Node, rank: int, cut: tuple[Ne, Ne, Ne] | None = None) -> Node:
    """The leaf that device `rank` has in place of `leaf`: a part of it, or all.

    cut  start, sizes and steps of the part. That of a constant is a slice of its array, which is
         read when it is needed; states of different devices have different names
    """
    start, ne, step = cut or ((0, 0, 0, 0), leaf.ne, (1, 1, 1, 1))
    name = leaf.attrs["name"]
    region = Region(name, leaf.spec, start, ne, step)
    spec = Spec.of(leaf.dtype, ne, leaf.spec.rank)
    if leaf.op is state_op:
        name = f"{name}@{rank}"
    elif cut is not None and name is not None:
        name = f"{name}{region}"
    attrs = {"name": name, "rank": rank, "part": None if cut is None else region}
    if leaf.op is state_op:
        attrs["part"] = region
    new = leaf.op.make((), attrs, spec, line=False)
    if leaf.op is constant_op:
        _data[new] = partial(_sliced, leaf, region)
        _sources[new] = source_of(leaf) if cut is None else (source_of(leaf), region)
    return new


def _sliced(leaf: Node, region: Region) -> NDArray[Any]:
    """A part of a constant's array: a view, unless that has gaps."""
    return np.ascontiguousarray(data_of(leaf)[region.index])


def derived(spec: Spec, how: Derived) -> Node:
    """A constant without a name, whose array is computed when it is needed."""
    node = constant_op.make((), {"name": None}, spec, line=False)
    _data[node] = how
    _sources[node] = how.source
    return node


def derived_from(node: Node) -> tuple[Node, ...]:
    """The constants that a derived constant is computed from; none for other constants."""
    data = _data[node]
    return data.weights if isinstance(data, Derived) else ()


def shared_key(node: Node) -> Hashable:
    """Equal for constants that are one weight of a store: its name, or the expression that it is
    derived by. Any other constant without a name is its own key."""
    name: str | None = node.attrs["name"]
    if name is not None:
        return name
    data = _data[node]
    return data.key if isinstance(data, Derived) else node


def source_of(node: Node) -> Hashable:
    """Where the values of a constant come from. Constants with equal sources have equal values;
    one whose source is not known is its own source."""
    return _sources.get(node, node)


def data_of(node: Node) -> NDArray[Any]:
    """The array of a constant: NumPy shape, or raw bytes [..., bytes of a row]."""
    data = _data[node]
    if isinstance(data, Derived):
        return data.values()
    if callable(data):
        data = data().view()
        data.flags.writeable = False
        _data[node] = data
    return data

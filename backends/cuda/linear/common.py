"""Shared by the host functions of products: shapes, type names, kernel arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from pyggml.backends.cuda.argument import Struct, Tensor
from pyggml.backends.cuda.launch import Call, Operand
from pyggml.backends.cuda.table import ALIGNMENT
from pyggml.dtypes import F16, DType
from pyggml.ops.elementwise import ACTIVATIONS
from pyggml.spec import Ne

VEC, PREPARE = "linear_vec.cu", "linear_prepare.cu"
#: Columns of b up to which a product is bound by reading the weights. For matrices of more than
#: LARGE elements it is half as many (measured on an H200).
FEW = 8
LARGE = 8 << 20
#: The numbers of activations in kernel arguments.
ACT = {name: np.int32(("silu", "gelu", "relu").index(name)) for name in ACTIVATIONS}


class Heads(Struct):
    """The struct `Heads` of linear_common.cuh."""

    _fields_ = (("a2", ctypes.c_int32), ("r3", ctypes.c_int32), ("columns", ctypes.c_int32))


class Routing(Struct):
    """The struct `Routing` of linear_common.cuh: ids, experts, and the activations of a token."""

    _fields_ = (("ids", Tensor), ("experts", ctypes.c_int32), ("n_b", ctypes.c_int32))


class Columns(Struct):
    """The struct `Columns` of linear_common.cuh: `heads`, or the lists moe_group.cu makes from
    `routing`."""

    _fields_ = (
        ("tiles", ctypes.c_uint64),
        ("n_tiles", ctypes.c_uint64),
        ("order", ctypes.c_uint64),
        ("heads", Heads),
        ("routing", Routing),
    )


NO_HEADS = Heads(a2=0, r3=0, columns=0)
NO_ROUTING = Routing(ids=Tensor(data=0, nb=(0,) * 4, ne=(0,) * 4), experts=0, n_b=0)


@dataclass(frozen=True, slots=True)
class Shape:
    """Which columns of b multiply which matrix of a: `batches` matrices with `columns` columns
    each.

    A column is a row of b, counted through dimensions 1 to 3; the columns of a batch are adjacent.
    """

    batches: int
    columns: int
    a2: int
    r3: int

    @property
    def heads(self) -> Heads:
        """The kernel argument that maps columns to matrices."""
        return Heads(a2=self.a2, r3=self.r3, columns=self.columns)


def shape_of(a: Ne, b: Ne) -> Shape:
    if a[2] == a[3] == 1:
        return Shape(1, b[1] * b[2] * b[3], 1, 1)
    return Shape(a[2] * b[3], b[1] * (b[2] // a[2]), a[2], b[3] // a[3])


def in_blocks(dtype: DType) -> bool:
    """Whether it is a block type; the kernels decode all of them."""
    return dtype.kind == "block"


def aligned(*sizes: int) -> int:
    """Bytes of scratch for aligned blocks of these sizes."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def dense(ptr: int, ne: Ne, dtype: DType) -> Operand:
    """A contiguous tensor of a plain type."""
    size = dtype.nbytes
    row = size * ne[0]
    return Operand(ptr, ne, (size, row, row * ne[1], row * ne[1] * ne[2]), dtype)


def rows_in(ne: Ne) -> int:
    return prod(ne[1:])


def is_narrow(y: Operand) -> np.int32:
    return np.int32(y.dtype is F16)


def act_of(call: Call) -> np.int32:
    return ACT[call.attrs.get("act", "silu")]


def limit_of(attrs: Mapping[str, Any], matrices: int = 2) -> tuple[str, list[np.float32]]:
    """The limit of a gated unit, as the last template argument and as the last argument of a kernel
    that computes `matrices` products; nothing if there is no limit or no gate."""
    limit = attrs.get("limit")
    return ("", []) if limit is None or matrices == 1 else (", float", [np.float32(limit)])

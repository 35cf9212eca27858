"""What the host functions of products share: shapes, names of types, arguments."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod

import numpy as np

from pyggml.backends.cuda.launch import Call, Operand, Value
from pyggml.backends.cuda.table import ALIGNMENT
from pyggml.dtypes import F16, DType
from pyggml.node import Ne
from pyggml.ops.elementwise import ACTIVATIONS

VEC, PREPARE = "linear_vec.cu", "linear_prepare.cu"
#: Columns of b up to which reading the weights is all that counts; of a large matrix, measured on
#: an H200, up to half as many.
FEW = 8
LARGE = 8 << 20
#: Activations as kernels number them.
ACT = {name: np.int32(("silu", "gelu", "relu").index(name)) for name in ACTIVATIONS}


@dataclass(frozen=True, slots=True)
class Shape:
    """Which columns of b meet which matrix of a: `batches` matrices with `columns` each.

    Columns are the rows of b, dimensions 1 to 3 counted through; those of a batch are neighbours.
    """

    batches: int
    columns: int
    a2: int
    r3: int

    @property
    def heads(self) -> Value:
        """The struct `Heads`."""
        return Value(struct.pack("<3i", self.a2, self.r3, self.columns), 4)


def shape_of(a: Ne, b: Ne) -> Shape:
    if a[2] == a[3] == 1:
        return Shape(1, b[1] * b[2] * b[3], 1, 1)
    return Shape(a[2] * b[3], b[1] * (b[2] // a[2]), a[2], b[3] // a[3])


def is_few(a: Ne, b: Ne, exact: bool) -> bool:
    """Whether a product with a block type is `vec`'s: of few columns, or as good as f32."""
    columns = shape_of(a, b).columns
    return exact or columns <= (FEW if a[0] * a[1] <= LARGE else FEW // 2)


def in_blocks(kind: DType) -> bool:
    """Whether it is a block type: the kernels decode all of them."""
    return kind.kind == "block"


def aligned(*sizes: int) -> int:
    """Bytes of scratch for blocks of these sizes."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def dense(ptr: int, ne: Ne, kind: DType) -> Operand:
    """A tensor without gaps, of a plain type."""
    size = kind.nbytes
    row = size * ne[0]
    return Operand(ptr, ne, (size, row, row * ne[1], row * ne[1] * ne[2]), kind)


def rows_in(ne: Ne) -> int:
    return prod(ne[1:])


def is_narrow(y: Operand) -> np.int32:
    return np.int32(y.dtype is F16)


def act_of(call: Call) -> np.int32:
    return ACT[call.attrs.get("act", "silu")]

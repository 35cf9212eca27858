"""Products of f32 accuracy with few rows of weights and many columns: linear_exact.cu."""

from __future__ import annotations

import ctypes

import numpy as np

from pyggml.backends.cuda.argument import Struct, Tensor
from pyggml.backends.cuda.geometry import C_TYPES, over_rows
from pyggml.backends.cuda.gpu import H200
from pyggml.backends.cuda.launch import Call, Operand
from pyggml.backends.cuda.linear.common import PREPARE, aligned, dense, is_narrow, rows_in
from pyggml.dtypes import F32
from pyggml.ops.leaf import constant_op
from pyggml.spec import Ne

#: The most rows of weights: more of them are products that cuBLAS computes well.
MOST = 256
#: Rows of a block, columns of a warp, values of k of a chain.
ROWS, COLUMNS, DEPTH = 64, 16, 64
#: Columns from which a block has eight warps.
MANY = 1024
#: The most chains whose columns are on their way.
MOST_STAGES = 4


class Exact(Struct):
    """The struct `Exact` of linear_exact.cu."""

    _fields_ = (
        *((name, Tensor) for name in ("w", "x", "y")),
        *(
            (name, ctypes.c_int32)
            for name in (
                *("rows", "columns", "k", "depth", "parts", "stages", "paired", "resident"),
            )
        ),
    )


class Plan:
    """How the product is cut: `warps` of a block, `depth` values of k at a time, `parts` of so many
    in each of `splits`. It is the same on every GPU, so that sums are too."""

    def __init__(self, a: Ne, columns: int) -> None:
        self.warps = 8 if columns >= MANY else 4
        self.tiles = -(-columns // (COLUMNS * self.warps)), -(-a[1] // ROWS)
        tiles = self.tiles[0] * self.tiles[1]
        depth = 128 if tiles * -(-a[0] // 128) <= H200.sms else 256
        self.depth = min(depth, -(-a[0] // DEPTH) * DEPTH)
        parts = -(-a[0] // self.depth)
        self.parts = -(-parts // max(1, H200.sms // tiles))
        self.splits = -(-parts // self.parts)


def can_take(a: Ne) -> bool:
    """Whether the kernel takes weights of these sizes."""
    return a[1] <= MOST and a[2] == a[3] == 1


def scratch(a: Ne, b: Ne) -> int:
    """Size of the sums of all splits, in bytes."""
    columns = rows_in(b)
    return aligned(4 * a[1] * columns * Plan(a, columns).splits)


def launches(call: Call, a: Operand, b: Operand, y: Operand) -> None:
    """Record the product, and the sum over splits."""
    columns = rows_in(b.ne)
    resident = all(call.node[name].root.op is constant_op for name in call.node.op.weights)
    if Plan(a.ne, columns).splits == 1 and y.dtype is F32 and y.nb[0] == 4:
        launch(call, a, b, y, resident)
        return
    sums = launch(call, a, b, None, resident)
    rows, block = over_rows(a.ne[1], columns)
    call.launch(
        PREPARE,
        "add_splits",
        grid=rows,
        block=block,
        args=[sums.pointer, y.tensor, np.int32(sums.ne[2]), is_narrow(y)],
    )


def launch(call: Call, a: Operand, b: Operand, y: Operand | None, resident: bool) -> Operand:
    """Record the sums of all splits [rows, columns, splits], into y if there is one split, or into
    scratch. Returns where they are.

    resident  whether weights may be read before the launch before has ended
    """
    columns = rows_in(b.ne)
    plan = Plan(a.ne, columns)
    if y is None:
        ptr = call.scratch(4 * a.ne[1] * columns * plan.splits)
        y = dense(ptr, (a.ne[1], columns, plan.splits, 1), F32)
    vector = a.ne[0] % 4 == 0 and all(
        x.nb[0] == x.dtype.nbytes and x.aligned(4 * x.dtype.nbytes) for x in (a, b)
    )
    weights, stage = plan.depth // DEPTH * ROWS * (4 * DEPTH + 4), 4 * COLUMNS * plan.warps * DEPTH
    stages = max(1, min(MOST_STAGES, (call.device.shared - weights) // stage))
    call.launch(
        "linear_exact.cu",
        f"exact<{C_TYPES[a.dtype.name]}, {C_TYPES[b.dtype.name]}, {str(vector).lower()}>",
        grid=(plan.splits, *plan.tiles),
        block=32 * plan.warps,
        args=[
            Exact(
                w=a.tensor,
                x=b.tensor,
                y=y.tensor,
                rows=a.ne[1],
                columns=columns,
                k=a.ne[0],
                depth=plan.depth,
                parts=plan.parts,
                stages=stages,
                paired=int(a.ne[1] % 2 == 0 and y.aligned(8)),
                resident=int(resident),
            )
        ],
        shared=weights + stages * stage,
    )
    return y

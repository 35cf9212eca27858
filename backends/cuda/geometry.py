"""Launch geometry shared by the op families: how work is spread over blocks and threads."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np

from pyggml.backends.cuda.launch import Operand
from pyggml.spec import Ne

#: Default number of threads per block.
THREADS = 256
#: Most bytes that a thread reads at once.
WIDEST = 16

#: Element types in C++.
C_TYPES = {
    "f32": "float",
    "f16": "__half",
    "bf16": "__nv_bfloat16",
    "i32": "int",
    "i64": "long long",
}
#: The types in blocks.cuh that read and write the rows of each cache type.
ROWS = {"f16": "Plain<__half>", "bf16": "Plain<__nv_bfloat16>", "q8_0": "q8_0"}


def blocks_for(count: int, each: int = THREADS) -> int:
    """The number of blocks of `each` that hold `count` items."""
    return -(-count // each)


def rows(operand: Operand) -> int:
    """The number of rows of a tensor, over dimensions 1, 2 and 3."""
    return prod(operand.ne[1:])


def row_grid(operand: Operand) -> tuple[int, int]:
    """A grid with one block per row: dimensions 1 and 2, then 3."""
    return operand.ne[1] * operand.ne[2], operand.ne[3]


def over_rows(n: int, count: int) -> tuple[tuple[int, int], int]:
    """A grid and a block for `count` rows of `n` items, an item a thread."""
    threads = threads_for(n, THREADS)
    return (count, blocks_for(n, threads)), threads


def counted(total: int) -> tuple[str, np.uint32 | np.int64]:
    """The C++ type that can count to `total`, and `total` as an argument of that type."""
    if total < 2**32 - THREADS:
        return "unsigned", np.uint32(total)
    return "long long", np.int64(total)


def pack_width(*operands: Operand) -> int:
    """How many adjacent elements of all operands a thread can process at once; 1 if their rows
    allow no more.

    Sizes in dimension 0 must be equal, or 1 for a tensor that repeats there.
    """
    n = operands[0].ne[0]
    width = WIDEST // max(op.dtype.nbytes for op in operands)
    fits = n % width == 0 and all(
        op.ne[0] == 1
        or (op.ne[0] == n and op.nb[0] == op.dtype.nbytes and op.aligned(width * op.dtype.nbytes))
        for op in operands
    )
    return width if fits else 1


def threads_for(length: int, most: int = 1024) -> int:
    """Threads per block for a row of `length`: whole warps, at most `most`."""
    return min(most, max(32, blocks_for(length, 32) * 32))


def part(operand: Operand, axis: int, start: int, n: int) -> Operand:
    """`n` elements of a tensor along an axis, starting at `start` (in dimension 0: whole
    blocks)."""
    ne = list(operand.ne)
    ne[axis] = n
    units = start // operand.dtype.block if axis == 0 else start
    sizes: Ne = (ne[0], ne[1], ne[2], ne[3])
    return replace(operand, ptr=operand.ptr + units * operand.nb[axis], ne=sizes)

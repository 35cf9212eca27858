"""Products of f32, f16 and bf16 matrices, which may be weights, states or results, with f32.

A thread takes 64 rows of a and 4 columns of b at a time, and in them 4 rows by 4 columns, whose 16
sums are registers that run along the rows of both. Nothing is repacked and sums are f32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.rows import adjacent
from pyggml.backends.cpu.table import Call
from pyggml.node import Node

TYPES = ("f32", "f16", "bf16")
_ROWS, _COLUMNS = 64, 4


def float_refusal(node: Node) -> str | None:
    """Why `add_product` cannot be the node, a mul_mat; None if it can."""
    a, b = node["a"], node["b"]
    if a.dtype.name not in TYPES or b.dtype.name != "f32" or node.dtype.name != "f32":
        return f"{node.op.name} does not multiply {a.dtype} by {b.dtype} to {node.dtype} here"
    if not adjacent(a, b):
        return f"{node.op.name} needs rows whose elements are adjacent"
    return None


@cache
def _product(type_: str) -> Native:
    """y = a b for every item, an (i2, i3) of b.

    a, a1, a2, a3, m       address, byte strides, rows
    b, b1, b2, b3, n       columns
    y, y1, y2, y3, k
    n2, items, r2, r3      item (i2, i3) takes matrix (i2 // r2, i3 // r3)
    """
    return Native(f"product_of_{type_}", "i" * 19, lambda: _make(type_))


def _make(type_: str) -> Callable[..., None]:
    from pyggml.backends.cpu import attention_blocks as blocks
    from pyggml.backends.cpu.native.memory import fetch_add, put_i64, stack

    scores, copy = blocks.scores(type_), blocks.copy
    buffer = stack(4 * _ROWS * _COLUMNS + 8 * _COLUMNS)

    def run(
        a: int, a1: int, a2: int, a3: int, m: int, b: int, b1: int, b2: int, b3: int, n: int,
        y: int, y1: int, y2: int, y3: int, k: int, n2: int, items: int, r2: int, r3: int,
        own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        sums = buffer()
        columns = sums + 4 * _ROWS * _COLUMNS
        row_blocks, column_blocks = (m + _ROWS - 1) // _ROWS, (n + _COLUMNS - 1) // _COLUMNS
        per_item = row_blocks * column_blocks
        while True:
            number = fetch_add(own, 1)
            if number >= items * per_item:
                break
            item, rest = number // per_item, number % per_item
            i2, i3 = item % n2, item // n2
            first, j = rest // column_blocks * _ROWS, rest % column_blocks * _COLUMNS
            rows, width = min(_ROWS, m - first), min(_COLUMNS, n - j)
            for c in range(_COLUMNS):  # the last column again where there are fewer
                put_i64(columns + 8 * c, b + (j + min(c, width - 1)) * b1 + i2 * b2 + i3 * b3)
            matrix = a + first * a1 + i2 // r2 * a2 + i3 // r3 * a3
            for row in range(0, rows, 4):
                scores(columns, matrix + row * a1, a1, min(4, rows - row), k, sums + 4 * row)
            for c in range(width):
                at = y + 4 * first + (j + c) * y1 + i2 * y2 + i3 * y3
                copy(at, sums + 4 * _ROWS * c, rows)

    return run


def add_product(call: Call) -> None:
    """Add the product of a mul_mat of floats to the program."""
    a, b, out = call["a"], call["b"], call.out
    n, n2, n3 = b.ne[1:]
    call.add(
        _product(a.type), a.ptr, *a.nb[1:], a.ne[1], b.ptr, *b.nb[1:], n, out.ptr, *out.nb[1:],
        a.ne[0], n2, n2 * n3, n2 // a.ne[2], n3 // a.ne[3],
    )  # fmt: skip

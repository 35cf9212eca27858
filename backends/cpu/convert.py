"""Rows of one type as another: cast and cpy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from pyggml import ops
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.rows import READABLE, WRITABLE, row_refusal
from pyggml.backends.cpu.table import Call, kernel
from pyggml.dtypes import TYPES
from pyggml.node import Node

#: Elements to convert at once between two types that are not f32.
PIECE = 256
_INTEGERS = ("i32", "i64")


def convert(source: str, target: str) -> Any:
    """convert(out, x, n): a row of n elements, by way of f32. Numba compiles this."""
    from pyggml.backends.cpu.decode import decode, unit_of
    from pyggml.backends.cpu.encode import encode
    from pyggml.backends.cpu.native.memory import inner, stack

    if source == target:
        return _same(source)
    if source in _INTEGERS or target in _INTEGERS:
        return _numbers(source, target)
    if source == "f32":
        return encode(target)
    if target == "f32":
        return decode(source)
    read, write, floats_of = decode(source), encode(target), stack(4 * PIECE)
    (x_size, x_bytes), (y_size, y_bytes) = unit_of(source), unit_of(target)

    @inner
    def by_pieces(out: int, x: int, n: int) -> None:
        floats = floats_of()
        for first in range(0, n, PIECE):
            count = min(PIECE, n - first)
            read(floats, x + first // x_size * x_bytes, count)
            write(out + first // y_size * y_bytes, floats, count)

    return by_pieces


def _same(type_: str) -> Any:
    """The bytes of a row: a NaN keeps its bits, which decoding would change."""
    from pyggml.backends.cpu.native.memory import inner
    from pyggml.backends.cpu.row_loops import copy_bytes

    block, nbytes = TYPES[type_].block, TYPES[type_].nbytes

    @inner
    def copy(out: int, x: int, n: int) -> None:
        copy_bytes(out, x, n // block * nbytes)

    return copy


def _numbers(source: str, target: str) -> Any:
    """Integers and f32, one by one; f32 is truncated."""
    from pyggml.backends.cpu.native import memory

    at, put = getattr(memory, f"{source}_at"), getattr(memory, f"put_{target}")
    x_size, y_size = TYPES[source].nbytes, TYPES[target].nbytes
    floats = target == "f32"

    @memory.inner
    def convert_numbers(out: int, x: int, n: int) -> None:
        for i in range(n):
            value = at(x + i * x_size)
            put(out + i * y_size, np.float32(value) if floats else np.int64(value))

    return convert_numbers


@cache
def _rows(source: str, target: str) -> Native:
    """out = x, rows of n elements."""

    def make() -> Callable[..., None]:
        one = convert(source, target)

        def run(
            out: int, o1: int, o2: int, o3: int, x: int, x1: int, x2: int, x3: int, n: int,
            n1: int, n2: int, rows: int, own: int, thread: int, threads: int,
        ) -> None:  # fmt: skip
            for row in range(rows * thread // threads, rows * (thread + 1) // threads):
                i1, i2, i3 = row % n1, row // n1 % n2, row // n1 // n2
                one(out + i1 * o1 + i2 * o2 + i3 * o3, x + i1 * x1 + i2 * x2 + i3 * x3, n)

        return run

    return Native(f"convert_{source}_{target}", "i" * 12, make)


def refuses_types(node: Node, source: Node) -> str | None:
    """Why `convert` does not take the source's rows to the node's type; None if it does."""
    types = source.dtype.name, node.dtype.name
    numbers = {*types} <= {*_INTEGERS, "f32"}
    if types[0] == types[1] or numbers or (types[0] in READABLE and types[1] in WRITABLE):
        return None
    return f"{node.op.name} does not write {types[0]} to {types[1]} here"


def _refuses(node: Node) -> str | None:
    if node.ne != node["a"].ne:
        return f"{node.op.name} does not change sizes here"
    return refuses_types(node, node["a"]) or row_refusal(node)


@kernel(ops.cast, types=None, refuses=_refuses)
@kernel(ops.cpy, types=None, refuses=_refuses)
def cast(call: Call) -> None:
    a, out = call["a"], call.out
    n, n1, n2, n3 = a.ne
    call.add(
        _rows(a.type, out.type),
        out.ptr,
        *out.nb[1:],
        a.ptr,
        *a.nb[1:],
        n,
        n1,
        n2,
        n1 * n2 * n3,
        work=a.elements,
    )

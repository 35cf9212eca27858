"""Copies that change no value: cont, concat, repeat. Rows of any type are copied as bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from pyggml import ops
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.rows import row_refusal
from pyggml.backends.cpu.table import Call, Operand, kernel
from pyggml.dtypes import TYPES
from pyggml.node import Node


def _copies() -> Callable[..., None]:
    from pyggml.backends.cpu.row_loops import copy_bytes

    def run(
        out: int, o1: int, o2: int, o3: int, x: int, x1: int, x2: int, x3: int, m1: int, m2: int,
        m3: int, nbytes: int, times: int, n1: int, n2: int, rows: int,
        own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            i1, i2, i3 = row % n1, row // n1 % n2, row // n1 // n2
            y = out + i1 * o1 + i2 * o2 + i3 * o3
            source = x + i1 % m1 * x1 + i2 % m2 * x2 + i3 % m3 * x3
            for i in range(times):
                copy_bytes(y + i * nbytes, source, nbytes)

    return run


#: Rows of `nbytes` bytes, each `times` in a row of out; x has m1 m2 m3 rows, which repeat.
COPIES = Native("copy_rows", "i" * 16, _copies)


@cache
def _elements(nbytes: int) -> Native:
    """out = x, rows of n elements that need not be adjacent."""

    def make() -> Callable[..., None]:
        from pyggml.backends.cpu.native import memory

        at, put = getattr(memory, f"i{8 * nbytes}_at"), getattr(memory, f"put_i{8 * nbytes}")

        def run(
            out: int, o0: int, o1: int, o2: int, o3: int, x: int, x0: int, x1: int, x2: int,
            x3: int, n: int, n1: int, n2: int, rows: int, own: int, thread: int, threads: int,
        ) -> None:  # fmt: skip
            for row in range(rows * thread // threads, rows * (thread + 1) // threads):
                i1, i2, i3 = row % n1, row // n1 % n2, row // n1 // n2
                y, source = out + i1 * o1 + i2 * o2 + i3 * o3, x + i1 * x1 + i2 * x2 + i3 * x3
                for i in range(n):
                    put(y + i * o0, at(source + i * x0))

        return run

    return Native(f"copy_elements_{nbytes}", "i" * 14, make)


def _copy(call: Call, x: Operand, out: int) -> None:
    """Copy x to strides of the result, from this address."""
    if (x.ptr, x.nb) == (out, call.out.nb):
        return  # it was computed in its place
    n, n1, n2, n3 = x.ne
    rows, type_ = n1 * n2 * n3, TYPES[x.type]
    if n == 1 or x.nb[0] == call.out.nb[0] == type_.nbytes:
        nbytes = n // type_.block * type_.nbytes
        call.add(
            COPIES,
            out,
            *call.out.nb[1:],
            x.ptr,
            *x.nb[1:],
            n1,
            n2,
            n3,
            nbytes,
            1,
            n1,
            n2,
            rows,
            work=x.elements,
        )
    else:
        call.add(
            _elements(type_.nbytes),
            out,
            *call.out.nb,
            x.ptr,
            *x.nb,
            n,
            n1,
            n2,
            rows,
            work=2 * x.elements,
        )


def _refuses(node: Node) -> str | None:
    if all(x is None or x.dtype.block == 1 for x in (node, *node.src)):
        return None
    return row_refusal(node)


@kernel(ops.concat, types=None, refuses=_refuses)
def concat(call: Call) -> None:
    a, b, out, dim = call["a"], call["b"], call.out, call.attrs["dim"]
    _copy(call, a, out.ptr)
    end = a.ne[dim] // (TYPES[a.type].block if dim == 0 else 1)
    _copy(call, b, out.ptr + end * out.nb[dim])


@kernel(ops.cont, types=None, refuses=_refuses)
def cont(call: Call) -> None:
    _copy(call, call["a"], call.out.ptr)


@kernel(ops.repeat, types=None, refuses=row_refusal)
def repeat(call: Call) -> None:
    a, out = call["a"], call.out
    _, n1, n2, n3 = out.ne
    nbytes = a.ne[0] // TYPES[a.type].block * TYPES[a.type].nbytes
    call.add(
        COPIES, out.ptr, *out.nb[1:], a.ptr, *a.nb[1:], *a.ne[1:], nbytes,
        out.ne[0] // a.ne[0], n1, n2, n1 * n2 * n3, work=out.elements,
    )  # fmt: skip

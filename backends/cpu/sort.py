"""The order of a row's elements: argmax, argsort, and top_k of a few.

NaN is larger than every number and all NaN are equal, -0 equals 0, and equals keep their order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from pyggml import ops
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.rows import row_refusal
from pyggml.backends.cpu.table import Call, kernel
from pyggml.node import Node

#: `best` moves up to k ids for each element that it takes. With more it sorts the row instead.
MOST_K = 64
#: Rows that are sorted at once; each needs memory for two lists of ids.
SORTED_ROWS = 16


@cache
def key_function() -> Any:
    """key(address): an integer that sorts like the f32 there."""
    from pyggml.backends.cpu.native.memory import f32_at, i32_at, inner

    @inner
    def key(address: int) -> int:
        """The bits of floats sort like the floats if those of negative ones are inverted."""
        value, bits = f32_at(address), int(i32_at(address))
        if value != value:
            return 0xFFFFFFFF
        if value == 0.0:
            return 0x80000000
        return bits + 0x80000000 if bits >= 0 else ~bits & 0x7FFFFFFF

    return key


@cache
def best_function() -> Any:
    """best(out, step, k, x, n, flags, size): the ids of the k largest of n f32, largest first.

    out, step    i32, byte stride
    flags, size  only elements i with flags[i / size], i32; flags 0: all. At least k have it
    """
    from pyggml.backends.cpu.native.memory import i32_at, inner, put_i32

    key = key_function()

    @inner
    def best(out: int, step: int, k: int, x: int, n: int, flags: int, size: int) -> None:
        """Keeps a sorted list. Once it is full, most elements take one comparison."""
        count, last = 0, -1
        for i in range(n):
            own = key(x + 4 * i)
            if own <= last or (flags != 0 and i32_at(flags + i // size * 4) == 0):
                continue
            place = min(count, k - 1)
            while place > 0:
                before = i32_at(out + (place - 1) * step)
                if key(x + 4 * before) >= own:
                    break
                put_i32(out + place * step, before)
                place -= 1
            put_i32(out + place * step, i)
            count = min(count + 1, k)
            if count == k:
                last = key(x + 4 * i32_at(out + (k - 1) * step))

    return best


def _top() -> Callable[..., None]:
    best = best_function()

    def run(
        out: int, o0: int, o1: int, o2: int, o3: int, x: int, x1: int, x2: int, x3: int, n: int,
        n1: int, n2: int, rows: int, k: int, own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            i1, i2, i3 = row % n1, row // n1 % n2, row // n1 // n2
            y, source = out + i1 * o1 + i2 * o2 + i3 * o3, x + i1 * x1 + i2 * x2 + i3 * x3
            best(y, o0, k, source, n, 0, 1)

    return run


def _sorted() -> Callable[..., None]:
    from pyggml.backends.cpu.native.memory import i32_at, inner, put_i32

    key = key_function()

    @inner
    def merge(out: int, ids: int, x: int, start: int, middle: int, end: int, sign: int) -> None:
        """Merge two sorted lists of ids, the first of equals first."""
        a, b = start, middle
        for place in range(start, end):
            left = b >= end
            if not left and a < middle:
                first, second = key(x + 4 * i32_at(ids + 4 * a)), key(x + 4 * i32_at(ids + 4 * b))
                left = sign * first <= sign * second
            if left:
                put_i32(out + 4 * place, i32_at(ids + 4 * a))
                a += 1
            else:
                put_i32(out + 4 * place, i32_at(ids + 4 * b))
                b += 1

    def run(
        out: int, o0: int, o1: int, o2: int, o3: int, x: int, x1: int, x2: int, x3: int, n: int,
        n1: int, n2: int, rows: int, sign: int, memory: int, lists: int,
        own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        for number in range(lists * thread // threads, lists * (thread + 1) // threads):
            ids, other = memory + number * 8 * n, memory + number * 8 * n + 4 * n
            for row in range(number, rows, lists):
                i1, i2, i3 = row % n1, row // n1 % n2, row // n1 // n2
                y, source = out + i1 * o1 + i2 * o2 + i3 * o3, x + i1 * x1 + i2 * x2 + i3 * x3
                for i in range(n):
                    put_i32(ids + 4 * i, i)
                width = 1
                while width < n:
                    for start in range(0, n, 2 * width):
                        middle, end = min(start + width, n), min(start + 2 * width, n)
                        merge(other, ids, source, start, middle, end, sign)
                    ids, other = other, ids
                    width *= 2
                for i in range(n):
                    put_i32(y + i * o0, i32_at(ids + 4 * i))

    return run


def _largest() -> Callable[..., None]:
    from pyggml.backends.cpu.native.memory import put_i32

    key = key_function()

    def run(
        out: int, o0: int, o1: int, o2: int, x: int, x1: int, x2: int, x3: int, n: int, n1: int,
        n2: int, rows: int, own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            i1, i2, i3 = row % n1, row // n1 % n2, row // n1 // n2
            source = x + i1 * x1 + i2 * x2 + i3 * x3
            first, top = 0, -1
            for i in range(n):
                own_key = key(source + 4 * i)
                if own_key > top:
                    first, top = i, own_key
            put_i32(out + i1 * o0 + i2 * o1 + i3 * o2, first)

    return run


TOP = Native("top_k", "i" * 14, _top)
SORTED = Native("sorted", "i" * 16, _sorted)
LARGEST = Native("argmax", "i" * 12, _largest)


def rows_of(call: Call) -> tuple[int, ...]:
    """Parameters of kernels here: the places of out and a, n, n1, n2 and the number of rows."""
    a, out = call["a"], call.out
    n, n1, n2, n3 = a.ne
    return (out.ptr, *out.nb, a.ptr, *a.nb[1:], n, n1, n2, n1 * n2 * n3)


def _lists(node: Node) -> int:
    rows: int = node.spec.elements // node.ne[0]
    return min(rows, SORTED_ROWS)


def _sort_bytes(node: Node) -> int:
    return _lists(node) * 8 * node["a"].ne[0]


@kernel(ops.argsort, types={"f32", "i32"}, scratch=_sort_bytes, refuses=row_refusal)
def argsort(call: Call) -> None:
    sign = -1 if call.attrs["order"] == "desc" else 1
    call.add(
        SORTED, *rows_of(call), sign, call.scratch, _lists(call.node),
        work=16 * call["a"].elements,
    )  # fmt: skip


@kernel(ops.argmax, types={"f32", "i32"}, refuses=row_refusal)
def argmax(call: Call) -> None:
    rows = rows_of(call)
    call.add(LARGEST, *rows[:4], *rows[5:], work=2 * call["a"].elements)

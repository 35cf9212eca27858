"""top_k of more than a few: a radix select, then a sort of the chosen.

A key is 32 bits that sort like the f32. The first pass counts the keys by their upper 11 bits. They
tell in which bin the k-th key is, and the second pass lists every element of that bin and above,
in order. Two more counts, of the list, give the k-th key itself; of those equal to it the first
ones are chosen. The chosen are sorted by a stable radix sort, so equals keep their order.

The first two passes read the row; of few long rows, several threads read pieces of one. The pieces
depend on sizes only, and so does nothing else: the result is exact.

The design that lost: a merge sort of the whole row, 40 times slower for 2,048 of 163,840.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from pyggml import ops
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.rows import row_refusal
from pyggml.backends.cpu.sort import MOST_K, SORTED_ROWS, TOP, key_function, rows_of
from pyggml.backends.cpu.table import Call, kernel
from pyggml.node import Node

#: Elements of a piece, most pieces of a row, and fewest rows of which each is one piece.
PIECE, MOST_PIECES, MANY_ROWS = 16384, 32, 4
#: Bytes of a table of counts.
TABLE = 4 << 11


def _pieces(node: Node) -> int:
    """Pieces of a row that threads share; 1 if each row is the work of one."""
    n, rows = node["a"].ne[0], node.spec.elements // node.ne[0]
    return 1 if rows >= MANY_ROWS else min(MOST_PIECES, -(-n // PIECE))


def _lists(node: Node) -> int:
    """Rows that are selected at once."""
    rows: int = node.spec.elements // node.ne[0]
    return min(rows, SORTED_ROWS)


def _list_bytes(node: Node) -> int:
    """Bytes for a row: a table of counts and a number for each piece, a table for the last steps,
    a list of all elements and one of the chosen."""
    elements: int = node["a"].ne[0] + node.ne[0]
    return _pieces(node) * (TABLE + 8) + TABLE + 8 * elements


@cache
def _functions() -> tuple[Any, Any, Any, Any]:
    """count, bin_of, collect and finish: the steps for a row."""
    from pyggml.backends.cpu.native.memory import i32_at, i64_at, inner, put_i32, put_i64

    key = key_function()

    @inner
    def clear(table: int) -> None:
        for bin in range(2048):
            put_i32(table + 4 * bin, 0)

    @inner
    def more(table: int, bin: int) -> int:
        """Add 1 to a count; the count before."""
        before: int = i32_at(table + 4 * bin)
        put_i32(table + 4 * bin, before + 1)
        return before

    @inner
    def count(x: int, first: int, end: int, table: int) -> None:
        """Count elements first to end by the upper 11 bits of their keys."""
        clear(table)
        for i in range(first, end):
            more(table, key(x + 4 * i) >> 21)

    @inner
    def bin_of(tables: int, pieces: int, k: int) -> int:
        """The bin of the k-th largest key."""
        bin, total = 2048, 0
        while total < k:
            bin -= 1
            for piece in range(pieces):
                total += i32_at(tables + piece * TABLE + 4 * bin)
        return bin

    @inner
    def collect(x: int, first: int, end: int, lowest: int, entries: int) -> int:
        """List elements with keys of at least `lowest` as (~key, id); returns how many."""
        size = 0
        for i in range(first, end):
            own = key(x + 4 * i)
            if own >= lowest:
                put_i64(entries + 8 * size, ((0xFFFFFFFF - own) << 32) | i)
                size += 1
        return size

    @inner
    def kth(entries: int, size: int, k: int, table: int) -> tuple[int, int]:
        """(the k-th smallest upper half of the entries, how many of its equals are among the k)."""
        prefix, left = 0, k
        for shift in (21, 10, 0):
            bits = 11 if shift else 10
            clear(table)
            for i in range(size):
                upper = i64_at(entries + 8 * i) >> 32 & 0xFFFFFFFF
                if upper >> (shift + bits) == prefix:
                    more(table, upper >> shift & (1 << bits) - 1)
            bin = 0
            while left > i32_at(table + 4 * bin):
                left -= i32_at(table + 4 * bin)
                bin += 1
            prefix = prefix << bits | bin
        return prefix, left

    @inner
    def sort(entries: int, spare: int, k: int, table: int) -> int:
        """Sort k entries by their upper halves, stable; where they are."""
        for shift in (32, 43, 54):
            clear(table)
            for i in range(k):
                more(table, i64_at(entries + 8 * i) >> shift & 0x7FF)
            start = 0
            for bin in range(2048):
                size = i32_at(table + 4 * bin)
                put_i32(table + 4 * bin, start)
                start += size
            for i in range(k):
                entry = i64_at(entries + 8 * i)
                put_i64(spare + 8 * more(table, entry >> shift & 0x7FF), entry)
            entries, spare = spare, entries
        return entries

    @inner
    def finish(
        entries: int, length: int, sizes: int, pieces: int, k: int, spare: int, table: int, y: int,
        step: int,
    ) -> None:  # fmt: skip
        """Write the ids of the k smallest entries: those of piece p begin at p * length."""
        size = i64_at(sizes)
        for piece in range(1, pieces):
            for i in range(i64_at(sizes + 8 * piece)):
                put_i64(entries + 8 * size, i64_at(entries + 8 * (piece * length + i)))
                size += 1
        last, equals = kth(entries, size, k, table)
        chosen = 0
        for i in range(size):
            entry = i64_at(entries + 8 * i)
            upper = entry >> 32 & 0xFFFFFFFF
            if upper < last or (upper == last and equals > 0):
                put_i64(entries + 8 * chosen, entry)
                chosen += 1
                if upper == last:
                    equals -= 1
        entries = sort(entries, spare, k, table)
        for i in range(k):
            put_i32(y + i * step, i64_at(entries + 8 * i))

    return count, bin_of, collect, finish


def _rows() -> Callable[..., None]:
    """Each row is the work of one thread."""
    from pyggml.backends.cpu.native.memory import put_i64

    count, bin_of, collect, finish = _functions()

    def run(
        out: int, o0: int, o1: int, o2: int, o3: int, x: int, x1: int, x2: int, x3: int, n: int,
        n1: int, n2: int, rows: int, k: int, memory: int, lists: int, list_bytes: int,
        own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        for number in range(lists * thread // threads, lists * (thread + 1) // threads):
            table = memory + number * list_bytes
            sizes, last = table + TABLE, table + TABLE + 8
            entries = last + TABLE
            for row in range(number, rows, lists):
                i1, i2, i3 = row % n1, row // n1 % n2, row // n1 // n2
                y, source = out + i1 * o1 + i2 * o2 + i3 * o3, x + i1 * x1 + i2 * x2 + i3 * x3
                count(source, 0, n, table)
                lowest = bin_of(table, 1, k) << 21
                put_i64(sizes, collect(source, 0, n, lowest, entries))
                finish(entries, n, sizes, 1, k, entries + 8 * n, last, y, o0)

    return run


def _steps(step: int) -> Callable[..., None]:
    """A step for all pieces of a few rows: 0 counts, 1 lists, 2 chooses."""
    from pyggml.backends.cpu.native.memory import put_i64

    count, bin_of, collect, finish = _functions()

    def run(
        out: int, o0: int, o1: int, o2: int, o3: int, x: int, x1: int, x2: int, x3: int, n: int,
        n1: int, n2: int, rows: int, k: int, memory: int, pieces: int, list_bytes: int,
        own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        length, parts = (n + pieces - 1) // pieces, 1 if step == 2 else pieces
        items = rows * parts
        for item in range(items * thread // threads, items * (thread + 1) // threads):
            row, piece = item // parts, item % parts
            i1, i2, i3 = row % n1, row // n1 % n2, row // n1 // n2
            y, source = out + i1 * o1 + i2 * o2 + i3 * o3, x + i1 * x1 + i2 * x2 + i3 * x3
            tables = memory + row * list_bytes
            sizes = tables + pieces * TABLE
            last = sizes + pieces * 8
            entries = last + TABLE
            first, end = piece * length, min(n, (piece + 1) * length)
            if step == 0:
                count(source, first, end, tables + piece * TABLE)
            elif step == 1:
                lowest = bin_of(tables, pieces, k) << 21
                size = collect(source, first, end, lowest, entries + 8 * first)
                put_i64(sizes + 8 * piece, size)
            else:
                finish(entries, length, sizes, pieces, k, entries + 8 * n, last, y, o0)

    return run


ROWS = Native("top_k_rows", "i" * 17, _rows)
STEPS = tuple(
    Native(f"top_k_{name}", "i" * 17, partial(_steps, step))
    for step, name in enumerate(("count", "list", "choose"))
)


def _select(call: Call) -> None:
    pieces, size = _pieces(call.node), _list_bytes(call.node)
    arguments = (*rows_of(call), call.attrs["k"], call.scratch)
    if pieces == 1:
        work = 4 * call["a"].elements
        call.add(ROWS, *arguments, _lists(call.node), size, work=work)
        return
    for step in STEPS:
        call.add(step, *arguments, pieces, size)


def _bytes(node: Node) -> int:
    return 0 if node.attrs["k"] <= MOST_K else _lists(node) * _list_bytes(node)


@kernel(ops.top_k, types={"f32", "i32"}, scratch=_bytes, refuses=row_refusal)
def top_k(call: Call) -> None:
    k = call.attrs["k"]
    if k <= MOST_K:
        call.add(TOP, *rows_of(call), k, work=4 * call["a"].elements)
    else:
        _select(call)

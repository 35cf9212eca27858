"""Activations as bf16 in tiles, in the order that `columns.py` describes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from pyggml.backends.cpu.linear.columns import DEPTH, TILE
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.host_tiles import GROUP, ROWS
from pyggml.dtypes import TYPES


def _part(type_: str) -> Callable[..., None]:
    """pack(xs, n, nb0, start, k, out): one part of a block of columns.

    xs, n   address of a table of 16 addresses of columns, and how many there are
    start   where in rows of k the part begins
    """
    from pyggml.backends.cpu.linear.amx.tiles import convert
    from pyggml.backends.cpu.native.memory import i64_at, inner, put_f32, put_i64, stack
    from pyggml.backends.cpu.native.vectors import element_at

    adjacent, floats, read, size = convert(type_), convert("f32"), element_at(type_), TYPES[type_]
    nbytes, buffer = size.nbytes, stack(4 * DEPTH)

    @inner
    def run(xs: int, n: int, nb0: int, start: int, k: int, out: int) -> None:
        depth = min(DEPTH, k - start)
        for c in range(ROWS):
            if c >= n:
                for group in range((depth + GROUP - 1) // GROUP):
                    for word in range(8):
                        put_i64(out + group * TILE + 64 * c + 8 * word, 0)
            elif nb0 == nbytes:
                adjacent(i64_at(xs + 8 * c) + start * nb0, out + 64 * c, depth)
            else:
                values, source = buffer(), i64_at(xs + 8 * c) + start * nb0
                for i in range(depth):
                    put_f32(values + 4 * i, read(source + i * nb0))
                floats(values, out + 64 * c, depth)

    return run


@cache
def dense(type_: str) -> Native:
    """Columns of items.

    x, nb0, nb1, nb2, nb3   address and byte strides
    n, n2, items, k         columns of an item, items = n2 n3
    """
    return Native(f"amx_columns_{type_}", "i" * 10, lambda: _dense(type_))


def _dense(type_: str) -> Callable[..., None]:
    from pyggml.backends.cpu.native.memory import put_i64, stack

    pack, table = _part(type_), stack(8 * ROWS)

    def run(
        out: int, x: int, nb0: int, nb1: int, nb2: int, nb3: int, n: int, n2: int, items: int,
        k: int, own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        xs = table()
        blocks, parts = (n + ROWS - 1) // ROWS, (k + DEPTH - 1) // DEPTH
        groups, total = (k + GROUP - 1) // GROUP, items * blocks * parts
        for number in range(total * thread // threads, total * (thread + 1) // threads):
            start, rest = number % parts * DEPTH, number // parts
            item, block = rest // blocks, rest % blocks
            for c in range(min(ROWS, n - block * ROWS)):
                column = x + (block * ROWS + c) * nb1
                put_i64(xs + 8 * c, column + item % n2 * nb2 + item // n2 * nb3)
            here = (min(DEPTH, k - start) + GROUP - 1) // GROUP
            place = item * blocks * groups + blocks * (start // GROUP) + block * here
            pack(xs, n - block * ROWS, nb0, start, k, out + place * TILE)

    return run


@cache
def by_expert(type_: str) -> Native:
    """The rows of each expert's pairs. Those of the expert at place i of the chosen ones begin with
    block i + (its first pair) // 16, so none overlap.

    x, nb0, nb1, nb2, n_b      address, byte strides of rows of a token and of tokens, rows
    k, table, n_used, n_experts   as in `experts.py`
    """
    return Native(f"amx_columns_by_expert_{type_}", "i" * 10, lambda: _by_expert(type_))


def _by_expert(type_: str) -> Callable[..., None]:
    from pyggml.backends.cpu.native.memory import i64_at, put_i64, stack

    pack, buffer = _part(type_), stack(8 * ROWS)

    def run(
        out: int, x: int, nb0: int, nb1: int, nb2: int, n_b: int, k: int, table: int, n_used: int,
        n_experts: int, own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        xs = buffer()
        chosen = table + 8
        starts = chosen + 8 * n_experts
        pairs = starts + 8 * (n_experts + 1)
        groups, turn = (k + GROUP - 1) // GROUP, 0
        for place in range(i64_at(table)):
            expert = i64_at(chosen + 8 * place)
            first, end = i64_at(starts + 8 * expert), i64_at(starts + 8 * (expert + 1))
            blocks, target = (end - first + ROWS - 1) // ROWS, (first // ROWS + place) * groups
            for block in range(blocks):
                turn += 1
                if turn % threads != thread:
                    continue
                begin = first + block * ROWS
                for c in range(min(ROWS, end - begin)):
                    pair = i64_at(pairs + 8 * (begin + c))
                    put_i64(xs + 8 * c, x + pair // n_used * nb2 + pair % n_used % n_b * nb1)
                for start in range(0, k, DEPTH):
                    here = (min(DEPTH, k - start) + GROUP - 1) // GROUP
                    tile = target + blocks * (start // GROUP) + block * here
                    pack(xs, end - begin, nb0, start, k, out + tile * TILE)

    return run

"""Activations as rows of f32, for products in f32."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from pyggml.backends.cpu.native.compiler import Native
from pyggml.dtypes import TYPES


@cache
def widen(type_: str) -> Native:
    """Rows of this type [n3, n2, n1, k] to f32 rows of k, in order.

    x, nb0, nb1, nb2, nb3   address and byte strides
    n1, n2, rows, k         rows = n1 n2 n3
    """
    return Native(f"widen_{type_}", "iiiiiiiiii", lambda: _make(type_))


def _make(type_: str) -> Callable[..., None]:
    from typing import Any

    from pyggml.backends.cpu.native.emit import I64, Emitter, emits
    from pyggml.backends.cpu.native.memory import put_f32
    from pyggml.backends.cpu.native.vectors import element_at, load_floats

    size, read = TYPES[type_].nbytes, element_at(type_)

    @emits(None, I64, I64, I64)
    def adjacent(e: Emitter, out: Any, x: Any, n: Any) -> None:
        """n elements next to each other."""
        whole, rest = e.b.lshr(n, e.integer(4)), e.b.and_(n, e.integer(15))
        with e.loop(whole) as number:
            place = e.add(x, e.mul(number, 16 * size))
            e.store(load_floats(e, type_, place), e.add(out, e.mul(number, 64)))
        with e.when(e.b.icmp_signed(">", rest, e.integer(0))):
            place = e.add(x, e.mul(whole, 16 * size))
            value = load_floats(e, type_, place, left=rest)
            e.store_first(value, e.add(out, e.mul(whole, 64)), rest)

    def run(
        out: int, x: int, nb0: int, nb1: int, nb2: int, nb3: int, n1: int, n2: int, rows: int,
        k: int, counter: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        if nb0 == size:
            for row in range(rows * thread // threads, rows * (thread + 1) // threads):
                outer = row // n1
                source = x + row % n1 * nb1 + outer % n2 * nb2 + outer // n2 * nb3
                adjacent(out + 4 * row * k, source, k)
            return
        # 16 rows at a time, element by element: where rows are adjacent, each line is read once.
        blocks = (n1 + 15) // 16
        items = blocks * (rows // n1)
        for number in range(items * thread // threads, items * (thread + 1) // threads):
            outer, first = number // blocks, number % blocks * 16
            source = x + outer % n2 * nb2 + outer // n2 * nb3
            for i in range(k):
                for row in range(first, min(first + 16, n1)):
                    target = out + 4 * ((outer * n1 + row) * k + i)
                    put_f32(target, read(source + row * nb1 + i * nb0))

    return run

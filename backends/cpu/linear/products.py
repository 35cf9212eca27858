"""Dense products for any number of columns: threads share blocks of rows and columns."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from pyggml.backends.cpu.gate import Gate
from pyggml.backends.cpu.linear.inner import WIDE, Inner, times
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.host_tiles import ROWS


@cache
def product(inner: Inner, result: str) -> Native:
    """out[item][column] = the rows of a matrix times a column.

    weights, tile, w2, w3       address; bytes from 16 rows to the next, and between matrices
    m, k, stride                rows of a matrix; as in `inner.py`
    x, x1, x2, x3, n            columns: address, byte strides, columns of an item
    out, y1, y2, y3             byte strides of the result
    n2, items, r2, r3           items = n2 n3; item (i2, i3) takes matrix (i2 // r2, i3 // r3)
    share, width                16 rows and columns that a thread takes at once: how many
    """
    return Native(f"product_{inner.name}_{result}", "i" * 22, lambda: _product(inner, result))


def _product(inner: Inner, result: str) -> Callable[..., None]:
    from pyggml.backends.cpu.linear.put import put_sums
    from pyggml.backends.cpu.native.memory import fetch_add, put_i64, stack

    multiply, put, size = times(inner), put_sums(result), 4 if result == "f32" else 2
    buffer = stack(64 * WIDE + 8 * WIDE)

    def run(
        weights: int, tile: int, w2: int, w3: int, m: int, k: int, stride: int,
        x: int, x1: int, x2: int, x3: int, n: int,
        out: int, y1: int, y2: int, y3: int,
        n2: int, items: int, r2: int, r3: int, share: int, width: int,
        counter: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        sums = buffer()
        xs = sums + 64 * WIDE
        tiles, blocks = (m + ROWS - 1) // ROWS, (n + width - 1) // width
        per_item = (tiles + share - 1) // share * blocks
        while True:
            number = fetch_add(counter, 1)
            if number >= per_item * items:
                break
            item, rest = number // per_item, number % per_item
            i2, i3 = item % n2, item // n2
            first, begin = rest // blocks * share, rest % blocks * width
            matrix = weights + i2 // r2 * w2 + i3 // r3 * w3
            columns, target = x + i2 * x2 + i3 * x3, out + i2 * y2 + i3 * y3
            for t in range(first, min(first + share, tiles)):
                row = t * ROWS
                count = min(ROWS, m - row)
                for j in range(begin, min(begin + width, n), WIDE):
                    several = min(WIDE, min(begin + width, n) - j)
                    for c in range(WIDE):  # the last column again where there are fewer
                        put_i64(xs + 8 * c, columns + (j + min(c, several - 1)) * x1)
                    multiply(matrix + t * tile, k, stride, count, xs, several, sums)
                    for c in range(several):
                        put(sums + 64 * c, target + row * size + (j + c) * y1, count)

    return run


@cache
def gated(up: Inner, gate: Inner, act: Gate) -> Native:
    """out[column] = act(gate x) (up x), for two matrices of one size.

    up, gate     four words each: address, bytes from 16 rows to the next, k, stride
    the others   as for `product`, of one item
    """
    name = f"gated_{up.name}_{gate.name}_{act}"
    return Native(name, "i" * 16, lambda: _gated(up, gate, act))


def _gated(up_inner: Inner, gate_inner: Inner, act: Gate) -> Callable[..., None]:
    from pyggml.backends.cpu.linear.put import put_gated
    from pyggml.backends.cpu.native.memory import fetch_add, put_i64, stack

    multiply_up = times(up_inner)
    multiply_gate = multiply_up if gate_inner == up_inner else times(gate_inner)
    put, buffer = put_gated(act), stack(2 * 64 * WIDE + 8 * WIDE)

    def run(
        up: int, up_tile: int, up_k: int, up_stride: int,
        gate: int, gate_tile: int, gate_k: int, gate_stride: int,
        m: int, x: int, x1: int, n: int, out: int, y1: int, share: int, width: int,
        counter: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        ups = buffer()
        gates = ups + 64 * WIDE
        xs = gates + 64 * WIDE
        tiles, blocks = (m + ROWS - 1) // ROWS, (n + width - 1) // width
        while True:
            number = fetch_add(counter, 1)
            if number >= (tiles + share - 1) // share * blocks:
                break
            first, begin = number // blocks * share, number % blocks * width
            for t in range(first, min(first + share, tiles)):
                row = t * ROWS
                u, g, count = up + t * up_tile, gate + t * gate_tile, min(ROWS, m - row)
                for j in range(begin, min(begin + width, n), WIDE):
                    several = min(WIDE, min(begin + width, n) - j)
                    for c in range(WIDE):
                        put_i64(xs + 8 * c, x + (j + min(c, several - 1)) * x1)
                    multiply_up(u, up_k, up_stride, count, xs, several, ups)
                    multiply_gate(g, gate_k, gate_stride, count, xs, several, gates)
                    for c in range(several):
                        at = out + row * 4 + (j + c) * y1
                        put(ups + 64 * c, gates + 64 * c, at, count)

    return run

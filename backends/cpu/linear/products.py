"""Products of weights in tiles with quantized activations, for any number of columns."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.weights.forms import FORMS, ROWS

#: Columns of the wide inner loop: 8 sums, 8 integer sums and some codes in 32 registers, half of
#: that in the 16 registers of AVX2.
COLUMNS = 4


@cache
def product(name: str) -> Native:
    """out[item][column] = the rows of a matrix times a column.

    weights, tile                 tiles of all matrices, bytes of one
    m, tiles, groups              rows and tiles of a matrix, groups of a row
    x, x_row, x_item              activations: address, bytes of a column and of an item
    n                             columns of an item
    out, nb1, nb2, nb3            byte strides of columns, of items within n2, and of the rest
    n2, items                     items = n2 n3
    r2, r3, a2                    item (i2, i3) takes matrix i2 // r2 + a2 (i3 // r3)
    share                         tiles that a thread takes at once
    """
    return Native(f"product_{name}", "i" * 19, lambda: _product(name))


def _product(name: str) -> Callable[..., None]:
    from pyggml.backends.cpu.linear.put import put_sums
    from pyggml.backends.cpu.linear.tile import tile_product
    from pyggml.backends.cpu.native.memory import fetch_add, put_i64, stack

    form = FORMS[name]
    one, several = tile_product(form, 1), tile_product(form, COLUMNS)
    buffer = stack(64 * COLUMNS + 8 * COLUMNS)

    def run(
        weights: int, tile: int, m: int, tiles: int, groups: int,
        x: int, x_row: int, x_item: int, n: int,
        out: int, nb1: int, nb2: int, nb3: int,
        n2: int, items: int, r2: int, r3: int, a2: int, share: int,
        counter: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        sums = buffer()
        xs = sums + 64 * COLUMNS
        shares = (tiles + share - 1) // share
        while True:
            number = fetch_add(counter, 1)
            if number >= shares * items:
                break
            item, first = number // shares, number % shares * share
            i2, i3 = item % n2, item // n2
            matrix = weights + (i2 // r2 + i3 // r3 * a2) * tiles * tile
            columns, target = x + item * x_item, out + i2 * nb2 + i3 * nb3
            for t in range(first, min(first + share, tiles)):
                at, row = matrix + t * tile, t * ROWS
                count = min(ROWS, m - row)
                j = 0
                while j + COLUMNS <= n:
                    for c in range(COLUMNS):
                        put_i64(xs + 8 * c, columns + (j + c) * x_row)
                    several(at, groups, xs, sums)
                    for c in range(COLUMNS):
                        put_sums(sums + 64 * c, target + row * 4 + (j + c) * nb1, count)
                    j += COLUMNS
                while j < n:
                    put_i64(xs, columns + j * x_row)
                    one(at, groups, xs, sums)
                    put_sums(sums, target + row * 4 + j * nb1, count)
                    j += 1

    return run


@cache
def gated(up: str, gate: str, act: str) -> Native:
    """out[column] = act(gate x) (up x), for two matrices of one size.

    up, gate     two words each: tiles, bytes of a tile
    the others   as for `product`, of one item
    """
    return Native(f"gated_{up}_{gate}_{act}", "i" * 12, lambda: _gated(up, gate, act))


def _gated(up_name: str, gate_name: str, act: str) -> Callable[..., None]:
    from pyggml.backends.cpu.linear.put import put_gated
    from pyggml.backends.cpu.linear.tile import tile_product
    from pyggml.backends.cpu.native.memory import fetch_add, put_i64, stack

    forms = FORMS[up_name], FORMS[gate_name]
    up_one, gate_one = (tile_product(form, 1) for form in forms)
    up_several, gate_several = (tile_product(form, COLUMNS) for form in forms)
    put, buffer = put_gated(act), stack(2 * 64 * COLUMNS + 8 * COLUMNS)

    def run(
        up: int, up_tile: int, gate: int, gate_tile: int, m: int, groups: int,
        x: int, x_row: int, n: int, out: int, nb1: int, share: int,
        counter: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        ups = buffer()
        gates = ups + 64 * COLUMNS
        xs = gates + 64 * COLUMNS
        tiles = (m + ROWS - 1) // ROWS
        while True:
            first = fetch_add(counter, 1) * share
            if first >= tiles:
                break
            for t in range(first, min(first + share, tiles)):
                row, j = t * ROWS, 0
                u, g, count = up + t * up_tile, gate + t * gate_tile, min(ROWS, m - row)
                while j + COLUMNS <= n:
                    for c in range(COLUMNS):
                        put_i64(xs + 8 * c, x + (j + c) * x_row)
                    up_several(u, groups, xs, ups)
                    gate_several(g, groups, xs, gates)
                    for c in range(COLUMNS):
                        at = out + row * 4 + (j + c) * nb1
                        put(ups + 64 * c, gates + 64 * c, at, count)
                    j += COLUMNS
                while j < n:
                    put_i64(xs, x + j * x_row)
                    up_one(u, groups, xs, ups)
                    gate_one(g, groups, xs, gates)
                    put(ups, gates, out + row * 4 + j * nb1, count)
                    j += 1

    return run

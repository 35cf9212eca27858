"""Products of many columns with AMX: weights and activations as bf16, sums in f32.

TDPBF16PS adds the product of 16 columns by 32 numbers and 32 numbers by 16 rows: 512 MAC a cycle,
where dot products of bytes in vectors reach about 100. It wants 32 numbers of 16 rows as 16 lines
of pairs: line i holds numbers 2 i and 2 i + 1 of every row. So weights whose lanes are rows, as in
`host_tiles.py`, need no transposition, and sums come out as `put.py` takes them: for each column
16 rows.

A thread takes up to `SLOTS` times 16 rows and up to `WIDTH` columns. For a part of `DEPTH` numbers
it decodes the rows into its stack, then multiplies them with all columns, two blocks of columns and
twice 16 rows at a time: four products for four loads. Decoding takes about 110 cycles for 512
weights, the products one cycle a column. Sums of a part are added to those of the part before in
memory: 8 KiB for every 1024 cycles of products. A gated product has rows of up in the even slots
and the same rows of gate in the odd ones.

The designs that lost:
- 8-bit integers (TDPBUSD, 1024 MAC a cycle). Scales are of 32 weights, so after each instruction,
  16 cycles, the tile is stored and 16 vectors are converted, scaled and added: 48 instructions of
  vectors, at least 24 cycles. Weights with two scales in a group take twice that.
- Whole rows decoded at once, and sums that stay in registers: 16 rows of 14336 take 448 KiB a
  thread, which the plan would have to count, and both operands come from the second cache.
- Activations row by row: rows of 4096 are a multiple of 4 KiB apart, and 512 of them share 1024
  lines of the second cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from pyggml.backends.cpu.gate import Gate
from pyggml.backends.cpu.linear.columns import DEPTH, TILE
from pyggml.backends.cpu.linear.inner import Inner
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.host_tiles import GROUP, ROWS

#: 16 rows, and columns, that a thread takes at once: 128 KiB of weights and 256 KiB of sums.
SLOTS = 8
WIDTH = 512

_PAIR = 2 * TILE


def _block(up: Inner, gate: Inner | None) -> Callable[..., None]:
    """multiply(...): the sums of some rows and columns, f32 [block][slot][16 columns][16 rows].

    up, up_stride, gate, gate_stride   first rows of a matrix; as in `inner.py`
    m, k, x, columns                   rows, length, activations, and their columns with padding
    first, slots, begin, end           16 rows from first on; blocks of columns
    weights, sums                      memory for a part of the weights, and for the result
    """
    from pyggml.backends.cpu.linear.amx.tiles import decode, multiply
    from pyggml.backends.cpu.native.memory import inner

    decode_up, decode_gate = decode(up), decode(gate or up)
    one, two = multiply(1, SLOTS), multiply(2, SLOTS)
    has_gate, slot_bytes = gate is not None, DEPTH * ROWS * 2

    @inner
    def run(
        up: int, up_tile: int, up_stride: int, gate: int, gate_tile: int, gate_stride: int,
        m: int, k: int, x: int, columns: int, first: int, slots: int, begin: int, end: int,
        weights: int, sums: int,
    ) -> None:  # fmt: skip
        for start in range(0, k, DEPTH):
            groups = (min(DEPTH, k - start) + GROUP - 1) // GROUP
            before = start // GROUP
            for slot in range(slots):
                place = weights + slot * slot_bytes
                if has_gate:
                    t = first + slot // 2
                else:
                    t = first + slot
                count = min(ROWS, m - t * ROWS)
                if has_gate and slot % 2 == 1:
                    decode_gate(gate + t * gate_tile, k, gate_stride, count, before, groups, place)
                else:
                    decode_up(up + t * up_tile, k, up_stride, count, before, groups, place)
            part = x + start * columns * 2
            for block in range(begin, end, 2):
                at = part + block * groups * TILE
                for slot in range(0, slots, 2):
                    w, out = weights + slot * slot_bytes, sums
                    out += ((block - begin) * SLOTS + slot) * TILE
                    if block + 1 < end:
                        two(at, w, out, groups, start)
                    else:
                        one(at, w, out, groups, start)

    return run


@cache
def dense(up: Inner, gate: Inner | None, act: Gate, result: str) -> Native:
    """Dense products: out[item][column] = the rows of a matrix times a column, or
    act(gate x) (up x).

    up, gate                      three words each: address, bytes from 16 rows to the next, stride
    w2, w3, m, k                  bytes between matrices; rows and length of a row
    x, n                          activations, columns of an item
    out, y1, y2, y3               byte strides of the result
    n2, items, r2, r3             as in `products.py`
    share                         16 rows that a thread takes at once: how many
    """
    name = f"amx_{up.name}_{gate.name}_{act}" if gate else f"amx_{up.name}"
    return Native(f"{name}_{result}", "i" * 21, lambda: _dense(up, gate, act, result))


def _dense(up: Inner, gate: Inner | None, act: Gate, result: str) -> Callable[..., None]:
    from pyggml.backends.cpu.linear.amx.tiles import begin_tiles, end_tiles
    from pyggml.backends.cpu.linear.put import put_gated, put_sums
    from pyggml.backends.cpu.native.memory import fetch_add, stack

    block, put, gated = _block(up, gate), put_sums(result), put_gated(act)
    has_gate, size, wide = gate is not None, 4 if result == "f32" else 2, WIDTH // ROWS
    per_row = 2 if has_gate else 1
    weights_buffer = stack(SLOTS * DEPTH * ROWS * 2, zeros=False)
    sums_buffer = stack(SLOTS * WIDTH * 64, zeros=False)

    def run(
        up: int, up_tile: int, up_stride: int, gate: int, gate_tile: int, gate_stride: int,
        w2: int, w3: int, m: int, k: int, x: int, n: int,
        out: int, y1: int, y2: int, y3: int, n2: int, items: int, r2: int, r3: int, share: int,
        own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        memory, sums = weights_buffer(), sums_buffer()
        tiles, blocks = (m + ROWS - 1) // ROWS, (n + ROWS - 1) // ROWS
        turns = (blocks + wide - 1) // wide
        per_item = (tiles + share - 1) // share * turns
        columns, groups = blocks * ROWS, (k + GROUP - 1) // GROUP
        begin_tiles()
        while True:
            number = fetch_add(own, 1)
            if number >= per_item * items:
                break
            item, rest = number // per_item, number % per_item
            i2, i3 = item % n2, item // n2
            first, begin = rest // turns * share, rest % turns * wide
            count, end = min(share, tiles - first), min(begin + wide, blocks)
            matrix = i2 // r2 * w2 + i3 // r3 * w3
            block(
                up + matrix, up_tile, up_stride, gate + matrix, gate_tile, gate_stride, m, k,
                x + item * blocks * groups * TILE, columns, first, count * per_row, begin, end,
                memory, sums,
            )  # fmt: skip
            target = out + i2 * y2 + i3 * y3
            for j in range(begin * ROWS, min(end * ROWS, n)):
                source = sums + (j // ROWS - begin) * SLOTS * TILE + j % ROWS * 64
                for t in range(count):
                    row = (first + t) * ROWS
                    at, rows = target + j * y1 + row * size, min(ROWS, m - row)
                    if has_gate:
                        gated(source + t * _PAIR, source + t * _PAIR + TILE, at, rows)
                    else:
                        put(source + t * TILE, at, rows)
        end_tiles()

    return run


@cache
def by_expert(up: Inner, gate: Inner | None, act: Gate) -> Native:
    """Products by expert, of activations as `columns.by_expert` stores them.

    up, gate        four words each: address, bytes from 16 rows to the next and from matrix to
                    matrix, stride
    m, k, x         rows and length of a row; activations
    out, y1, y2     byte strides of slots and tokens
    table, ids, n_used, n_tokens, n_experts, share   as in `experts.py`
    """
    name = f"amx_experts_{up.name}_{gate.name}_{act}" if gate else f"amx_experts_{up.name}"
    return Native(name, "i" * 22, lambda: _by_expert(up, gate, act))


def _by_expert(up: Inner, gate: Inner | None, act: Gate) -> Callable[..., None]:
    from pyggml.backends.cpu.linear.amx.tiles import begin_tiles, end_tiles
    from pyggml.backends.cpu.linear.put import put_gated, put_sums, put_zeros
    from pyggml.backends.cpu.native.memory import fetch_add, i32_at, i64_at, stack

    block, put, gated = _block(up, gate), put_sums("f32"), put_gated(act)
    has_gate, per_row, wide = gate is not None, 2 if gate else 1, WIDTH // ROWS
    weights_buffer = stack(SLOTS * DEPTH * ROWS * 2, zeros=False)
    sums_buffer = stack(SLOTS * WIDTH * 64, zeros=False)

    def run(
        up: int, up_tile: int, up_matrix: int, up_stride: int,
        gate: int, gate_tile: int, gate_matrix: int, gate_stride: int,
        m: int, k: int, x: int, out: int, y1: int, y2: int, table: int,
        ids: int, i0: int, i1: int, n_used: int, n_tokens: int, n_experts: int,
        share: int, own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        memory, sums = weights_buffer(), sums_buffer()
        chosen = table + 8
        starts = chosen + 8 * n_experts
        pairs = starts + 8 * (n_experts + 1)
        tiles, groups = (m + ROWS - 1) // ROWS, (k + GROUP - 1) // GROUP
        shares = (tiles + share - 1) // share
        for pair in range(thread, n_used * n_tokens, threads):
            if i32_at(ids + pair % n_used * i0 + pair // n_used * i1) < 0:
                put_zeros(out + pair % n_used * y1 + pair // n_used * y2, m)
        begin_tiles()
        while True:
            number = fetch_add(own, 1)
            if number >= shares * i64_at(table):
                break
            place, first = number // shares, number % shares * share
            expert = i64_at(chosen + 8 * place)
            start = i64_at(starts + 8 * expert)
            n = i64_at(starts + 8 * (expert + 1)) - start
            blocks, count = (n + ROWS - 1) // ROWS, min(share, tiles - first)
            columns = x + (start // ROWS + place) * groups * TILE
            for begin in range(0, blocks, wide):
                end = min(begin + wide, blocks)
                block(
                    up + expert * up_matrix, up_tile, up_stride, gate + expert * gate_matrix,
                    gate_tile, gate_stride, m, k, columns, blocks * ROWS, first, count * per_row,
                    begin, end, memory, sums,
                )  # fmt: skip
                for j in range(begin * ROWS, min(end * ROWS, n)):
                    pair = i64_at(pairs + 8 * (start + j))
                    target = out + pair % n_used * y1 + pair // n_used * y2
                    source = sums + (j // ROWS - begin) * SLOTS * TILE + j % ROWS * 64
                    for t in range(count):
                        row = (first + t) * ROWS
                        at, rows = target + 4 * row, min(ROWS, m - row)
                        if has_gate:
                            gated(source + t * _PAIR, source + t * _PAIR + TILE, at, rows)
                        else:
                            put(source + t * TILE, at, rows)
        end_tiles()

    return run

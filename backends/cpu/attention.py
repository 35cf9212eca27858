"""Flash attention: an online softmax over blocks of keys, in parallel over heads, queries and keys.

A row is a query of a head. Heads that share a head of K read each key together: up to `ROWS` rows
of them are one item of work. Where there are few rows, as for one token, the keys are also cut into
pieces of `KEYS` and a second kernel merges the results. The cuts depend on sizes only, never on
the number of threads, so neither do results.

For each block of 64 keys: scores (4 rows times 4 keys at a time, in registers), softmax, weighted
values (4 rows times 64 columns at a time). Blocks that no row sees are skipped. A hidden key has no
effect on its row even if it holds NaN: its score is replaced, and its values are not added.

With lists of keys, only heads of the same query share keys. A block is then the next 64 keys of the
list that are there: a table of their addresses, so that no row is copied, and their masks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from pyggml import ops
from pyggml.backends.cpu.copy import check_ids
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.rows import READABLE, adjacent
from pyggml.backends.cpu.table import Call, kernel
from pyggml.backends.host_memory import address_of
from pyggml.node import Node

ROWS, BLOCK, KEYS = 4, 64, 512
#: Most rows for which the keys are cut.
FEW = 64
FLOOR = float(np.finfo(np.float32).min)


def _pieces(node: Node) -> int:
    """Pieces of the keys."""
    q = node["q"]
    rows = q.ne[1] * q.ne[2] * q.ne[3]
    return -(-_keys(node) // KEYS) if rows <= FEW else 1


def _keys(node: Node) -> int:
    """Keys of a query."""
    ids = node.get("ids")
    return node["k"].ne[1] if ids is None else ids.ne[0]


def _partial_bytes(node: Node) -> int:
    """Bytes of the largest score, the sum of weights and the weighted values of every row."""
    q, v = node["q"], node["v"]
    return 4 * (v.ne[0] + 2) * q.ne[1] * q.ne[2] * q.ne[3] * _pieces(node)


@cache
def _attend(k_type: str, v_type: str, *, listed: bool) -> Native:
    """partial[piece][row] = largest score, sum of weights, weighted sum of values.

    q, k, v                 addresses, strides of queries (keys) and heads and ne3
    mask                    f16, or 0; strides of queries, m2, m3; sizes of m2 and m3
    sinks, slopes           f32 a head, or 0; byte stride of sinks
    live                    i32, or 0: keys from live - kv0 on are hidden
    ids, strides, n_keys    if `listed`: lists of keys; of keys, queries and ne3; keys of a list
    """
    name = f"attention_{'listed_' * listed}{k_type}_{v_type}"
    return Native(name, "i" * 38 + "ff", lambda: _make(k_type, v_type, listed))


def _make(k_type: str, v_type: str, listed: bool) -> Callable[..., None]:
    from pyggml.backends.cpu import attention_blocks as blocks
    from pyggml.backends.cpu.native.memory import (
        f32_at,
        fetch_add,
        i16_at,
        i32_at,
        i64_at,
        inner,
        put_f32,
        put_i16,
        put_i64,
        stack,
    )
    from pyggml.backends.cpu.row_loops import clear, rescale

    scores, values = blocks.scores(k_type, listed=listed), blocks.values(v_type, listed=listed)
    soften, seen = blocks.soften(hides=True), blocks.seen
    weights_of, lists_of = stack(ROWS * BLOCK * 4), stack(3 * ROWS * 8)
    tables_of, bias_of = stack(2 * BLOCK * 8), stack(ROWS * (BLOCK * 2 + 8))

    @inner
    def list_keys(
        ids: int, step: int, first: int, end: int, live: int, k: int, k1: int, v: int, v1: int,
        tables: int, masks: int, n_rows: int, bias: int,
    ) -> tuple[int, int]:  # fmt: skip
        """Fill the tables with the next keys of a list, and `bias` with the masks of their rows.

        Returns how many, and where in the list the next block begins.
        """
        count = 0
        while first < end and count < BLOCK:
            number = i32_at(ids + first * step)
            first += 1
            if number < 0 or number >= live:
                continue
            put_i64(tables + 8 * count, k + number * k1)
            put_i64(tables + 8 * (BLOCK + count), v + number * v1)
            for r in range(n_rows):
                if i64_at(masks + 8 * r) != 0:
                    place = bias + 2 * (BLOCK * r + count)
                    put_i16(place, i16_at(i64_at(masks + 8 * r) + 2 * number))
            count += 1
        return count, first

    def run(
        partial: int, q: int, q1: int, q2: int, q3: int, k: int, k1: int, k2: int, k3: int,
        v: int, v1: int, v2: int, v3: int, mask: int, m1: int, m2: int, m3: int, n_m2: int,
        n_m3: int, sinks: int, s0: int, slopes: int, live: int, kv0: int, d_k: int, d_v: int,
        n_q: int, heads: int, heads_kv: int, n3: int, n_kv: int, pieces: int, keys: int,
        ids: int, ids0: int, ids1: int, ids3: int, n_keys: int, scale: float, cap: float,
        own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        weights, lists = weights_of(), lists_of()
        queries, masks, sums = lists, lists + 8 * ROWS, lists + 16 * ROWS
        tables, bias = tables_of(), bias_of()
        own_masks = bias + ROWS * BLOCK * 2
        ratio = heads // heads_kv
        together = 1 if listed else n_q  # queries that see the same keys
        shared = ratio * together  # rows that do, of one head of K
        row_blocks, size = (shared + ROWS - 1) // ROWS, 4 * (d_v + 2)
        if live != 0:
            n_kv = max(0, min(n_kv, i32_at(live) - kv0))
        items = row_blocks * heads_kv * n3 * pieces * (n_q // together)
        while True:
            item = fetch_add(own, 1)
            if item >= items:
                break
            piece, rest = item % pieces, item // pieces
            block, rest = rest % row_blocks, rest // row_blocks
            head_kv, rest = rest % heads_kv, rest // heads_kv
            group, i3 = rest % (n_q // together), rest // (n_q // together)
            n_rows = min(ROWS, shared - block * ROWS)
            for r in range(ROWS):
                row = block * ROWS + min(r, n_rows - 1)  # the last row again where there are fewer
                head, query = head_kv * ratio + row // together, group + row % together
                put_i64(queries + 8 * r, q + query * q1 + head * q2 + i3 * q3)
                at = mask + query * m1 + head % n_m2 * m2 + i3 % n_m3 * m3
                put_i64(masks + 8 * r, at if mask != 0 else 0)
                number = (i3 * heads + head) * n_q + query
                target = partial + (piece * n3 * heads * n_q + number) * size
                put_i64(sums + 8 * r, target)
                if r < n_rows:
                    top, total = FLOOR, 0.0
                    if sinks != 0 and piece == 0:
                        top, total = max(f32_at(sinks + head * s0), FLOOR), 1.0
                    put_f32(target, top)
                    put_f32(target + 4, total)
                    clear(target + 8, d_v)
            base_k, base_v = k + head_kv * k2 + i3 * k3, v + head_kv * v2 + i3 * v3
            first, end = piece * keys, min(n_kv, (piece + 1) * keys)
            if listed:
                end = min(n_keys, (piece + 1) * keys)
            while first < end:
                count, at_k, at_v, next_k, seen_masks = min(BLOCK, end - first), 0, 0, k1, masks
                start = 2 * first
                if listed:
                    keys_of = ids + group * ids1 + i3 * ids3
                    count, first = list_keys(
                        keys_of, ids0, first, end, n_kv, base_k, k1, base_v, v1, tables, masks,
                        n_rows, bias,
                    )  # fmt: skip
                    at_k, at_v, next_k, start = tables, tables + 8 * BLOCK, 8, 0
                    for r in range(n_rows):
                        put_i64(own_masks + 8 * r, bias + 2 * BLOCK * r)
                    seen_masks = own_masks
                else:
                    at_k, at_v = base_k + first * k1, base_v + first * v1
                    first += count
                if count == 0 or (mask != 0 and not seen(seen_masks, n_rows, start // 2, count)):
                    continue
                for key in range(0, count, 4):
                    scores(queries, at_k + key * next_k, k1, min(4, count - key), d_k,
                           weights + 4 * key)  # fmt: skip
                for r in range(n_rows):
                    target, at = i64_at(sums + 8 * r), 0
                    slope = 1.0
                    if slopes != 0:
                        row = block * ROWS + r
                        slope = f32_at(slopes + 4 * (head_kv * ratio + row // together))
                    if mask != 0:
                        at = i64_at(seen_masks + 8 * r) + start
                    factor = soften(weights + 4 * BLOCK * r, count, at, scale, slope, cap, target)
                    if factor != 1.0:
                        rescale(target + 8, d_v, factor)
                values(weights, at_v, v1, count, d_v, sums, n_rows)

    return run


@cache
def _merge() -> Native:
    """out = the merged pieces of every row; with `lse` the log-sum-exp behind the values.

    partial, rows, pieces   from `_attend`
    out, o1, o2, o3         strides of heads, queries and ne3
    """

    def make() -> Callable[..., None]:
        import math

        from pyggml.backends.cpu.native.memory import f32_at, put_f32
        from pyggml.backends.cpu.row_loops import add_scaled, clear

        def run(
            out: int, o1: int, o2: int, o3: int, partial: int, rows: int, pieces: int, d_v: int,
            n_q: int, heads: int, lse: int, own: int, thread: int, threads: int,
        ) -> None:  # fmt: skip
            size = 4 * (d_v + 2)
            for row in range(rows * thread // threads, rows * (thread + 1) // threads):
                query, head, i3 = row % n_q, row // n_q % heads, row // n_q // heads
                y = out + head * o1 + query * o2 + i3 * o3
                top = FLOOR
                for p in range(pieces):
                    value = f32_at(partial + (p * rows + row) * size)
                    if value > top or value != value:
                        top = value
                total = 0.0
                for p in range(pieces):
                    at = partial + (p * rows + row) * size
                    total += f32_at(at + 4) * math.exp(f32_at(at) - top)
                clear(y, d_v)
                for p in range(pieces):
                    at = partial + (p * rows + row) * size
                    if total != 0.0:
                        add_scaled(y, at + 8, d_v, math.exp(f32_at(at) - top) / total)
                if lse != 0:
                    put_f32(y + 4 * d_v, math.log(total) + top if total != 0.0 else -math.inf)

        return run

    return Native("attention_merge", "i" * 11, make)


def _refuses(node: Node) -> str | None:
    q, k, v, mask = node["q"], node["k"], node["v"], node.get("mask")
    if k.dtype.name not in READABLE or v.dtype.name not in READABLE:
        return f"flash_attn_ext does not read caches of {k.dtype} and {v.dtype} here"
    if not adjacent(q, k, v, mask):
        return "flash_attn_ext needs rows whose elements are adjacent"
    return None


@kernel(ops.flash_attn_ext, types=None, scratch=_partial_bytes, refuses=_refuses)
def flash_attn_ext(call: Call) -> None:
    q, k, v, out, attrs = call["q"], call["k"], call["v"], call.out, call.attrs
    mask, sinks, live = call.get("mask"), call.get("sinks"), call.get("kv_len")
    ids = call.get("ids")
    d_k, n_q, heads, n3 = q.ne
    pieces, n_keys = _pieces(call.node), _keys(call.node)
    if ids is not None:
        check_ids(call, ids, k.ne[1])
    slopes = alibi_slopes(heads, attrs["head0"], attrs["n_head"], attrs["max_bias"])
    if slopes is not None:
        call.keep.append(slopes)
    masked = (mask.ptr, *mask.nb[1:], *mask.ne[2:]) if mask else (0, 0, 0, 0, 1, 1)
    call.add(
        _attend(k.type, v.type, listed=ids is not None), call.scratch, q.ptr, *q.nb[1:],
        k.ptr, *k.nb[1:], v.ptr, *v.nb[1:], *masked,
        *((sinks.ptr, sinks.nb[0]) if sinks else (0, 0)),
        0 if slopes is None else address_of(slopes), live.ptr if live else 0, attrs["kv0"], d_k,
        v.ne[0], n_q, heads, k.ne[2], n3, k.ne[1], pieces, KEYS if pieces > 1 else n_keys,
        *((ids.ptr, *ids.nb[:2], ids.nb[3]) if ids else (0, 0, 0, 0)), n_keys,
        attrs["scale"], attrs["logit_softcap"],
    )  # fmt: skip
    call.add(
        _merge(), out.ptr, *out.nb[1:], call.scratch, n_q * heads * n3, pieces, v.ne[0], n_q,
        heads, int(attrs["lse"]), work=out.elements * pieces,
    )  # fmt: skip


def alibi_slopes(heads: int, head0: int, n_head: int, max_bias: float) -> Any:
    """The factor of the mask for each head, as in `ops.soft_max_ext`; None if all are 1."""
    if max_bias <= 0:
        return None
    power = 1 << (n_head.bit_length() - 1)
    exponents = [g + 1 if g < power else g - power + 0.5 for g in range(head0, head0 + heads)]
    return np.array([2.0 ** (-max_bias * e / power) for e in exponents], np.float32)

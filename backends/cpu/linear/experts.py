"""Products by expert id: rows are grouped by expert, and only the chosen experts are read.

A pair is a token and one of its slots, numbered token * n_used + slot. `group` sorts the pairs by
expert; its tables, in words of 8 bytes:

    count          experts with pairs
    chosen[..]     these experts                        n_experts words
    starts[..]     where the pairs of an expert begin   n_experts + 1 words
    pairs[..]      sorted by expert                     n_used n_tokens words
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from pyggml import ops
from pyggml.backends.cpu.copy import check_ids
from pyggml.backends.cpu.gate import Gate
from pyggml.backends.cpu.linear.amx.kernels import add_by_expert
from pyggml.backends.cpu.linear.inner import WIDE, Inner, times
from pyggml.backends.cpu.linear.operands import (
    SHARE,
    activations,
    matrices,
    numeric,
    refusal,
    uses_amx,
    x_bytes,
)
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.table import Call, kernel
from pyggml.backends.host_memory import aligned
from pyggml.backends.host_tiles import ROWS
from pyggml.node import Node

#: Quarters of a token's work that threads divide evenly from the start. Who is done takes of the
#: rest. On two cores a token's experts take 6 % less time than if all is taken bit by bit.
FIXED = 3


def _table_bytes(node: Node) -> int:
    n_experts = node[node.op.weights[0]].ne[2]
    return 8 * (2 + 2 * n_experts + node["ids"].spec.elements)


def _scratch(node: Node) -> int:
    return aligned(x_bytes(node)) + _table_bytes(node)


def _group() -> Callable[..., None]:
    from pyggml.backends.cpu.native.memory import i32_at, i64_at, put_i64

    def run(
        table: int, ids: int, nb0: int, nb1: int, n_used: int, n_tokens: int, n_experts: int,
        own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        chosen = table + 8
        starts = chosen + 8 * n_experts
        pairs = starts + 8 * (n_experts + 1)
        for e in range(n_experts + 1):
            put_i64(starts + 8 * e, 0)
        for pair in range(n_used * n_tokens):
            e = i32_at(ids + pair % n_used * nb0 + pair // n_used * nb1)
            if e >= 0:
                put_i64(starts + 8 * (e + 1), i64_at(starts + 8 * (e + 1)) + 1)
        count = 0
        for e in range(n_experts):
            n = i64_at(starts + 8 * (e + 1))
            if n > 0:
                put_i64(chosen + 8 * count, e)
                count += 1
            put_i64(starts + 8 * (e + 1), i64_at(starts + 8 * e) + n)
        put_i64(table, count)
        # Every expert's start moves to its end while its pairs are placed, and back afterwards.
        for pair in range(n_used * n_tokens):
            e = i32_at(ids + pair % n_used * nb0 + pair // n_used * nb1)
            if e >= 0:
                place = i64_at(starts + 8 * e)
                put_i64(pairs + 8 * place, pair)
                put_i64(starts + 8 * e, place + 1)
        for e in range(n_experts - 1, -1, -1):
            before = i64_at(starts + 8 * (e - 1)) if e > 0 else 0
            put_i64(starts + 8 * e, before)

    return run


GROUP = Native("group_by_expert", "iiiiiii", _group)


@cache
def _product(up: Inner, gate: Inner | None, act: Gate) -> Native:
    """out[token][slot] = the expert's rows times x[token][slot % n_b]; with a gate, both products
    and the activation.

    up, gate        five words each: address, bytes from 16 rows to the next and from matrix to
                    matrix, k, stride (gate: 0 without one)
    m               rows of a matrix
    x, x1, x2, n_b  rows of a token and tokens: byte strides
    out, y1, y2     byte strides of slots and tokens
    table, ids      as for `group`
    share           16 rows that a thread takes at once: how many
    """
    name = f"experts_{up.name}_{gate.name}_{act}" if gate else f"experts_{up.name}"
    return Native(name, "i" * 26, lambda: _make(up, gate, act))


def _make(up_inner: Inner, gate_inner: Inner | None, act: Gate) -> Callable[..., None]:
    from pyggml.backends.cpu.linear.put import put_gated, put_sums, put_zeros
    from pyggml.backends.cpu.native.memory import fetch_add, i32_at, i64_at, put_i64, stack

    has_gate = gate_inner is not None
    multiply_up = times(up_inner)
    multiply_gate = times(gate_inner) if gate_inner not in (None, up_inner) else multiply_up
    put, gated = put_sums("f32"), put_gated(act)
    buffer = stack(2 * 64 * WIDE + 8 * WIDE)

    def run(
        up: int, up_tile: int, up_matrix: int, up_k: int, up_stride: int,
        gate: int, gate_tile: int, gate_matrix: int, gate_k: int, gate_stride: int,
        m: int, x: int, x1: int, x2: int, n_b: int, out: int, y1: int, y2: int,
        table: int, ids: int, i0: int, i1: int, n_used: int, n_tokens: int, n_experts: int,
        share: int, own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        ups = buffer()
        gates = ups + 64 * WIDE
        xs = gates + 64 * WIDE
        chosen = table + 8
        starts = chosen + 8 * n_experts
        pairs = starts + 8 * (n_experts + 1)
        tiles = (m + ROWS - 1) // ROWS
        shares = (tiles + share - 1) // share
        for pair in range(thread, n_used * n_tokens, threads):
            if i32_at(ids + pair % n_used * i0 + pair // n_used * i1) < 0:
                put_zeros(out + pair % n_used * y1 + pair // n_used * y2, m)
        total = shares * i64_at(table)
        # With a pair for each expert all shares are alike. Then a thread takes most of its shares
        # side by side, so that what it has fetched beyond one is not another thread's.
        fixed = total * FIXED // 4 if n_used * n_tokens <= i64_at(table) else 0
        number, last = fixed * thread // threads, fixed * (thread + 1) // threads
        while True:
            if number >= last:
                number = fixed + fetch_add(own, 1)
                if number >= total:
                    break
                last = 0
            expert, first = i64_at(chosen + 8 * (number // shares)), number % shares * share
            begin, end = i64_at(starts + 8 * expert), i64_at(starts + 8 * (expert + 1))
            for t in range(first, min(first + share, tiles)):
                u = up + expert * up_matrix + t * up_tile
                g = gate + expert * gate_matrix + t * gate_tile
                row, count = t * ROWS, min(ROWS, m - t * ROWS)
                for j in range(begin, end, WIDE):
                    several = min(WIDE, end - j)
                    for c in range(WIDE):  # the last pair again where there are fewer
                        pair = i64_at(pairs + 8 * (j + min(c, several - 1)))
                        source = x + pair // n_used * x2 + pair % n_used % n_b * x1
                        put_i64(xs + 8 * c, source)
                    multiply_up(u, up_k, up_stride, count, xs, several, ups)
                    if has_gate:
                        multiply_gate(g, gate_k, gate_stride, count, xs, several, gates)
                    for c in range(several):
                        pair = i64_at(pairs + 8 * (j + c))
                        target = out + pair % n_used * y1 + pair // n_used * y2 + 4 * row
                        if has_gate:
                            gated(ups + 64 * c, gates + 64 * c, target, count)
                        else:
                            put(ups + 64 * c, target, count)
            number += 1

    return run


def _by_expert(call: Call, up: str, gate: str | None, act: Gate) -> None:
    ids, out = call["ids"], call.out
    n_used, n_tokens, n_experts = *ids.ne[:2], call[up].ne[2]
    check_ids(call, ids, n_experts)
    table = call.scratch + aligned(x_bytes(call.node))
    grouping = (table, ids.ptr, *ids.nb[:2], n_used, n_tokens, n_experts)
    if uses_amx(call.node):
        call.add(GROUP, *grouping, work=0)
        add_by_expert(call, up, gate, act, table)
        return
    x = activations(call)
    call.add(GROUP, *grouping, work=0)
    ups = matrices(call, up)
    gates = matrices(call, gate) if gate else None
    none = (0,) * 5
    call.add(
        _product(ups.inner, gates.inner if gates else None, act),
        ups.ptr, ups.tile, ups.nb2, ups.k, ups.stride,
        *((gates.ptr, gates.tile, gates.nb2, gates.k, gates.stride) if gates else none),
        call[up].ne[1], x.ptr, x.nb1, x.nb2, call["b"].ne[1], out.ptr, *out.nb[1:3], table,
        ids.ptr, *ids.nb[:2], n_used, n_tokens, n_experts, ups.share(SHARE, 1),
    )  # fmt: skip


@kernel(ops.mul_mat_id, types=None, scratch=_scratch, refuses=refusal, numeric=numeric)
def mul_mat_id(call: Call) -> None:
    _by_expert(call, "experts", None, Gate())


@kernel(ops.moe_up_gate, types=None, scratch=_scratch, refuses=refusal, numeric=numeric)
def moe_up_gate(call: Call) -> None:
    _by_expert(call, "up", "gate", Gate.of(call.attrs))

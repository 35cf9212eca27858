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
from pyggml.backends.cpu.linear.kernels import placed, quantized, refusal, share_of, x_bytes
from pyggml.backends.cpu.linear.products import COLUMNS
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.table import Call, Operand, kernel
from pyggml.backends.cpu.weights.forms import FORMS, ROWS
from pyggml.backends.host_memory import aligned
from pyggml.node import Node


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
        if thread != 0:
            return
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
def _product(up: str, gate: str, act: str) -> Native:
    """out[token][slot] = the expert's rows times x[token][slot % n_b]; with a gate, both products
    and the activation.

    up, gate          tiles, bytes of a tile (gate: 0 without one)
    m, tiles, groups  rows and tiles of a matrix, groups of a row
    x, x_row, n_b     quantized activations
    out, nb1, nb2     byte strides of slots and tokens
    table, ids        as for `group`
    share             tiles that a thread takes at once
    """
    name = f"experts_{up}_{gate}_{act}" if gate else f"experts_{up}"
    return Native(name, "i" * 21, lambda: _make(up, gate, act))


def _make(up_name: str, gate_name: str, act: str) -> Callable[..., None]:
    from pyggml.backends.cpu.linear.put import put_gated, put_sums, put_zeros
    from pyggml.backends.cpu.linear.tile import tile_product
    from pyggml.backends.cpu.native.memory import fetch_add, i32_at, i64_at, put_i64, stack

    up_form = FORMS[up_name]
    up_one, up_several = tile_product(up_form, 1), tile_product(up_form, COLUMNS)
    has_gate = bool(gate_name)
    gate_form = FORMS[gate_name or up_name]
    gate_one, gate_several = tile_product(gate_form, 1), tile_product(gate_form, COLUMNS)
    gated, buffer = put_gated(act or "silu"), stack(2 * 64 * COLUMNS + 8 * COLUMNS)

    def run(
        up: int, up_tile: int, gate: int, gate_tile: int, m: int, tiles: int, groups: int,
        x: int, x_row: int, n_b: int, out: int, nb1: int,
        nb2: int, table: int, ids: int, i0: int, i1: int, n_used: int, n_tokens: int,
        n_experts: int, share: int, own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        ups = buffer()
        gates = ups + 64 * COLUMNS
        xs = gates + 64 * COLUMNS
        chosen = table + 8
        starts = chosen + 8 * n_experts
        pairs = starts + 8 * (n_experts + 1)
        shares = (tiles + share - 1) // share
        for pair in range(thread, n_used * n_tokens, threads):
            if i32_at(ids + pair % n_used * i0 + pair // n_used * i1) < 0:
                put_zeros(out + pair % n_used * nb1 + pair // n_used * nb2, m)
        while True:
            number = fetch_add(own, 1)
            if number >= shares * i64_at(table):
                break
            expert, first = i64_at(chosen + 8 * (number // shares)), number % shares * share
            begin, end = i64_at(starts + 8 * expert), i64_at(starts + 8 * (expert + 1))
            for t in range(first, min(first + share, tiles)):
                u = up + (expert * tiles + t) * up_tile
                g = gate + (expert * tiles + t) * gate_tile
                row, count, j = t * ROWS, min(ROWS, m - t * ROWS), begin
                while j < end:
                    width = COLUMNS if j + COLUMNS <= end else 1
                    for c in range(width):
                        pair = i64_at(pairs + 8 * (j + c))
                        number_of_row = pair // n_used * n_b + pair % n_used % n_b
                        put_i64(xs + 8 * c, x + number_of_row * x_row)
                    if width > 1:
                        up_several(u, groups, xs, ups)
                        if has_gate:
                            gate_several(g, groups, xs, gates)
                    else:
                        up_one(u, groups, xs, ups)
                        if has_gate:
                            gate_one(g, groups, xs, gates)
                    for c in range(width):
                        pair = i64_at(pairs + 8 * (j + c))
                        target = out + pair % n_used * nb1 + pair // n_used * nb2 + 4 * row
                        if has_gate:
                            gated(ups + 64 * c, gates + 64 * c, target, count)
                        else:
                            put_sums(ups + 64 * c, target, count)
                    j += width

    return run


def _by_expert(call: Call, up: Operand, gate: Operand | None, act: str) -> None:
    b, ids, out = call["b"], call["ids"], call.out
    n_used, n_tokens, n_experts = *ids.ne[:2], up.ne[2]
    check_ids(call, ids, n_experts)
    x_row = quantized(call, b)
    table = call.scratch + aligned(x_bytes(call.node))
    call.add(GROUP, table, ids.ptr, *ids.nb[:2], n_used, n_tokens, n_experts)
    tiles, up_weight = placed(up)
    gate_weight = placed(gate)[1] if gate is not None else (0, 0)
    call.add(
        _product(up.type, gate.type if gate else "", act), *up_weight, *gate_weight, up.ne[1],
        tiles.tiles, tiles.groups, call.scratch, x_row, b.ne[1], out.ptr, *out.nb[1:3], table,
        ids.ptr, *ids.nb[:2], n_used, n_tokens, n_experts, share_of(tiles),
    )  # fmt: skip


@kernel(ops.mul_mat_id, types=None, scratch=_scratch, refuses=refusal, numeric="quantized")
def mul_mat_id(call: Call) -> None:
    _by_expert(call, call["experts"], None, "")


@kernel(ops.moe_up_gate, types=None, scratch=_scratch, refuses=refusal, numeric="quantized")
def moe_up_gate(call: Call) -> None:
    _by_expert(call, call["up"], call["gate"], call.attrs["act"])

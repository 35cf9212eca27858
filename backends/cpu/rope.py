"""Rotary position embedding of f32.

Two kernels: sines and cosines of all tokens go to scratch, then heads are rotated by them. Angles
are f64 and reduced to a quarter turn before they become f32, as in the NumPy backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from pyggml import ops
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.rows import row_refusal
from pyggml.backends.cpu.table import Call, kernel
from pyggml.backends.host_memory import address_of
from pyggml.node import Node


def _pairs(node: Node) -> int:
    """Pairs of a row, rounded up to whole vectors."""
    pairs: int = node.attrs["n_dims"] // 2
    return -(-pairs // 16) * 16


def _table_bytes(node: Node) -> int:
    """Cosines and sines of a token; in mode "normal" each is there twice, for both of a pair."""
    return _pairs(node) * 4 * (4 if node.attrs["mode"] == "normal" else 2)


@cache
def _angles(mode: str) -> Native:
    """table[token] = the cosines and sines of pos[token] frequency / factor, times `scale`.

    pos, pos_step       i32, byte stride
    frequencies         f64 [pairs]
    factors, n_factors  f32, or 0: 1
    vectors             of 16 pairs
    """

    def make() -> Callable[..., None]:
        from pyggml.backends.cpu.native import maths
        from pyggml.backends.cpu.native.emit import (
            DOUBLES,
            F64,
            FLOATS,
            I64,
            Emitter,
            emits,
            f32,
        )
        from pyggml.backends.cpu.native.memory import i32_at

        @emits(None, I64, I64, F64, I64, I64, I64, F64)
        def turn(
            e: Emitter, cosines: Any, sines: Any, pos: Any, frequencies: Any, factors: Any,
            n_factors: Any, scale: Any,
        ) -> None:  # fmt: skip
            angle = e.b.fmul(e.splat(pos), e.load(DOUBLES, frequencies))
            place = e.variable(angle)
            with e.when(e.b.icmp_signed(">", n_factors, e.integer(0))):
                divisors = e.load_first(FLOATS, factors, n_factors)
                one = e.constant(FLOATS, 1.0)
                divisors = e.b.select(e.first(n_factors), divisors, one)
                place.set(e.b.fdiv(angle, e.b.fpext(divisors, DOUBLES)))
            factor = e.splat(e.b.fptrunc(scale, f32))
            sine, cosine = (e.b.fmul(v, factor) for v in maths.sin_cos(e, place.get()))
            if mode == "neox":
                e.store(cosine, cosines)
                e.store(sine, sines)
                return
            minus = e.b.fneg(sine)
            for part in range(2):
                lanes = [8 * part + i // 2 for i in range(16)]
                e.store(e.shuffle(cosine, cosine, lanes), cosines, 64 * part)
                both = [lane + 16 * (i % 2) for i, lane in enumerate(lanes)]
                e.store(e.shuffle(minus, sine, both), sines, 64 * part)

        width = 128 if mode == "normal" else 64

        def run(
            table: int, table_row: int, pos: int, pos_step: int, tokens: int, frequencies: int,
            vectors: int, factors: int, n_factors: int, scale: float,
            own: int, thread: int, threads: int,
        ) -> None:  # fmt: skip
            for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
                cosines = table + t * table_row
                sines = cosines + vectors * width
                position = float(i32_at(pos + t * pos_step))
                for v in range(vectors):
                    left = min(16, max(0, n_factors - 16 * v))
                    turn(
                        cosines + v * width, sines + v * width, position, frequencies + v * 128,
                        factors + v * 64, left, scale,
                    )  # fmt: skip

        return run

    return Native(f"rope_angles_{mode}", "i" * 9 + "f", make)


@cache
def _rotate(mode: str) -> Native:
    """Rotate rows of n by the table: elements first to first + n_dims; copy the others."""

    def make() -> Callable[..., None]:
        from pyggml.backends.cpu.native.emit import I64, Emitter, Row, emits

        @emits(None, I64, I64, I64, I64, I64)
        def neighbours(e: Emitter, out: Any, x: Any, cosines: Any, sines: Any, n: Any) -> None:
            """out = x cosines + (neighbours of x) sines"""

            def put(row: Row, offset: Any) -> None:
                v = row.load(x, offset)
                other = e.shuffle(v, v, [i ^ 1 for i in range(16)])
                turned = e.b.fmul(other, row.load(sines, offset))
                row.store(e.fma(v, row.load(cosines, offset), turned), out, offset)

            e.row(n, put)

        @emits(None, I64, I64, I64, I64, I64)
        def halves(e: Emitter, out: Any, x: Any, cosines: Any, sines: Any, n: Any) -> None:
            """Pairs (i, i + n / 2)."""
            half = e.b.lshr(n, e.integer(1))
            far = e.mul(half, 4)

            def put(row: Row, offset: Any) -> None:
                u, v = row.load(x, offset), row.load(e.add(x, far), offset)
                c, s = row.load(cosines, offset), row.load(sines, offset)
                row.store(e.fma(u, c, e.b.fneg(e.b.fmul(v, s))), out, offset)
                row.store(e.fma(u, s, e.b.fmul(v, c)), e.add(out, far), offset)

            e.row(half, put)

        @emits(None, I64, I64, I64)
        def copy(e: Emitter, out: Any, x: Any, n: Any) -> None:
            e.row(n, lambda row, offset: row.store(row.load(x, offset), out, offset))

        turn = neighbours if mode == "normal" else halves

        def run(
            out: int, o1: int, o2: int, o3: int, x: int, x1: int, x2: int, x3: int,
            n: int, heads: int, tokens: int, rows: int, first: int, n_dims: int,
            table: int, table_row: int, sines: int, own: int, thread: int, threads: int,
        ) -> None:  # fmt: skip
            for row in range(rows * thread // threads, rows * (thread + 1) // threads):
                i1, i2, i3 = row % heads, row // heads % tokens, row // heads // tokens
                y, source = out + i1 * o1 + i2 * o2 + i3 * o3, x + i1 * x1 + i2 * x2 + i3 * x3
                cosines = table + i2 * table_row
                if y != source:
                    end = first + n_dims
                    copy(y, source, first)
                    copy(y + 4 * end, source + 4 * end, n - end)
                turn(y + 4 * first, source + 4 * first, cosines, cosines + sines, n_dims)

        return run

    return Native(f"rope_rotate_{mode}", "i" * 17, make)


def _ramp(node: Node) -> Any:
    """YaRN: the share of its unscaled angle that each pair keeps; see `ops.rope_ext`."""
    attrs, n_dims = node.attrs, node.attrs["n_dims"]

    def pair(beta: float) -> float:
        turns = math.log(attrs["n_ctx_orig"] / (2 * math.pi * beta))
        return float(n_dims * turns / (2 * math.log(attrs["freq_base"])))

    low = max(0, math.floor(pair(attrs["beta_fast"])))
    high = min(n_dims - 1, math.ceil(pair(attrs["beta_slow"])))
    return 1 - np.clip((np.arange(n_dims // 2) - low) / max(0.001, high - low), 0, 1)


@kernel(
    ops.rope_ext,
    types={"f32", "i32"},
    inplace=("a",),
    scratch=lambda node: node.ne[2] * _table_bytes(node),
    refuses=row_refusal,
)
def rope_ext(call: Call) -> None:
    a, pos, factors, out = call["a"], call["pos"], call.get("freq_factors"), call.out
    attrs, node = call.attrs, call.node
    n_dims, mode, attn_factor = attrs["n_dims"], attrs["mode"], attrs["attn_factor"]
    share = attrs["freq_scale"]
    if attrs["ext_factor"]:
        keep = attrs["ext_factor"] * _ramp(node)
        share = attrs["freq_scale"] * (1 - keep) + keep
        attn_factor *= 1 + 0.1 * math.log(1 / attrs["freq_scale"])
    frequencies = np.zeros(_pairs(node))
    powers = np.arange(n_dims // 2) * (-2 / n_dims)
    frequencies[: n_dims // 2] = attrs["freq_base"] ** powers * share
    if attrs["back"]:
        np.negative(frequencies, out=frequencies)
    call.keep.append(frequencies)
    n, heads, tokens, n3 = a.ne
    row, vectors = _table_bytes(node), _pairs(node) // 16
    call.add(
        _angles(mode), call.scratch, row, pos.ptr, pos.nb[0], tokens, address_of(frequencies),
        vectors, factors.ptr if factors else 0, n_dims // 2 if factors else 0, attn_factor,
        work=4 * n_dims * tokens,
    )  # fmt: skip
    call.add(
        _rotate(mode), out.ptr, *out.nb[1:], a.ptr, *a.nb[1:], n, heads, tokens,
        heads * tokens * n3, attrs["offset"], n_dims, call.scratch, row, row // 2,
        work=a.elements,
    )  # fmt: skip

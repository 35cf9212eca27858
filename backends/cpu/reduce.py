"""Softmax and the largest elements of rows."""

from __future__ import annotations

from collections.abc import Callable

from pyggml import ops
from pyggml.backends.cpu.attention import FLOOR, alibi_slopes
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.rows import row_refusal
from pyggml.backends.cpu.table import Call, kernel
from pyggml.backends.host_memory import address_of
from pyggml.node import Node


def _softmax() -> Callable[..., None]:
    from pyggml.backends.cpu import attention_blocks as blocks
    from pyggml.backends.cpu.native.memory import f32_at, put_f32, stack
    from pyggml.backends.cpu.row_loops import copy, rescale

    soften, stats_of = blocks.soften(hides=False), stack(8)

    def run(
        out: int, o1: int, o2: int, o3: int, x: int, x1: int, x2: int, x3: int, mask: int,
        m1: int, m2: int, m3: int, n_m2: int, n_m3: int, sinks: int, s0: int, slopes: int,
        n: int, n1: int, n2: int, rows: int, scale: float, own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        stats = stats_of()
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            i1, i2, i3 = row % n1, row // n1 % n2, row // n1 // n2
            y, source = out + i1 * o1 + i2 * o2 + i3 * o3, x + i1 * x1 + i2 * x2 + i3 * x3
            if y != source:
                copy(y, source, n)
            top, total, slope, at = FLOOR, 0.0, 1.0, 0
            if sinks != 0:
                top, total = max(f32_at(sinks + i2 * s0), FLOOR), 1.0
            if slopes != 0:
                slope = f32_at(slopes + 4 * i2)
            if mask != 0:
                at = mask + i1 * m1 + i2 % n_m2 * m2 + i3 % n_m3 * m3
            put_f32(stats, top)
            put_f32(stats + 4, total)
            soften(y, n, at, scale, slope, 0.0, stats)
            total = f32_at(stats + 4)
            if total != 0.0:  # else a row without keys, which is all zeros
                rescale(y, n, 1.0 / total)

    return run


SOFTMAX = Native("soft_max_ext", "i" * 21 + "f", _softmax)


def _softmax_refuses(node: Node) -> str | None:
    mask = node.get("mask")
    if mask is not None and mask.dtype.name != "f16":
        return f"{node.op.name} takes masks of f16 here"
    return row_refusal(node)


@kernel(ops.soft_max_ext, types={"f32", "f16"}, inplace=("a",), refuses=_softmax_refuses)
def soft_max_ext(call: Call) -> None:
    a, mask, sinks, out, attrs = (
        call["a"],
        call.get("mask"),
        call.get("sinks"),
        call.out,
        call.attrs,
    )
    n, n1, n2, n3 = a.ne
    slopes = alibi_slopes(n2, attrs["head0"], attrs["n_head"], attrs["max_bias"])
    call.keep.append(slopes)
    masked = (mask.ptr, *mask.nb[1:], *mask.ne[2:]) if mask else (0, 0, 0, 0, 1, 1)
    call.add(
        SOFTMAX, out.ptr, *out.nb[1:], a.ptr, *a.nb[1:], *masked,
        *((sinks.ptr, sinks.nb[0]) if sinks else (0, 0)),
        0 if slopes is None else address_of(slopes), n, n1, n2, n1 * n2 * n3, attrs["scale"],
    )  # fmt: skip


def _top() -> Callable[..., None]:
    from pyggml.backends.cpu.native.memory import f32_at, i32_at, put_i32

    def run(
        out: int, o0: int, o1: int, o2: int, o3: int, x: int, x1: int, x2: int, x3: int, n: int,
        n1: int, n2: int, rows: int, k: int, own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            i1, i2, i3 = row % n1, row // n1 % n2, row // n1 // n2
            y, source = out + i1 * o1 + i2 * o2 + i3 * o3, x + i1 * x1 + i2 * x2 + i3 * x3
            for place in range(k):
                best, best_key = 0, -1
                for i in range(n):
                    value = f32_at(source + 4 * i)
                    # The bits of floats sort like the floats if those of negative ones are
                    # inverted. NaN comes first, and -0 equals 0.
                    if value != value:
                        key = 0xFFFFFFFF
                    elif value == 0.0:
                        key = 0x80000000
                    else:
                        bits = i32_at(source + 4 * i)
                        key = bits + 0x80000000 if bits >= 0 else ~bits & 0x7FFFFFFF
                    if key > best_key:
                        taken = False
                        for earlier in range(place):
                            if i32_at(y + earlier * o0) == i:
                                taken = True
                        if not taken:
                            best, best_key = i, key
                put_i32(y + place * o0, best)

    return run


TOP = Native("top_k", "i" * 14, _top)

#: The selection takes n k comparisons; NumPy's sort is faster for more.
MOST_K = 16


def _top_refuses(node: Node) -> str | None:
    if node.attrs["k"] > MOST_K:
        return f"top_k with k above {MOST_K} sorts, by NumPy"
    return row_refusal(node)


@kernel(ops.top_k, types={"f32", "i32"}, refuses=_top_refuses)
def top_k(call: Call) -> None:
    a, out = call["a"], call.out
    n, n1, n2, n3 = a.ne
    call.add(TOP, out.ptr, *out.nb, a.ptr, *a.nb[1:], n, n1, n2, n1 * n2 * n3, call.attrs["k"])

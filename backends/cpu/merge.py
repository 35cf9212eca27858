"""Merging of attention over different keys: two results at a time, or in a running sum.

Row by row, in the order of `ops.merge`; a row without keys has the log-sum-exp -inf and zeros.
"""

from __future__ import annotations

from collections.abc import Callable

from pyggml import ops
from pyggml.backends.cpu.attention import FLOOR
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.rows import row_refusal
from pyggml.backends.cpu.table import Call, Operand, kernel

#: A sum is rescaled when a part outweighs the reference by more than e^GROWTH, long before an
#: overflow.
GROWTH = 16.0


def _merge() -> Callable[..., None]:
    import math

    from pyggml.backends.cpu.native.memory import f32_at, put_f32
    from pyggml.backends.cpu.row_loops import combine

    def run(
        out: int, o1: int, o2: int, o3: int, a: int, a1: int, a2: int, a3: int,
        b: int, b1: int, b2: int, b3: int, d_v: int, n1: int, n2: int, rows: int,
        own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            i1, i2, i3 = row % n1, row // n1 % n2, row // n1 // n2
            y, u = out + i1 * o1 + i2 * o2 + i3 * o3, a + i1 * a1 + i2 * a2 + i3 * a3
            v = b + i1 * b1 + i2 * b2 + i3 * b3
            lse_u, lse_v = f32_at(u + 4 * d_v), f32_at(v + 4 * d_v)
            top = lse_u if lse_u > lse_v else lse_v  # if one is NaN, so is `total`
            floor = FLOOR if top < FLOOR else top
            w_u, w_v = math.exp(lse_u - floor), math.exp(lse_v - floor)
            total = w_u + w_v
            if total == 0.0:
                total = 1.0
            combine(y, u, w_u / total, v, w_v / total, d_v)
            put_f32(y + 4 * d_v, math.log(total) + top)

    return run


def _sum() -> Callable[..., None]:
    import math

    from pyggml.backends.cpu.native.memory import f32_at, put_f32
    from pyggml.backends.cpu.row_loops import combine

    def run(
        out: int, o1: int, o2: int, o3: int, a: int, a1: int, a2: int, a3: int,
        c: int, c1: int, c2: int, c3: int, d_v: int, n1: int, n2: int, rows: int,
        own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            i1, i2, i3 = row % n1, row // n1 % n2, row // n1 // n2
            y, part = out + i1 * o1 + i2 * o2 + i3 * o3, a + i1 * a1 + i2 * a2 + i3 * a3
            lse = f32_at(part + 4 * d_v)
            if c == 0:
                top = FLOOR if lse < FLOOR else lse
                weight = math.exp(lse - top)
                combine(y, part, weight, part, 0.0, d_v)
                put_f32(y + 4 * d_v, weight)
            else:
                old = c + i1 * c1 + i2 * c2 + i3 * c3
                reference = f32_at(old + 4 * d_v + 4)
                top = lse if lse - GROWTH > reference else reference
                shrink, weight = math.exp(reference - top), math.exp(lse - top)
                combine(y, old, shrink, part, weight, d_v)
                put_f32(y + 4 * d_v, f32_at(old + 4 * d_v) * shrink + weight)
            put_f32(y + 4 * d_v + 4, top)

    return run


def _finish() -> Callable[..., None]:
    import math

    from pyggml.backends.cpu.native.memory import f32_at, put_f32
    from pyggml.backends.cpu.row_loops import divide

    def run(
        out: int, o1: int, o2: int, o3: int, c: int, c1: int, c2: int, c3: int,
        d_v: int, n1: int, n2: int, rows: int, lse: int, own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            i1, i2, i3 = row % n1, row // n1 % n2, row // n1 // n2
            y, part = out + i1 * o1 + i2 * o2 + i3 * o3, c + i1 * c1 + i2 * c2 + i3 * c3
            total = f32_at(part + 4 * d_v)
            divide(y, part, d_v, total if total != 0.0 else 1.0)
            if lse != 0:
                top = f32_at(part + 4 * d_v + 4)
                put_f32(y + 4 * d_v, math.log(total) + top if total != 0.0 else -math.inf)

    return run


MERGE = Native("merge_lse", "i" * 16, _merge)
SUM = Native("lse_sum", "i" * 16, _sum)
FINISH = Native("lse_finish", "i" * 13, _finish)


def _rows(x: Operand) -> tuple[int, int, int]:
    """Arguments: sizes of two axes, rows."""
    _, n1, n2, n3 = x.ne
    return n1, n2, n1 * n2 * n3


@kernel(ops.merge_lse, inplace=("a", "b"), refuses=row_refusal)
def merge_lse(call: Call) -> None:
    a, b, out = call["a"], call["b"], call.out
    call.add(
        MERGE, out.ptr, *out.nb[1:], a.ptr, *a.nb[1:], b.ptr, *b.nb[1:], out.ne[0] - 1, *_rows(out)
    )


@kernel(ops.lse_sum, inplace=("c",), refuses=row_refusal)
def lse_sum(call: Call) -> None:
    a, c, out = call["a"], call.get("c"), call.out
    before = (c.ptr, *c.nb[1:]) if c else (0, 0, 0, 0)
    call.add(SUM, out.ptr, *out.nb[1:], a.ptr, *a.nb[1:], *before, out.ne[0] - 2, *_rows(out))


@kernel(ops.lse_finish, refuses=row_refusal)
def lse_finish(call: Call) -> None:
    c, out = call["c"], call.out
    call.add(
        FINISH, out.ptr, *out.nb[1:], c.ptr, *c.nb[1:], c.ne[0] - 2, *_rows(out),
        int(call.attrs["lse"]),
    )  # fmt: skip

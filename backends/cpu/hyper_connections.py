"""Hyper-connections: several residual streams, mixed before and after a sublayer."""

from __future__ import annotations

import math
from collections.abc import Callable

from pyggml import ops
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.rows import row_refusal
from pyggml.backends.cpu.table import Call, kernel


def _comb() -> Callable[..., None]:
    from pyggml.backends.cpu.native.memory import f32_at, inner, put_f32

    @inner
    def divide(c: int, first: int, second: int, n: int, eps: float) -> None:
        """Divide each of n vectors, `first` bytes apart, by its sum + eps."""
        for i in range(n):
            at, total = c + i * first, 0.0
            for j in range(n):
                total += f32_at(at + j * second)
            total += eps
            for j in range(n):
                put_f32(at + j * second, f32_at(at + j * second) / total)

    def run(
        out: int, o1: int, o2: int, x: int, x0: int, x1: int, scale: int, s0: int, base: int,
        b0: int, hc: int, n_tokens: int, maps: int, eps: float, n_iter: float,
        own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        factor = f32_at(scale + 2 * s0)
        for t in range(n_tokens * thread // threads, n_tokens * (thread + 1) // threads):
            c = out + t * o2
            if maps != 0:  # rows of pre and post come before the matrix
                for i in range(2 * hc):
                    part = i // hc
                    mixed = f32_at(scale + part * s0) * f32_at(x + t * x1 + i * x0)
                    value = (1 + part) / (1 + math.exp(-(mixed + f32_at(base + i * b0))))
                    put_f32(c + part * o1 + 4 * (i % hc), value + (1 - part) * eps)
                c += 2 * o1
            for s in range(hc):
                row, top, total = c + s * o1, -math.inf, 0.0
                for d in range(hc):
                    i = 2 * hc + d + hc * s
                    value = factor * f32_at(x + t * x1 + i * x0) + f32_at(base + i * b0)
                    put_f32(row + 4 * d, value)
                    top = max(top, value)
                if top == -math.inf:
                    top = 0.0
                for d in range(hc):
                    value = math.exp(f32_at(row + 4 * d) - top)
                    put_f32(row + 4 * d, value)
                    total += value
                if total == 0.0:
                    total = 1.0
                for d in range(hc):
                    put_f32(row + 4 * d, f32_at(row + 4 * d) / total + eps)
            divide(c, 4, o1, hc, eps)
            for _ in range(int(n_iter) - 1):
                divide(c, o1, 4, hc, eps)
                divide(c, 4, o1, hc, eps)

    return run


COMB = Native("dsv4_hc_comb", "i" * 13 + "ff", _comb)


@kernel(ops.dsv4_hc_comb)
@kernel(ops.dsv4_hc_maps)
def dsv4_hc_comb(call: Call) -> None:
    mixes, scale, base, out = call["mixes"], call["scale"], call["base"], call.out
    hc, _, n_tokens, _ = out.ne
    call.add(
        COMB, out.ptr, *out.nb[1:3], mixes.ptr, *mixes.nb[:2], scale.ptr, scale.nb[0],
        base.ptr, base.nb[0], hc, n_tokens, int(call.node.op is ops.dsv4_hc_maps),
        call.attrs["eps"], call.attrs["n_iter"],
        work=4 * call.attrs["n_iter"] * out.elements,
    )  # fmt: skip


def _post() -> Callable[..., None]:
    from pyggml.backends.cpu.native.memory import f32_at
    from pyggml.backends.cpu.row_loops import add_scaled, combine

    def run(
        out: int, o1: int, o2: int, x: int, x1: int, old: int, r1: int, r2: int, post: int, p0: int,
        p1: int, comb: int, c0: int, c1: int, c2: int, n: int, hc: int, n_tokens: int,
        own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        rows = hc * n_tokens
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            d, t = row % hc, row // hc
            y, new, streams = out + d * o1 + t * o2, x + t * x1, old + t * r2
            share = f32_at(post + d * p0 + t * p1)
            if comb == 0:
                combine(y, new, share, streams + d * r1, 1.0, n)
                continue
            weights = comb + d * c0 + t * c2
            combine(y, new, share, streams, f32_at(weights), n)
            for s in range(1, hc):
                add_scaled(y, streams + s * r1, n, f32_at(weights + s * c1))

    return run


POST = Native("dsv4_hc_post", "i" * 18, _post)


@kernel(ops.dsv4_hc_post, refuses=row_refusal)
def dsv4_hc_post(call: Call) -> None:
    x, residual, post, comb, out = (
        call["x"], call["residual"], call["post"], call.get("comb"), call.out
    )  # fmt: skip
    n, hc, n_tokens, _ = out.ne
    call.add(
        POST, out.ptr, *out.nb[1:3], x.ptr, x.nb[1], residual.ptr, *residual.nb[1:3], post.ptr,
        *post.nb[:2], *((comb.ptr, *comb.nb[:3]) if comb else (0, 0, 0, 0)), n, hc, n_tokens,
        work=(1 + hc) * out.elements,
    )  # fmt: skip

"""Dense products: mul_mat and fused_up_gate."""

from __future__ import annotations

import numpy as np

from pyggml import ops
from pyggml.backends.cpu.gate import Gate
from pyggml.backends.cpu.linear.amx.kernels import add_dense
from pyggml.backends.cpu.linear.operands import (
    SHARE,
    activations,
    matrices,
    numeric,
    reads,
    refusal,
    uses_amx,
    x_bytes,
)
from pyggml.backends.cpu.linear.products import gated, product
from pyggml.backends.cpu.table import Call, kernel


@kernel(ops.mul_mat, types=None, scratch=x_bytes, refuses=refusal, numeric=numeric)
def mul_mat(call: Call) -> None:
    if uses_amx(call.node):
        add_dense(call, "a", None, Gate())
        return
    a, b, out = call["a"], call["b"], call.out
    weights, x = matrices(call, "a"), activations(call)
    n, n2, n3 = b.ne[1:]
    x1, y1 = x.nb1, out.nb[1]
    if a.ne[2] == a.ne[3] == n3 == 1 and (
        n == 1 or (x.nb2 == n * x1 and out.nb[2] == n * y1)
    ):  # all items share the matrix, so they are columns of one
        x1, y1 = (x.nb2, out.nb[2]) if n == 1 else (x1, y1)
        n, n2 = n * n2, 1
    blocks = -(-n // x.width) * n2 * n3
    call.add(
        product(weights.inner, out.type), weights.ptr, weights.tile, weights.nb2, weights.nb3,
        weights.m, weights.k, weights.stride, x.ptr, x1, x.nb2, x.nb3, n, out.ptr, y1,
        *out.nb[2:], n2, n2 * n3, max(1, n2 // a.ne[2]), n3 // a.ne[3],
        weights.share(SHARE, blocks), x.width, reads=reads(call, "a"),
    )  # fmt: skip


@kernel(ops.fused_up_gate, types=None, scratch=x_bytes, refuses=refusal, numeric=numeric)
def fused_up_gate(call: Call) -> None:
    if uses_amx(call.node):
        add_dense(call, "up", "gate", Gate.of(call.attrs))
        return
    b, out, x = call["b"], call.out, activations(call)
    up, gate = matrices(call, "up"), matrices(call, "gate")
    native = gated(up.inner, gate.inner, Gate.of(call.attrs))
    share = up.share(SHARE, -(-b.ne[1] // x.width))
    for i3, i2 in np.ndindex(b.ne[3], b.ne[2]):
        call.add(
            native, up.ptr, up.tile, up.k, up.stride, gate.ptr, gate.tile, gate.k, gate.stride,
            up.m, x.ptr + i2 * x.nb2 + i3 * x.nb3, x.nb1, b.ne[1],
            out.ptr + i2 * out.nb[2] + i3 * out.nb[3], out.nb[1], share, x.width,
            reads=reads(call, "up"),
        )  # fmt: skip

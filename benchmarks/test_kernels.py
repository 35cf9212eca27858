"""NumPy kernels compared with plain NumPy: pytest benchmarks/test_kernels.py

Each group has the kernel ("pyggml") and the plain NumPy code ("plain"). Bars, with equal threads: a
dense f32 product within 5 % of numpy.matmul, flash attention within twice its two products alone,
the others close to plain NumPy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pyggml.backends.numpy.backend  # noqa: F401  (fills the kernel table)
from pyggml import ops
from pyggml.backends.host_memory import Packed, Scratch
from pyggml.backends.numpy.table import KERNELS
from pyggml.dtypes import dtype
from pyggml.node import Node
from pyggml.quants import WORK_BYTES, decode, encode

Call = Callable[[], object]
Floats = NDArray[np.float32]
rng = np.random.default_rng(0)


def random(*shape: int) -> Floats:
    return rng.standard_normal(shape, dtype=np.float32)


class Operand:
    """An array of any type and its input node. `raw` is 4-D; 5-D for block types."""

    def __init__(self, values: NDArray[Any], name: str = "f32") -> None:
        values = values.reshape((1,) * (4 - values.ndim) + values.shape)
        self.dtype, ne = dtype(name), values.shape[::-1]
        self.node = ops.input("x", name, ne=ne)
        plain = self.dtype.numpy
        self.raw = values.astype(plain) if plain else encode(name, values)
        self.array = self.raw if plain else Packed(self.dtype, self.raw, self.node.ne)


def kernel(op: Callable[..., Node], *sources: Operand, **attrs: Any) -> Call:
    """A call of the kernel, with its result and scratch allocated in advance."""
    node = op(*(s.node for s in sources), **attrs)
    row = KERNELS[node.op]
    out = np.empty(node.ne[::-1], node.dtype.numpy)
    by_node: dict[Node | None, Any] = {s.node: s.array for s in sources}
    arrays = [by_node.get(n) for n in node.src]
    if row.scratch is None:
        return lambda: row.run(out, *arrays, **node.attrs)
    memory = np.empty(row.scratch(node) + 64, np.uint8)
    memory = memory[-memory.ctypes.data % 64 :]
    return lambda: row.run(out, *arrays, scratch=Scratch(memory), **node.attrs)


def product(m: int, n: int, k: int, weight: str) -> tuple[Call, Call]:
    """Compared with numpy.matmul; other types with decoding everything first."""
    a, b = Operand(random(m, k), weight), Operand(random(n, k))
    x, y = b.raw[0, 0], np.empty((n, m), np.float32)
    call = kernel(ops.mul_mat, a, b)
    if weight == "f32":
        return call, lambda: np.matmul(x, a.raw[0, 0].T, out=y)
    w, work = np.empty((m, k), np.float32), np.empty(WORK_BYTES, np.uint8)

    def plain() -> None:
        decode(weight, a.raw[0, 0], w, work=work)
        np.matmul(x, w.T, out=y)

    return call, plain


def flash(heads: int, n_q: int, n_kv: int, masked: bool) -> tuple[Call, Call]:
    """192/128 as in DeepSeek; compared with only the products q.k and p.v."""
    q, k, v = (random(heads, n, d) for n, d in ((n_q, 192), (n_kv, 192), (n_kv, 128)))
    mask = np.where(np.arange(n_kv) > np.arange(n_q)[:, None] + n_kv - n_q, -np.inf, 0)
    operands = [Operand(x) for x in (q, k, v)]
    if masked:
        operands.append(Operand(mask, "f16"))
    call = kernel(ops.flash_attn_ext, *operands, scale=192**-0.5)
    p, y = np.empty((n_q, n_kv), np.float32), np.empty((n_q, 128), np.float32)

    def plain() -> None:
        for h in range(heads):
            np.matmul(q[h], k[h].T, out=p)
            np.matmul(p, v[h], out=y)

    return call, plain


def experts(weight: str) -> tuple[Call, Call]:
    """DeepSeek-V2-Lite's sizes, 6 of 16 experts; compared with a plain loop over experts."""
    n_expert, n_used, n_tokens, k, m = 16, 6, 256, 2048, 1408
    matrices = [Operand(random(n_expert, m, k), weight) for _ in range(2)]
    ids = np.stack([rng.permutation(n_expert)[:n_used] for _ in range(n_tokens)])
    b = Operand(random(n_tokens, 1, k))
    w, work = np.empty((m, k), np.float32), np.empty(WORK_BYTES, np.uint8)
    y = np.empty((n_tokens, n_used, m), np.float32)

    def plain() -> None:
        for expert in range(n_expert):
            token, slot = np.nonzero(ids == expert)
            x = b.raw[0, token, 0]
            up, gate = (x @ decode(weight, s.raw[0, expert], w, work=work).T for s in matrices)
            with np.errstate(over="ignore"):
                y[token, slot] = up * gate / (1 + np.exp(-gate))

    return kernel(ops.moe_up_gate, *matrices, b, Operand(ids, "i32")), plain


def soft_max() -> tuple[Call, Call]:
    a = Operand(random(16, 256, 2048))

    def plain() -> Floats:
        y = np.exp(a.raw - a.raw.max(axis=-1, keepdims=True))
        y /= y.sum(axis=-1, keepdims=True)
        return np.asarray(y)

    return kernel(ops.soft_max_ext, a), plain


def rms_norm() -> tuple[Call, Call]:
    a = Operand(random(512, 2048))
    call = kernel(ops.rms_norm, a, eps=1e-6)
    return call, lambda: a.raw / np.sqrt(np.mean(a.raw**2, axis=-1, keepdims=True) + 1e-6)


def silu() -> tuple[Call, Call]:
    a = Operand(random(512, 2048))
    return kernel(ops.silu, a), lambda: a.raw / (1 + np.exp(-a.raw))


def rope() -> tuple[Call, Call]:
    a, pos = Operand(random(512, 16, 64)), Operand(np.arange(512), "i32")
    pairs = a.raw.view(np.complex64)

    def plain() -> NDArray[Any]:
        angle = np.arange(512)[:, None, None] * 10000.0 ** (-np.arange(32) / 32)
        return np.asarray(pairs * np.exp(1j * angle).astype(np.complex64))

    return kernel(ops.rope_ext, a, pos, n_dims=64), plain


def top_k() -> tuple[Call, Call]:
    a = Operand(random(512, 256))
    return kernel(ops.top_k, a, k=8), lambda: np.argpartition(a.raw, -8, axis=-1)[..., -8:]


def get_rows(weight: str) -> tuple[Call, Call]:
    a, ids = Operand(random(4096, 2048), weight), rng.integers(0, 4096, 512)

    def plain() -> Floats:
        return decode(weight, a.raw[0, 0][ids])

    return kernel(ops.get_rows, a, Operand(ids, "i32")), plain


CASES: dict[str, Callable[[], tuple[Call, Call]]] = {
    "mul_mat f32 2048x512x2048": lambda: product(2048, 512, 2048, "f32"),
    "mul_mat f32 4096x1x4096": lambda: product(4096, 1, 4096, "f32"),
    "mul_mat f16 2048x512x2048": lambda: product(2048, 512, 2048, "f16"),
    "mul_mat q8_0 2048x512x2048": lambda: product(2048, 512, 2048, "q8_0"),
    "mul_mat iq4_nl 2048x512x2048": lambda: product(2048, 512, 2048, "iq4_nl"),
    "mul_mat q8_0 2048x1x2048": lambda: product(2048, 1, 2048, "q8_0"),
    "flash_attn_ext 16x512x16384": lambda: flash(16, 512, 16384, masked=False),
    "flash_attn_ext 16x512x16384 causal": lambda: flash(16, 512, 16384, masked=True),
    "flash_attn_ext 16x1x8192": lambda: flash(16, 1, 8192, masked=False),
    "moe_up_gate q8_0": lambda: experts("q8_0"),
    "soft_max_ext": soft_max,
    "rms_norm": rms_norm,
    "silu": silu,
    "rope_ext": rope,
    "top_k": top_k,
    "get_rows f32": lambda: get_rows("f32"),
    "get_rows q8_0": lambda: get_rows("q8_0"),
}


@pytest.mark.parametrize("side", ["plain", "pyggml"])
@pytest.mark.parametrize("case", CASES)
def test_kernel(benchmark: Any, case: str, side: str) -> None:
    call, plain = CASES[case]()
    benchmark.group = case
    run = call if side == "pyggml" else plain
    time.sleep(0.2)  # BLAS's threads spin for a while after a product; let them end
    with np.errstate(over="ignore"):
        start = time.perf_counter()
        run()
        # At first, Linux often leaves both threads on one processor.
        rounds = min(60, max(7, int(0.4 / (time.perf_counter() - start))))
        benchmark.pedantic(run, rounds=rounds, warmup_rounds=rounds // 4)

"""Times of products on a GPU.

    python benchmarks/gpu_linear.py          rows of the record
    python benchmarks/gpu_linear.py more     also other block types, numbers of columns and tokens,
                                             and ops that move memory

One plan computes many products, with weights that take turns. The unit "of copy" is the share of
the bandwidth (bytes read and written) of a copy in the same run, by the copy engine or by a kernel,
whichever is faster. `torch_grouped_mm` is PyTorch's grouped product with bf16 weights. It does the
work of up and gate of `moe_up_gate`, with tokens spread evenly over the experts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from math import prod
from statistics import median
from typing import Any

import numpy as np

import pyggml as gg
from benchmarks.gpu_bench import (
    SHORT,
    copies,
    copy_rates,
    node_microseconds,
    peer_microseconds,
    random_blocks,
    write_row,
)
from pyggml.dtypes import TYPES
from pyggml.operation import cost_of

K, M = 4096, 14336
#: Sizes of up and gate in V2-Lite's experts.
N_EMBD, N_FF, EXPERTS, N_USED = 2048, 1408, 64, 6

#: Block types with indices into a grid; iq1_m is much like iq1_s.
IN_GRIDS = ("iq3_xxs", "iq3_s", "iq2_xxs", "iq2_xs", "iq2_s", "iq1_s")

rng = np.random.default_rng(7)


def weight(dtype: str, *ne: int) -> gg.Node:
    if TYPES[dtype].block == 1:
        return gg.constant(rng.standard_normal(ne[::-1], np.float32), dtype=dtype)
    rows = random_blocks(dtype, prod(ne[1:]), ne[0], rng)
    return gg.constant(rows.reshape(*ne[:0:-1], -1), dtype=dtype)


def mul_mat(dtype: str, n: int, k: int = K, m: int = M) -> list[float]:
    """Samples of the us of a product with n columns."""
    size = TYPES[dtype].row_bytes(k) * m
    weights = [weight(dtype, k, m) for _ in range(copies(size))]
    count = len(weights) * -(-SHORT // len(weights))
    inputs = {f"x{i}": rng.standard_normal((n, k), np.float32) for i in range(count)}
    nodes = [
        gg.mul_mat(weights[i % len(weights)], gg.input(name, ne=(k, n)))
        for i, name in enumerate(inputs)
    ]
    return node_microseconds(nodes, inputs)


def dense(dtype: str, n: int, copy: float) -> None:
    """A row: the share of a copy for one column, TFLOP/s for more."""
    times, size = mul_mat(dtype, n), TYPES[dtype].row_bytes(K) * M
    if n == 1:
        write_row(f"mul_mat_vec_{dtype}", "of copy", [size / t / 1e6 / copy for t in times])
    else:
        write_row(f"mul_mat_{dtype}_n{n}", "TFLOP/s", [2 * K * M * n / t / 1e6 for t in times])


def moe_up_gate(tokens: int, weights: list[tuple[gg.Node, gg.Node]]) -> None:
    """A row: us for one token, TFLOP/s for more."""
    inputs: dict[str, Any] = {}
    nodes = []
    for i in range(SHORT if tokens < 128 else 6):
        experts_of = [rng.permutation(EXPERTS)[:N_USED] for _ in range(tokens)]
        inputs[f"ids{i}"] = np.array(experts_of, np.int32)
        inputs[f"x{i}"] = rng.standard_normal((tokens, 1, N_EMBD), np.float32)
        x = gg.input(f"x{i}", ne=(N_EMBD, 1, tokens))
        ids = gg.input(f"ids{i}", "i32", ne=(N_USED, tokens))
        nodes.append(gg.moe_up_gate(*weights[i % len(weights)], x, ids))
    times, name = node_microseconds(nodes, inputs), f"moe_up_gate_iq4_nl_t{tokens}"
    if tokens == 1:
        write_row(name, "us", times)
    else:
        write_row(name, "TFLOP/s", [flops(tokens) / t / 1e6 for t in times])


def flops(tokens: int) -> int:
    return 2 * 2 * tokens * N_USED * N_EMBD * N_FF


def experts() -> list[tuple[gg.Node, gg.Node]]:
    """Two sets of up and gate. A token reads 6 of 64 experts; 20 tokens read more than L2 holds."""
    size = (N_EMBD, N_FF, EXPERTS)
    return [(weight("iq4_nl", *size), weight("iq4_nl", *size)) for _ in range(2)]


def grouped(tokens: int) -> None:
    """A row of PyTorch's grouped product."""
    import torch

    pairs = tokens * N_USED
    assert pairs % EXPERTS == 0, "every expert needs equally many pairs"
    x = torch.randn(pairs, N_EMBD, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(2, EXPERTS, 2 * N_FF, N_EMBD, device="cuda", dtype=torch.bfloat16)
    ends = torch.arange(1, EXPERTS + 1, device="cuda", dtype=torch.int32) * (pairs // EXPERTS)
    calls = [partial(torch._grouped_mm, x, w[i % 2].transpose(-2, -1), offs=ends) for i in range(4)]
    times = peer_microseconds(calls)
    write_row(f"torch_grouped_mm_t{tokens}", "TFLOP/s", [flops(tokens) / t / 1e6 for t in times])
    del x, w, calls
    torch.cuda.empty_cache()


class Leaves:
    """Inputs of zeros, and their `values` by name."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def __call__(self, *ne: int, dtype: str = "f32") -> gg.Node:
        name, row = f"x{len(self.values)}", TYPES[dtype].row_bytes(ne[0])
        plain = TYPES[dtype].numpy
        shape = ne[::-1] if plain is not None else (*ne[:0:-1], row)
        self.values[name] = np.zeros(shape, plain or np.uint8)
        return gg.input(name, dtype, ne=ne)


#: Ops limited by memory, with large sizes and for one token.
MOVES: dict[str, Callable[[Leaves], gg.Node]] = {
    "add 8192x4096": lambda x: gg.add(x(8192, 4096), x(8192, 4096)),
    "mul by a row": lambda x: gg.mul(x(8192, 4096), x(8192)),
    "silu": lambda x: gg.silu(x(8192, 4096)),
    "rms_norm 8192x4096": lambda x: gg.rms_norm(x(8192, 4096), eps=1e-6),
    "cast f32 to f16": lambda x: gg.cast(x(8192, 4096), dtype="f16"),
    "cast f16 to f32": lambda x: gg.cast(x(8192, 4096, dtype="f16"), dtype="f32"),
    "cast q8_0 to f16": lambda x: gg.cast(x(8192, 4096, dtype="q8_0"), dtype="f16"),
    "cont of a transposed": lambda x: gg.cont(gg.transpose(x(8192, 4096))),
    "rope 64x16x2048": lambda x: gg.rope_ext(x(64, 16, 2048), x(2048, dtype="i32"), n_dims=64),
    "rms_norm 2048x1": lambda x: gg.rms_norm(x(2048), eps=1e-6),
    "add 2048x1": lambda x: gg.add(x(2048), x(2048)),
    "top_k 64, 6": lambda x: gg.top_k(x(64), k=6),
    "argmax 102400": lambda x: gg.argmax(x(102400)),
}


def moves() -> None:
    """Print a line for each of `MOVES`: microseconds, and TB/s read and written."""
    for name, make in MOVES.items():
        nbytes = cost_of(make(Leaves())).nbytes
        leaves = Leaves()
        nodes = [make(leaves) for _ in range(min(SHORT, max(2, copies(int(nbytes)))))]
        us = median(node_microseconds(nodes, leaves.values))
        print(f"{name:22} {us:9.1f} us {nbytes / us / 1e6:7.2f} TB/s")


def main() -> None:
    rates = copy_rates()
    write_row("copy", "TB/s", rates)
    copy = median(rates)
    for dtype in ("iq4_nl", "q4_K", "q6_K", "q8_0", "iq3_xxs"):
        dense(dtype, 1, copy)
    for n in (512, 2048):
        dense("iq4_nl", n, copy)
    weights = experts()
    for tokens in (1, 512, 2048, 4096):
        moe_up_gate(tokens, weights)
    for tokens in (512, 2048, 4096):
        grouped(tokens)
    if sys.argv[1:] == ["more"]:
        for dtype in ("iq4_nl", "q8_0", "q4_0", "q4_K", "q6_K", "f16", *IN_GRIDS):
            for n in (1, 2, 4, 8, 16, 64, 512, 2048):
                dense(dtype, n, copy)
        for tokens in (2, 4, 8, 16, 32, 128):
            moe_up_gate(tokens, weights)
        moves()


if __name__ == "__main__":
    main()

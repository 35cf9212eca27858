"""Times of attention on a GPU, compared with cuDNN (through PyTorch), and of an attention budget.

    python benchmarks/gpu_attention.py          rows of the record
    python benchmarks/gpu_attention.py more     other sizes and types too
    python benchmarks/gpu_attention.py amb      softmax attention with and without a budget

K and V are f16 unless the name ends in q8_0. Prompts are causal.

fa_DK_DV_hH_nN        N queries and N keys: TFLOP/s of the causal half
fa_192_128_.._q1_nN   one query: TB/s of K and V
fa_576_512_.._q1_nN   one query, V is a part of K, one head of K: us, combining parts included
fa_192_128_mask_..    a prompt whose causal mask is an input in f16; slowdown: its time divided by
                      that of the same prompt without

Sets of Q, K and V take turns, so that they are not in the cache. cuDNN does not support 576/512.

amb: a prompt of 8192 tokens, 16 heads, 192/128, causal; the scores of one head take 256 MiB. A run
reads 180 MB of K, V and queries, so sets need not take turns. The status is 1 if the score peak
exceeds the budget or the result differs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np

import pyggml as gg
from benchmarks.gpu_bench import (
    SHORT,
    copies,
    node_microseconds,
    peer_microseconds,
    plan_microseconds,
    random_blocks,
    replays,
    write_clocks,
    write_row,
)
from pyggml.dtypes import dtype


@dataclass(frozen=True)
class Size:
    """Attention with `n_q` queries. Latent (d_k = 576): V is the first d_v elements of K."""

    d_k: int
    d_v: int
    n_q: int
    n_kv: int
    heads: int
    heads_kv: int
    dtype: str = "f16"

    @property
    def latent(self) -> bool:
        return self.d_k == 576

    @property
    def moved(self) -> int:
        """Bytes of K and V."""
        width = self.d_k if self.latent else self.d_k + self.d_v
        return dtype(self.dtype).row_bytes(width) * self.n_kv * self.heads_kv

    @property
    def sets(self) -> int:
        return copies(self.moved + 4 * self.n_q * self.heads * (self.d_k + self.d_v))

    @property
    def flops(self) -> int:
        """Operations of the causal half."""
        return self.n_q * self.n_kv * self.heads * (self.d_k + self.d_v)

    def value(self, us: float) -> float:
        if self.n_q > 1:
            return self.flops / us / 1e6
        return us if self.latent else self.moved / us / 1e6

    @property
    def unit(self) -> str:
        return "TFLOP/s" if self.n_q > 1 else "us" if self.latent else "TB/s"


ROWS = {
    "fa_192_128_h16_n2048": Size(192, 128, 2048, 2048, 16, 16),
    "fa_192_128_h16_n4096": Size(192, 128, 4096, 4096, 16, 16),
    "fa_192_128_h16_n8192": Size(192, 128, 8192, 8192, 16, 16),
    "fa_192_128_h16_n16384": Size(192, 128, 16384, 16384, 16, 16),
    "fa_192_128_h128_n4096": Size(192, 128, 4096, 4096, 128, 128),
    "fa_192_128_h16_q1_n4096": Size(192, 128, 1, 4096, 16, 16),
    "fa_192_128_h16_q1_n16384": Size(192, 128, 1, 16384, 16, 16),
    "fa_576_512_h16_q1_n16384": Size(576, 512, 1, 16384, 16, 1),
    "fa_576_512_h16_q1_n16384_q8_0": Size(576, 512, 1, 16384, 16, 1, "q8_0"),
    "fa_576_512_h128_q1_n16384": Size(576, 512, 1, 16384, 128, 1),
}
MORE = {
    "fa_128_128_h32_n8192": Size(128, 128, 8192, 8192, 32, 32),
    "fa_64_64_h16_n8192": Size(64, 64, 8192, 8192, 16, 16),
    "fa_256_256_h16_n8192": Size(256, 256, 8192, 8192, 16, 16),
    "fa_192_128_h16_q1_n16384_q8_0": Size(192, 128, 1, 16384, 16, 16, "q8_0"),
    "fa_128_128_h32_8_q1_n16384": Size(128, 128, 1, 16384, 32, 8),
    "fa_576_512_h16_q1_n4096": Size(576, 512, 1, 4096, 16, 1),
    "fa_576_512_h16_q512_n4096": Size(576, 512, 512, 4096, 16, 1),
}

rng = np.random.default_rng(3)


class Leaves:
    """Inputs, created on first use, and their `values` by name."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.nodes: dict[str, gg.Node] = {}

    def get(self, name: str, type: str, d: int, n: int, heads: int) -> gg.Node:
        if name not in self.nodes:
            if type == "q8_0":
                values: Any = random_blocks(type, heads * n, d, rng).reshape(heads, n, -1)
            else:
                values = rng.standard_normal((heads, n, d), np.float32).astype(dtype(type).numpy)
            self.values[name] = values
            self.nodes[name] = gg.input(name, type, ne=(d, n, heads))
        return self.nodes[name]

    def pos(self, n_q: int, n_kv: int) -> gg.Node:
        """The last n_q of n_kv positions."""
        if "pos" not in self.nodes:
            self.values["pos"] = np.arange(n_kv - n_q, n_kv)
            self.nodes["pos"] = gg.input("pos", "i32", ne=(n_q,))
        return self.nodes["pos"]

    def mask(self, n_q: int, n_kv: int) -> gg.Node:
        """The causal mask of these positions in f16, as an input."""
        if "mask" not in self.nodes:
            hidden = np.arange(n_kv) > np.arange(n_kv - n_q, n_kv)[:, None]
            self.values["mask"] = np.where(hidden, -np.inf, 0).astype(np.float16)
            self.nodes["mask"] = gg.input("mask", "f16", ne=(n_kv, n_q))
        return self.nodes["mask"]


def node(size: Size, i: int, leaves: Leaves, masked: bool = False) -> gg.Node:
    """Attention of new queries over one of the sets of K and V. masked: the mask is an input."""
    s, set_ = size, i % size.sets
    q = leaves.get(f"q{i}", "f32", s.d_k, s.n_q, s.heads)
    k = leaves.get(f"k{set_}", s.dtype, s.d_k, s.n_kv, s.heads_kv)
    if s.latent:
        v = gg.view(k, ne=(s.d_v, s.n_kv, s.heads_kv))
    else:
        v = leaves.get(f"v{set_}", s.dtype, s.d_v, s.n_kv, s.heads_kv)
    mask = leaves.mask(s.n_q, s.n_kv) if masked else None
    if s.n_q > 1 and not masked:
        mask = gg.causal_mask(leaves.pos(s.n_q, s.n_kv), n_kv=s.n_kv)
    return gg.flash_attn_ext(q, k, v, mask, scale=s.d_k**-0.5)


def times_of(size: Size, masked: bool = False) -> list[float]:
    """Samples of the microseconds of attention."""
    leaves = Leaves()
    turns = -(-SHORT // size.sets) if size.n_q == 1 else 1
    nodes = [node(size, i, leaves, masked) for i in range(turns * size.sets)]
    return node_microseconds(nodes, leaves.values)


def mask_rows() -> None:
    """Rows of a causal mask that is an input."""
    size = ROWS["fa_192_128_h16_n8192"]
    plain, times = times_of(size), times_of(size, masked=True)
    write_row("fa_192_128_mask_h16_n8192", size.unit, [size.value(t) for t in times])
    write_row("fa_192_128_mask_slowdown", "times", [t / median(plain) for t in times])


def cudnn_row(name: str, size: Size) -> None:
    """A row of PyTorch's attention on cuDNN."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def tensor(heads: int, n: int, d: int) -> Any:
        return torch.randn(1, heads, n, d, device="cuda", dtype=torch.float16)

    def call() -> Any:
        q = tensor(size.heads, size.n_q, size.d_k)
        k, v = (tensor(size.heads_kv, size.n_kv, d) for d in (size.d_k, size.d_v))
        grouped = size.heads != size.heads_kv
        return partial(sdpa, q, k, v, is_causal=size.n_q > 1, enable_gqa=grouped)

    calls = [call() for _ in range(size.sets)]
    if size.n_q == 1:
        calls *= -(-SHORT // len(calls))
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            times = peer_microseconds(calls)
        write_row(f"torch_cudnn_{name}", size.unit, [size.value(t) for t in times])
    except RuntimeError as error:  # cuDNN does not support every size
        print(f"torch_cudnn_{name}: not measured: {error}")
    del calls
    torch.cuda.empty_cache()


def clocks() -> None:
    """Write the clocks while a long prompt is running."""
    size, leaves = ROWS["fa_192_128_h16_n8192"], Leaves()
    plan = gg.compile({"y": node(size, 0, leaves)}, backends=["cuda"])
    plan.run(leaves.values)
    write_clocks("attention", replays([plan]), median(plan_microseconds([plan])))


#: MiB, tokens, heads and head sizes of the budget's rows.
AMB, N, HEADS, D_K, D_V = 256, 8192, 16, 192, 128


def softmax_attention(n: int = N) -> gg.Node:
    k = gg.input("k", "f16", ne=(D_K, n, HEADS))
    v = gg.input("v", "f16", ne=(D_V, n, HEADS))
    q, pos = gg.input("q", ne=(D_K, n, HEADS)), gg.input("pos", "i32", ne=(n,))
    mask = gg.causal_mask(pos, n_kv=n)
    p = gg.soft_max_ext(gg.mul_mat(k, q), mask, scale=D_K**-0.5)
    return gg.mul_mat(gg.transpose(v), p)


def budget() -> int:
    """Rows of the budget. Returns 1 if the plan exceeds the budget or the result differs."""
    rng = np.random.default_rng(0)
    sizes = {"q": D_K, "k": D_K, "v": D_V}
    inputs: dict[str, Any] = {}
    for name, d in sizes.items():
        values = rng.standard_normal((HEADS, N, d), np.float32)
        inputs[name] = values if name == "q" else values.astype(np.float16)
    inputs["pos"] = np.arange(N)
    times, results = {}, {}
    for name, amb in (("none", None), (f"{AMB}", AMB)):
        plan = gg.compile({"y": softmax_attention()}, backends=["cuda"], amb=amb)
        peak = plan.memory.score_peak / 2**20
        print(f"amb {name}: score peak {peak:.1f} MiB, arena {plan.memory.compute / 2**20:.1f} MiB")
        if amb is not None and not 0 < peak <= amb:
            print(f"FAIL the score peak of {peak:.1f} MiB exceeds amb {amb}")
            return 1
        results[name] = plan.run(inputs)["y"]
        times[name] = plan_microseconds([plan])
        write_row(f"amb_{name}_n{N}", "ms", [t / 1000 for t in times[name]])
        del plan
    plain, cut = results.values()
    error = float(np.linalg.norm(cut - plain) / np.linalg.norm(plain))
    if not error < 1e-3:
        print(f"FAIL with the budget, the result differs by {error:.1e}")
        return 1
    without = median(times["none"])
    write_row(f"amb_{AMB}_slowdown", "times", [t / without for t in times[f"{AMB}"]])
    return 0


def main() -> int:
    if sys.argv[1:] == ["amb"]:
        return budget()
    rows = {**ROWS, **(MORE if sys.argv[1:] == ["more"] else {})}
    for name, size in rows.items():
        write_row(name, size.unit, [size.value(t) for t in times_of(size)])
    mask_rows()
    clocks()
    for name, size in rows.items():
        if not size.latent and size.dtype == "f16":
            cudnn_row(name, size)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What an attention memory budget costs on a GPU: softmax attention within amb and without.

    python benchmarks/gpu_amb.py

A prompt of 8192 tokens, 16 heads, K 192, V 128, f16, causal; 256 MiB hold the scores of one head.
A run touches 180 MB of K, V and queries and, within the budget, the same 256 MiB again and again:
no rotation is needed. The status is 1 where the score peak is above the budget.
"""

from __future__ import annotations

import sys
from statistics import median

import numpy as np
from gpu_bench import plan_microseconds, tell

import pyggml as gg

AMB, N, HEADS, D_K, D_V = 256, 8192, 16, 192, 128


def attention(n: int = N) -> gg.Node:
    k = gg.input("k", "f16", ne=(D_K, n, HEADS))
    v = gg.input("v", "f16", ne=(D_V, n, HEADS))
    q, pos = gg.input("q", ne=(D_K, n, HEADS)), gg.input("pos", "i32", ne=(n,))
    mask = gg.causal_mask(pos, n_kv=n)
    p = gg.soft_max_ext(gg.mul_mat(k, q), mask, scale=D_K**-0.5)
    return gg.mul_mat(gg.transpose(v), p)


def main() -> int:
    rng = np.random.default_rng(0)
    sizes = {"q": D_K, "k": D_K, "v": D_V}
    given = {x: rng.standard_normal((HEADS, N, d), np.float32) for x, d in sizes.items()}
    given = {x: a if x == "q" else a.astype(np.float16) for x, a in given.items()}
    given["pos"] = np.arange(N)
    taken, made = {}, {}
    for name, amb in (("none", None), (f"{AMB}", AMB)):
        plan = gg.compile({"y": attention()}, backends=["cuda"], amb=amb)
        peak = plan.memory.score_peak / 2**20
        print(f"amb {name}: score peak {peak:.1f} MiB, arena {plan.memory.compute / 2**20:.1f} MiB")
        if amb is not None and not 0 < peak <= amb:
            print(f"FAIL the score peak of {peak:.1f} MiB is not within amb {amb}")
            return 1
        made[name] = plan.run(given)["y"]
        taken[name] = plan_microseconds([plan])
        tell(f"amb_{name}_n{N}", "ms", [t / 1000 for t in taken[name]])
        del plan
    whole, cut = made.values()
    error = float(np.linalg.norm(cut - whole) / np.linalg.norm(whole))
    if not error < 1e-3:
        print(f"FAIL within the budget the result differs by {error:.1e}")
        return 1
    without = median(taken["none"])
    tell(f"amb_{AMB}_slowdown", "times", [t / without for t in taken[f"{AMB}"]])
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Products on a GPU: every variant against float64. Needs PyTorch and the driver.

    python benchmarks/gpu_linear.py            all of it, each part in a process of its own
    python benchmarks/gpu_linear.py PART...    check_blocks, check_plain, check_experts

Steps are recorded as the backend records them (`launch.Call`), on operands laid out here.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import torch
from gpu_linear_bed import FAILED, activated, check, dense_want, ids_of, tensor, weight

from pyggml import ops
from pyggml.backends.cuda.weights.formats import FORMATS

PARTS = ("check_blocks", "check_plain", "check_experts")
BLOCKS = list(FORMATS)


def check_blocks() -> None:
    for kind in BLOCKS:
        for layout in ("tiles8", "plain"):
            a = weight(kind, (512, 140, 1, 1), layout)
            for n in (1, 3, 8, 9, 70, 200) if layout == "tiles8" else (1, 5, 40):
                b = tensor("f32", (512, n, 1, 1))
                check(
                    f"mul_mat {kind} {layout} n={n}",
                    ops.mul_mat,
                    (a, b),
                    dense_want(a.values, b.values),
                )
            b = tensor("f32", (512, 5, 1, 1))
            check(
                f"mul_mat {kind} {layout} f32 prec",
                ops.mul_mat,
                (a, b),
                dense_want(a.values, b.values),
                prec="f32",
            )
    for kind in ("q8_0", "iq4_nl", "q4_K", "mxfp4"):
        for layout in ("tiles8", "plain"):
            a = weight(kind, (256, 19, 2, 2), layout)
            for n in (1, 7, 33):
                b = tensor("f16", (256, n, 6, 4), (0, 2, 1, 3))
                check(
                    f"heads {kind} {layout} n={n}",
                    ops.mul_mat,
                    (a, b),
                    dense_want(a.values, b.values),
                    gap=3,
                    type="f16" if n == 7 else "f32",
                )
            b = tensor("bf16", (256, 40, 2, 2), gap=5)
            up, gate = weight(kind, (256, 75, 1, 1), layout), weight(kind, (256, 75, 1, 1), layout)
            for n in (1, 6, 40):
                b = tensor("f32", (256, n, 2, 1), (0, 2, 1, 3))
                for act in ("silu", "gelu", "relu"):
                    u, g = (
                        dense_want(up.values, b.values.reshape(1, 1, -1, 256)),
                        dense_want(gate.values, b.values.reshape(1, 1, -1, 256)),
                    )
                    want = (activated(act, g) * u).reshape(1, 2, n, 75)
                    check(
                        f"fused {kind} {layout} {act} n={2 * n}",
                        ops.fused_up_gate,
                        (up, gate, b),
                        want,
                        act=act,
                    )
    big = tensor("f32", (512, 20, 1, 1))
    big.memory *= 1e6
    big.values *= 1e6
    a = weight("iq4_nl", (512, 100, 1, 1), "tiles8")
    check("huge activations", ops.mul_mat, (a, big), dense_want(a.values, big.values))
    odd = weight("iq4_nl", (1056, 100, 1, 1), "tiles8")
    for n in (1, 30):
        b = tensor("f32", (1056, n, 1, 1))
        check(f"odd groups n={n}", ops.mul_mat, (odd, b), dense_want(odd.values, b.values))


def check_plain() -> None:
    for kind in ("f32", "f16", "bf16"):
        for other in ("f32", "f16", "bf16"):
            for n in (1, 3, 20):
                for type_ in ("f32", "f16"):
                    a, b = tensor(kind, (77, 6, 1, 1)), tensor(other, (77, n, 1, 1))
                    check(
                        f"{kind} {other} n={n} {type_}",
                        ops.mul_mat,
                        (a, b),
                        dense_want(a.values, b.values),
                        type=type_,
                    )
        for order in ((0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3), (3, 2, 1, 0)):
            for n in (5, 24):
                a = tensor(kind, (64, 7, 2, 3), order)
                for b_order in ((0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)):
                    b = tensor("f32", (64, n, 4, 3), b_order)
                    check(
                        f"heads {kind} {order} {b_order} n={n}",
                        ops.mul_mat,
                        (a, b),
                        dense_want(a.values, b.values),
                        gap=1,
                    )
        a = tensor(kind, (4096, 500, 1, 1))
        for n in (1, 4, 8, 100):
            b = tensor("f32", (4096, n, 1, 1))
            for prec in ("default", "f32"):
                check(
                    f"{kind} k=4096 n={n} {prec}",
                    ops.mul_mat,
                    (a, b),
                    dense_want(a.values, b.values),
                    prec=prec,
                )
        a = tensor(kind, (128, 300, 1, 1))
        b = tensor("f32", (128, 3, 16, 2), (0, 2, 1, 3))
        check(f"{kind} one matrix, 16 heads", ops.mul_mat, (a, b), dense_want(a.values, b.values))
        up, gate, b = (
            tensor(kind, (256, 11, 1, 1)),
            tensor(kind, (256, 11, 1, 1)),
            tensor("f16", (256, 9, 2, 1)),
        )
        u, g = (
            dense_want(up.values, b.values.reshape(1, 1, -1, 256)),
            dense_want(gate.values, b.values.reshape(1, 1, -1, 256)),
        )
        check(
            f"fused {kind}",
            ops.fused_up_gate,
            (up, gate, b),
            (activated("gelu", g) * u).reshape(1, 2, 9, 11),
            act="gelu",
        )


def expert_want(a: Any, b: Any, ids: Any) -> Any:
    """[1, tokens, n_used, m] of a [1, E, m, k], b [1, tokens, n_b, k]."""
    tokens, n_used = ids.shape
    out = torch.zeros((tokens, n_used, a.shape[2]), dtype=torch.float64, device="cuda")
    for slot in range(n_used):
        x = b[0, :, slot % b.shape[2]]
        for e in range(a.shape[1]):
            mine = ids[:, slot] == e
            if mine.any():
                out[mine, slot] = x[mine] @ a[0, e].T
    return out[None]


def check_experts() -> None:
    for kind in ("f32", "f16", "bf16", *BLOCKS):
        for layout in ("tiles8", "plain") if kind in BLOCKS else ("plain",):
            a, gate = (weight(kind, (256, 75, 9, 1), layout) for _ in range(2))
            for n_used, n_b, tokens in ((4, 1, 1), (4, 2, 5), (4, 4, 60), (4, 1, 150), (4, 1, 700)):
                if layout == "plain" and kind in BLOCKS and tokens > 60:
                    continue
                b, ids = (
                    tensor("f32", (256, n_b, tokens, 1), gap=4 * (n_b > 1)),
                    ids_of(n_used, tokens, 9, True, 3),
                )
                one = expert_want(a.values, b.values, ids.values)
                label = f"{kind} {layout} t={tokens}"
                check(f"mul_mat_id {label}", ops.mul_mat_id, (a, b, ids), one)
                check(f"mul_mat_id {label} f32", ops.mul_mat_id, (a, b, ids), one, prec="f32")
                two = activated("silu", expert_want(gate.values, b.values, ids.values)) * one
                check(f"moe_up_gate {label}", ops.moe_up_gate, (a, gate, b, ids), two, act="silu")
                exact = {"act": "silu", "prec": "f32"}
                check(f"moe_up_gate {label} f32", ops.moe_up_gate, (a, gate, b, ids), two, **exact)
    up, gate = weight("q4_K", (256, 75, 9, 1), "tiles8"), weight("q6_K", (256, 75, 9, 1), "tiles8")
    for tokens in (3, 100):
        b, ids = tensor("f32", (256, 1, tokens, 1)), ids_of(4, tokens, 9)
        want = activated("relu", expert_want(gate.values, b.values, ids.values)) * expert_want(
            up.values, b.values, ids.values
        )
        check(
            f"moe_up_gate of two types t={tokens}",
            ops.moe_up_gate,
            (up, gate, b, ids),
            want,
            act="relu",
        )


def main() -> int:
    if len(sys.argv) > 1:
        torch.cuda.init()
        torch.zeros(1, device="cuda")
        for part in sys.argv[1:]:
            began = time.time()
            globals()[part]()
            print(f"PART {part}: {len(FAILED)} failed, {time.time() - began:.0f} s")
        return bool(FAILED)
    failed = 0
    for part in PARTS:
        try:
            done = subprocess.run(
                [sys.executable, __file__, part], capture_output=True, text=True, timeout=200
            )
            text, status = (done.stdout + done.stderr).splitlines(), done.returncode
        except subprocess.TimeoutExpired:
            text, status = [f"TIMED OUT {part}"], 1
        told = [line for line in text if line.startswith(("PART", "FAILED", "TIMED"))]
        print("\n".join(told[-40:] if told else text[-15:]))
        failed += bool(status)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

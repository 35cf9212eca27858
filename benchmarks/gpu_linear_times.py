"""Times of products on a GPU: dense, and of experts. gpu_linear.py runs them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from gpu_linear_bed import Held, ids_of, record, start, start_one, tensor, weight

from pyggml import ops
from pyggml.backends.cuda import experts
from pyggml.backends.cuda.launch import Call, Launch, Operand
from pyggml.dtypes import TYPES


def microseconds(starts: Sequence[Callable[[], None]], samples: int = 20) -> list[float]:
    """Samples of the mean time of one start, replayed in a graph of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for one in starts[:2]:
            one()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for one in starts:
                one()
        for _ in range(3):
            graph.replay()
        times = []
        for _ in range(samples):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            graph.replay()
            after.record()
            torch.cuda.synchronize()
            times.append(before.elapsed_time(after) * 1000 / len(starts))
    return times


def copy_bandwidth() -> float:
    """TB/s, bytes read and written: the better of a copy by the engine and one by a kernel."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return max(8 * source.numel() / median(microseconds([way] * 3)) / 1e6 for way in ways)


def rotating(calls: Sequence[Call], launches: int = 20) -> list[Callable[[], None]]:
    return [partial(start, calls[i % len(calls)]) for i in range(max(launches, len(calls)))]


def parts_of(calls: Sequence[Call]) -> str:
    """Times of the single launches of a step."""
    told = []
    for i, one in enumerate(calls[0].records):
        some = [partial(start_one, calls[j % len(calls)].records[i]) for j in range(20)]
        name = one.name.split("<")[0] if isinstance(one, Launch) else "cuBLAS"
        told.append(f"{name} {median(microseconds(some, 10)):.1f}")
    return ", ".join(told)


def grouped_peer(tokens: int, k: int, m: int, n: int) -> float:
    """torch._grouped_mm on bf16 weights, the same number of tokens for every expert."""
    x = torch.randn(tokens * 6, k, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(2, n, k, 2 * m, device="cuda", dtype=torch.bfloat16)
    offsets = (torch.arange(1, n + 1, device="cuda") * (tokens * 6 // n)).to(torch.int32)
    starts = [partial(torch._grouped_mm, x, w[i % 2], offs=offsets) for i in range(4)]
    return median(microseconds(starts))


def tell(row: str, taken: Sequence[float]) -> None:
    """A row for the record."""
    print(json.dumps({"row": row, "us": median(taken), "samples": list(taken)}))


def time_dense() -> None:
    bandwidth = copy_bandwidth()
    print(f"ROW copy {bandwidth:.2f} TB/s")
    print(json.dumps({"row": "copy", "rate": bandwidth}))
    for kind in ("iq4_nl", "q8_0", "q4_0", "q4_K", "q6_K", "f16"):
        k, m = 4096, 14336
        raw = weight(kind, (k, m, 1, 1), "tiles8", values=False)
        size = TYPES[kind].row_bytes(k) * m
        copies = -(-(256 << 20) // size)
        weights = [raw] + [
            Held(
                Operand(
                    c.data_ptr(),
                    raw.operand.ne,
                    raw.operand.nb,
                    raw.operand.dtype,
                    raw.operand.layout,
                ),
                c,
            )
            for c in (raw.memory.clone() for _ in range(copies - 1))
        ]
        for n in (1, 2, 4, 8, 16, 64, 512, 2048):
            if n > 8 and kind not in ("iq4_nl", "q8_0", "f16"):
                continue
            bs = [tensor("f32", (k, n, 1, 1)) for _ in range(2)]
            calls = [record(ops.mul_mat, (w, bs[i % 2]), {})[0] for i, w in enumerate(weights)]
            taken = microseconds(rotating(calls))
            t = median(taken)
            tell(f"mul_mat {kind} n={n}", taken)
            share, rate = size / t / 1e6 / bandwidth, 2 * k * m * n / t / 1e6
            print(
                f"ROW mul_mat {kind} n={n}: {t:.1f} us, {share:.2f} of copy, "
                f"{rate:.0f} TFLOP/s; {parts_of(calls)}",
                flush=True,
            )
            del calls, bs
        del weights, raw
        torch.cuda.empty_cache()
    for kind, k, m in (
        ("iq4_nl", 2048, 3072),
        ("iq4_nl", 2048, 576),
        ("iq4_nl", 2048, 2048),
        ("q6_K", 2048, 102400),
        ("f32", 2048, 64),
    ):
        ws = [
            weight(kind, (k, m, 1, 1), "tiles8", values=False)
            for _ in range(2 if m > 10000 else 20)
        ]
        b = tensor("f32", (k, 1, 1, 1))
        calls = [record(ops.mul_mat, (w, b), {})[0] for w in ws]
        print(
            f"ROW mul_mat {kind} {k}x{m} n=1: {median(microseconds(rotating(calls))):.1f} us; "
            f"{parts_of(calls)}",
            flush=True,
        )
        del ws, calls


def time_experts() -> None:
    k, m, n = 2048, 1408, 64
    ups, gates = (
        [weight("iq4_nl", (k, m, n, 1), "tiles8", values=False) for _ in range(2)] for _ in range(2)
    )
    downs = [weight("iq4_nl", (m, k, n, 1), "tiles8", values=False) for _ in range(2)]
    pick = experts.columns_for
    for tokens in (1, 2, 4, 8, 16, 32, 128, 512, 2048):
        for columns in (None,) if tokens not in (16, 128, 512) else (None, 32, 64, 128):
            experts.columns_for = pick if columns is None else lambda p, e, c=columns: c
            launches = 20 if tokens < 128 else 6
            calls, down = [], []
            for i in range(launches):
                b, h, ids = (
                    tensor("f32", (k, 1, tokens, 1)),
                    tensor("f32", (m, 6, tokens, 1)),
                    ids_of(6, tokens, n),
                )
                b.values = h.values = None
                calls.append(record(ops.moe_up_gate, (ups[i % 2], gates[i % 2], b, ids), {})[0])
                down.append(record(ops.mul_mat_id, (downs[i % 2], h, ids), {})[0])
            taken, taken_down = microseconds(rotating(calls, 1)), microseconds(rotating(down, 1))
            t, td = median(taken), median(taken_down)
            tell(f"moe_up_gate t={tokens} N={columns}", taken)
            tell(f"down t={tokens} N={columns}", taken_down)
            rate, rate_d = 4 * tokens * 6 * k * m / t / 1e6, 2 * tokens * 6 * k * m / td / 1e6
            print(
                f"ROW moe_up_gate t={tokens} N={columns}: {t:.1f} us {rate:.0f} TFLOP/s; "
                f"{parts_of(calls)}",
                flush=True,
            )
            print(
                f"ROW down t={tokens} N={columns}: {td:.1f} us {rate_d:.0f} TFLOP/s; "
                f"{parts_of(down)}",
                flush=True,
            )
            del calls, down
            torch.cuda.empty_cache()
    experts.columns_for = pick
    for tokens in (512, 2048):
        try:
            t = grouped_peer(tokens, k, m, n)
        except RuntimeError as error:
            print(f"torch._grouped_mm t={tokens}: {error}")
            continue
        rate = 4 * tokens * 6 * k * m / t / 1e6
        print(f"ROW torch._grouped_mm t={tokens}: {t:.1f} us {rate:.0f} TFLOP/s", flush=True)

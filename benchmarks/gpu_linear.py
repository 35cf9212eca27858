"""Products on a GPU: every variant against float64, then times. Needs PyTorch and the driver.

    python benchmarks/gpu_linear.py            all of it, each part in a process of its own
    python benchmarks/gpu_linear.py PART...    check_blocks, check_plain, check_experts, time_dense,
                                               time_experts

Steps are recorded as the backend records them (`launch.Call`) and launched through the driver.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from pyggml import ops, quants  # noqa: E402
from pyggml.backends.cuda import compiler, experts, packing, table  # noqa: E402
from pyggml.backends.cuda.launch import Call, Gemm, Launch, Operand  # noqa: E402
from pyggml.dtypes import TYPES  # noqa: E402
from pyggml.parity.tolerance import CLASSES, nmse  # noqa: E402

ARCH = os.environ.get("ARCH", "90a")
PARTS = ("check_blocks", "check_plain", "check_experts", "time_dense", "time_experts")
rng = np.random.default_rng(int(os.environ.get("SEED", "7")))


# -- running what was recorded --------------------------------------------------------------------


def _includes() -> tuple[Path, ...]:
    """Folders that have all headers, whatever wheels are there."""
    for folder in compiler.folders("include"):
        if (folder / "cuda_fp16.h").is_file() and (folder / "crt").is_dir():
            return (folder, folder / "cccl") if (folder / "cccl").is_dir() else (folder,)
    raise SystemExit("no CUDA headers")


compiler.include_folders = _includes
cuda = ctypes.CDLL("libcuda.so.1")
_kernels: dict[tuple[str, str], Any] = {}


def _ok(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what}: error {status}")


def load(wanted: Sequence[tuple[str, str]]) -> None:
    fresh = [w for w in dict.fromkeys(wanted) if w not in _kernels]
    for key, made in compiler.cubins(fresh, ARCH).items():
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _ok(cuda.cuModuleLoadData(ctypes.byref(module), made.code), f"loading {key}")
        name = made.symbol.encode()
        _ok(cuda.cuModuleGetFunction(ctypes.byref(function), module, name), f"finding {key}")
        if made.spilled:
            print(f"  spills: {key} {made.spilled} bytes")
        _kernels[key] = function


def start(call: Call) -> None:
    for one in call.records:
        start_one(one)


def start_one(one: Any) -> None:
    if isinstance(one, Gemm):
        _gemm(one)
    else:
        assert isinstance(one, Launch)
        _launch(one, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("sizes", ctypes.c_uint * 7),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


#: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 1
OVERLAP = (ctypes.c_uint * 18)(6, 0, 1)


def _launch(one: Launch, stream: ctypes.c_void_p) -> None:
    function = _kernels[one.file, one.name]
    if one.shared > 48 << 10:
        _ok(cuda.cuFuncSetAttribute(function, 8, one.shared), "shared memory")
    data = ctypes.create_string_buffer(one.args, len(one.args))
    size = ctypes.c_size_t(len(one.args))
    extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(data), 2, ctypes.addressof(size), 0)
    sizes = (ctypes.c_uint * 7)(*one.grid, *one.block, one.shared)
    config = Config(sizes, stream, ctypes.addressof(OVERLAP), int(one.overlap))
    status = cuda.cuLaunchKernelEx(ctypes.byref(config), function, None, ctypes.byref(extra))
    _ok(status, f"launching {one.name} {one.grid} {one.block} {one.shared}")


_blas = None


def _gemm(one: Gemm) -> None:
    global _blas
    if _blas is None:
        torch.mm(torch.ones(8, 8, device="cuda"), torch.ones(8, 8, device="cuda"))
        _blas = ctypes.CDLL("libcublas.so.13")
    code = {"f32": 0, "f16": 2, "bf16": 14}
    operands: list[Any] = []
    for ptr, kind, leading, stride in zip(one.ptrs, one.types, one.leading, one.strides):
        operands += [ctypes.c_void_p(ptr), code[kind], leading, ctypes.c_longlong(stride)]
    alpha, beta = ctypes.c_float(one.alpha), ctypes.c_float(one.beta)
    _ok(
        _blas.cublasGemmStridedBatchedEx(
            ctypes.c_void_p(torch.cuda.current_blas_handle()),
            *map(int, one.transposed), one.m, one.n, one.k, ctypes.byref(alpha), *operands[:8],
            ctypes.byref(beta), *operands[8:], one.batch, 68, -1,
        ),
        f"cuBLAS {one}",
    )  # fmt: skip


# -- operands -------------------------------------------------------------------------------------


@dataclass
class Held:
    """An operand, what keeps its memory alive, and its values in float64 [ne3, ne2, ne1, ne0]."""

    operand: Operand
    memory: Any
    values: Any = None


def on_device(data: np.ndarray) -> Any:
    return torch.from_numpy(np.ascontiguousarray(data).reshape(-1).view(np.uint8).copy()).cuda()


def blocks_of(kind: str, ne: tuple[int, int, int, int]) -> np.ndarray:
    """Random blocks with scales of real weights."""
    t = TYPES[kind]
    raw = rng.integers(0, 256, (ne[1] * ne[2] * ne[3], ne[0] // t.block, t.nbytes), np.uint8)

    def halves(at: int, low: float, high: float) -> None:
        size = raw.shape[:2]
        values = rng.uniform(low, high, size).astype(np.float16)
        raw[..., at : at + 2] = values[..., None].view(np.uint8)

    if kind == "mxfp4":
        raw[..., 0] = rng.integers(112, 124, raw.shape[:2])
    elif kind == "q6_K":
        halves(208, 1e-5, 1e-4)
    else:
        halves(0, 1e-3, 1e-2)
        if kind in ("q4_1", "q5_1", "q4_K", "q5_K"):
            halves(2, 1e-3, 1e-2)
    return raw


def weight(kind: str, ne: tuple[int, int, int, int], layout: str, values: bool = True) -> Held:
    t = TYPES[kind]
    if t.block == 1:
        return tensor(kind, ne)
    raw = blocks_of(kind, ne)
    data = packing.to_tiles(t, ne, raw) if layout == "tiles8" else raw
    memory = on_device(data)
    row = t.row_bytes(ne[0])
    nb = (t.nbytes, row, row * ne[1], row * ne[1] * ne[2])
    held = Held(Operand(memory.data_ptr(), ne, nb, t, layout), memory)
    if values:
        decoded = quants.decode(t, raw).reshape(ne[::-1])
        held.values = torch.from_numpy(decoded).cuda().double()
    return held


TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i32": torch.int32}


def tensor(
    kind: str, ne: tuple[int, ...], order: tuple[int, ...] = (0, 1, 2, 3), gap: int = 0
) -> Held:
    """Random normal numbers; dimensions lie in memory in `order`, rows with a gap after them."""
    shape = [ne[d] for d in order]
    shape[0] += gap
    made = torch.from_numpy(rng.standard_normal(shape[::-1]).astype(np.float32)).cuda()
    return view(made.to(TORCH[kind]), kind, ne, order)


def view(made: Any, kind: str, ne: tuple[int, ...], order: tuple[int, ...]) -> Held:
    size, nb = TYPES[kind].nbytes, [0] * 4
    strides = made.stride()[::-1]
    for place, d in enumerate(order):
        nb[d] = strides[place] * size
    values = torch.as_strided(made, ne[::-1], [nb[d] // size for d in (3, 2, 1, 0)])
    return Held(Operand(made.data_ptr(), tuple(ne), tuple(nb), TYPES[kind]), made, values.double())


def poisoned(kind: str, ne: tuple[int, ...], gap: int = 0) -> Held:
    made = torch.full((ne[3], ne[2], ne[1], ne[0] + gap), float("nan"), dtype=TORCH[kind]).cuda()
    held = view(made, kind, ne, (0, 1, 2, 3))
    held.values = None
    return held


def read(y: Held) -> Any:
    ne, nb, size = y.operand.ne, y.operand.nb, y.operand.dtype.nbytes
    return torch.as_strided(y.memory, ne[::-1], [nb[d] // size for d in (3, 2, 1, 0)]).double()


def record(
    op: Any, sources: Sequence[Held], attrs: dict[str, Any], gap: int = 0
) -> tuple[Call, Held, str]:
    """The step of an op with these operands, a poisoned result, and its class of numbers."""
    nodes = [ops.input(f"s{i}", s.operand.dtype, ne=s.operand.ne) for i, s in enumerate(sources)]
    node = op(*nodes, **attrs)
    row = table.KERNELS[node.op]
    y = poisoned(node.dtype.name, node.ne, gap)
    need = row.scratch(node) if row.scratch is not None else 0
    scratch = torch.full((need + 256,), 255, dtype=torch.uint8, device="cuda")
    base = -(-scratch.data_ptr() // 256) * 256
    call = Call(node, y.operand, [s.operand for s in sources], node.attrs, scratch=(base, need))
    call.keep = (scratch, sources, y)  # type: ignore[attr-defined]
    reason = row.refuses(node)
    if reason:
        raise RuntimeError(reason)
    row.record(call)
    load([(r.file, r.name) for r in call.records if isinstance(r, Launch)])
    return call, y, row.numeric(node)


_failed = 0


def check(
    label: str, op: Any, sources: Sequence[Held], want: Any, gap: int = 0, **attrs: Any
) -> None:
    global _failed
    try:
        call, y, numeric = record(op, sources, attrs, gap)
        start(call)
        torch.cuda.synchronize()
        got = read(y)
        first = got.clone()
        start(call)
        torch.cuda.synchronize()
        same = bool(torch.equal(first.nan_to_num(7e7), read(y).nan_to_num(7e7)))
    except Exception as error:
        _failed += 1
        print(f"FAILED {label}: {type(error).__name__} {str(error)[:300]}", flush=True)
        if "error 7" in str(error) or "CUDA" in str(error):
            raise
        return
    error = nmse(got.cpu().numpy(), want.cpu().numpy())
    bound = max(CLASSES[numeric], 1e-7 if y.operand.dtype.name == "f16" else 0)
    good = error <= bound and same
    _failed += not good
    names = [r.name for r in call.records if isinstance(r, Launch)]
    verdict = "ok" if good else "FAILED"
    extra = "" if same else " NOT BIT-EQUAL"
    print(
        f"{verdict} {label}: {error:.2e} ({numeric}){extra} {names[-1] if names else 'cuBLAS'}",
        flush=True,
    )


def dense_want(a: Any, b: Any) -> Any:
    r2, r3 = b.shape[1] // a.shape[1], b.shape[0] // a.shape[0]
    a = a.repeat_interleave(r2, 1).repeat_interleave(r3, 0)
    return b @ a.transpose(-1, -2)


def activated(act: str, x: Any) -> Any:
    if act == "silu":
        return x * torch.sigmoid(x)
    if act == "relu":
        return x.clamp_min(0)
    return torch.nn.functional.gelu(x, approximate="tanh")


# -- checks ---------------------------------------------------------------------------------------

BLOCKS = list(packing.FORMATS)


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


def ids_of(n_used: int, tokens: int, n: int, bad: bool = False, gap: int = 0) -> Held:
    ids = np.stack([rng.permutation(n)[:n_used] for _ in range(tokens)]).astype(np.int32)
    if bad:
        ids[rng.random(ids.shape) < 0.2] = -1
        ids[0, 0] = n + 3
    wide = np.full((tokens, n_used + gap), 1 << 30, np.int32)
    wide[:, :n_used] = ids
    made = torch.from_numpy(wide).cuda()
    size = 4 * (n_used + gap)
    operand = Operand(
        made.data_ptr(),
        (n_used, tokens, 1, 1),
        (4, size, size * tokens, size * tokens),
        TYPES["i32"],
    )
    return Held(operand, made, torch.from_numpy(ids).cuda())


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
                two = activated("silu", expert_want(gate.values, b.values, ids.values)) * one
                check(f"moe_up_gate {label}", ops.moe_up_gate, (a, gate, b, ids), two, act="silu")
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


# -- times ----------------------------------------------------------------------------------------


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


def main() -> int:
    if len(sys.argv) > 1:
        torch.cuda.init()
        torch.zeros(1, device="cuda")
        for part in sys.argv[1:]:
            began = time.time()
            globals()[part]()
            print(f"PART {part}: {_failed} failed, {time.time() - began:.0f} s")
        return bool(_failed)
    out = Path(os.environ.get("OUT", "."))
    rows: list[str] = []
    for part in PARTS:
        with (out / f"{part}.log").open("w") as log:
            try:
                subprocess.run(
                    [sys.executable, __file__, part],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=100,
                )
            except subprocess.TimeoutExpired:
                log.write("\nTIMED OUT\n")
        text = (out / f"{part}.log").read_text().splitlines()
        rows += [line for line in text if line.startswith(("ROW", "PART", "FAILED", "TIMED"))][-80:]
        if not any(line.startswith("PART") for line in text):
            rows += text[-15:]
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

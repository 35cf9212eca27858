"""What the checks and times of products share: operands on the GPU, recorded steps, launches."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from pyggml import ops, quants  # noqa: E402
from pyggml.backends.cuda import compiler, packing, table  # noqa: E402
from pyggml.backends.cuda.launch import Call, Gemm, Launch, Operand  # noqa: E402
from pyggml.dtypes import TYPES  # noqa: E402
from pyggml.parity.tolerance import CLASSES, nmse  # noqa: E402

ARCH = os.environ.get("ARCH", "90a")
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


#: What did not hold.
FAILED: list[str] = []


def check(
    label: str, op: Any, sources: Sequence[Held], want: Any, gap: int = 0, **attrs: Any
) -> None:
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
        FAILED.append(label)
        print(f"FAILED {label}: {type(error).__name__} {str(error)[:300]}", flush=True)
        if "error 7" in str(error) or "CUDA" in str(error):
            raise
        return
    error = nmse(got.cpu().numpy(), want.cpu().numpy())
    bound = max(CLASSES[numeric], 1e-7 if y.operand.dtype.name == "f16" else 0)
    good = error <= bound and same
    if not good:
        FAILED.append(label)
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

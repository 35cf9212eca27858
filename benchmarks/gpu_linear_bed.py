"""What the checks of products share: operands on the GPU, recorded steps, the comparison."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gpu_bench import launch, random_blocks

from pyggml import ops, quants
from pyggml.backends.cuda import table
from pyggml.backends.cuda.launch import Call, Launch, Operand
from pyggml.backends.cuda.weights import packing
from pyggml.dtypes import TYPES
from pyggml.parity.tolerance import CLASSES, nmse

rng = np.random.default_rng(int(os.environ.get("SEED", "7")))


# -- operands -------------------------------------------------------------------------------------


@dataclass
class Held:
    """An operand, what keeps its memory alive, and its values in float64 [ne3, ne2, ne1, ne0]."""

    operand: Operand
    memory: Any
    values: Any = None


def on_device(data: np.ndarray) -> Any:
    return torch.from_numpy(np.ascontiguousarray(data).reshape(-1).view(np.uint8).copy()).cuda()


def weight(kind: str, ne: tuple[int, int, int, int], layout: str, values: bool = True) -> Held:
    t = TYPES[kind]
    if t.block == 1:
        return tensor(kind, ne)
    raw = random_blocks(kind, ne[1] * ne[2] * ne[3], ne[0], rng)
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
    row.run(call)
    return call, y, row.numeric(node)


#: What did not hold.
FAILED: list[str] = []


def check(
    label: str, op: Any, sources: Sequence[Held], want: Any, gap: int = 0, **attrs: Any
) -> None:
    try:
        call, y, numeric = record(op, sources, attrs, gap)
        torch.cuda.synchronize()  # operands are made in another stream
        launch(call.records)
        got = read(y)
        first = got.clone()
        torch.cuda.synchronize()
        launch(call.records)
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

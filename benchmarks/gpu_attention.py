"""flash_attn_ext on a GPU: every kernel checked, also where it would not be chosen.

    python benchmarks/gpu_attention.py             all groups, each in a process of its own
    python benchmarks/gpu_attention.py GROUP...    some of them: routes, long, others

One kernel that hangs or faults does not take the other groups along. References are float64,
outputs and scratch are poisoned. Needs PyTorch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from gpu_attention_cases import Case, groups, node_of, others
from gpu_bench import launch

import pyggml as gg
from pyggml import quants
from pyggml.backends.cuda import softmax
from pyggml.backends.cuda.attention import flash, parts, routes
from pyggml.backends.cuda.launch import Call, Launch, Operand
from pyggml.backends.cuda.table import KERNELS
from pyggml.dtypes import I32
from pyggml.parity.tolerance import CLASSES

assert parts and softmax  # importing them fills the table


def layout(node: gg.Node, ptr: int) -> Operand:
    return Operand(ptr, node.ne, node.nb, node.dtype)


def force(route: str) -> None:
    """Let the route be taken wherever it fits the types and sizes."""
    made = routes.Shape.of

    def of(node: gg.Node, fused: bool = False) -> routes.Shape:
        shape = made(node, fused)
        if route:
            shape.__dict__["routes"] = (route, "any") if route != "any" else ("any",)
        return shape

    flash.Shape = type("Forced", (), {"of": staticmethod(of)})  # type: ignore[misc,assignment]


ORIGINAL = routes.Shape


def record(case: Case, at: dict[str, int], scratch: tuple[int, int]) -> list[Launch]:
    flash.Shape = ORIGINAL  # type: ignore[misc]
    force(case.route)
    node = node_of(case)
    src: list[Operand | None] = []
    for name, n in zip(("q", "k", "v", "mask", "sinks", "kv_len"), node.src):
        if n is None or (name == "mask" and case.pos):
            src.append(None)
            continue
        operand = layout(n, at[name])
        if name == "v" and case.inside >= 0:
            unit = n.dtype
            start = case.inside // unit.block * unit.nbytes
            k = src[1]
            assert k is not None
            operand = Operand(k.ptr + start, n.ne, k.nb, n.dtype)
        src.append(operand)
    call = Call(node, layout(node, at["out"]), src, node.attrs, scratch=scratch)
    if case.pos:
        pos = Operand(at["pos"], (case.n_q, 1, 1, 1), (4, 4 * case.n_q, 0, 0), I32)
        flash.flash_attn_causal(call, pos, case.window)
    else:
        flash.flash_attn_ext(call)
    return call.records  # type: ignore[return-value]


def scratch_of(case: Case) -> int:
    flash.Shape = ORIGINAL  # type: ignore[misc]
    force(case.route)
    return flash.Shape.of(node_of(case)).scratch()


def record_other(node: gg.Node, at: list[int]) -> list[Launch]:
    ptrs = iter(at)
    out, *src = (None if n is None else layout(n, next(ptrs)) for n in (node, *node.src))
    assert out is not None
    call = Call(node, out, src, node.attrs)
    KERNELS[node.op].run(call)
    return call.records  # type: ignore[return-value]


def check_others() -> None:
    for node, arrays in others():
        want = gg.compile({"y": node}).run(**arrays)["y"].astype(np.float64)
        held = [torch.from_numpy(x).cuda() for x in arrays.values()]
        out = torch.full(want.shape, float("nan"), device="cuda", dtype=torch.float32)
        if node.dtype.name == "f16":
            out = out.half()
        torch.cuda.synchronize()  # they are made in another stream
        launch(record_other(node, [x.data_ptr() for x in (out, *held)]))
        got = out.double().cpu().numpy()
        wild = ~np.isfinite(want)
        error = float(((got - want)[~wild] ** 2).sum() / max((want[~wild] ** 2).sum(), 1e-300))
        ok = error <= 1e-10 and bool((got[wild] == want[wild]).all())
        tell(ok=ok, case=str(node), text=f"NMSE {error:.2e}")


class Data:
    """Operands of a case on the GPU, and what they hold in float64."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case = case
        noise = torch.Generator(device="cuda").manual_seed(seed)

        def normal(*shape: int) -> Any:
            return torch.randn(*shape, device="cuda", generator=noise)

        c = case
        self.held: dict[str, Any] = {}
        q = normal(c.n3, c.heads, c.n_q, c.d_k)
        self.q = self.held["q"] = q
        self.k = self.rows("k", normal(c.n3, c.heads_kv, c.n_kv, c.d_k), c.kind)
        if c.inside >= 0:
            self.v = self.k[..., c.inside : c.inside + c.d_v]
        else:
            kind = c.kind_v or c.kind
            self.v = self.rows("v", normal(c.n3, c.heads_kv, c.n_kv, c.d_v) + 0.25, kind)
        self.mask = None
        if c.pos:
            last = min(c.n_kv, 10**9)
            first = max(0, last - c.n_q)
            pos = torch.arange(first, first + c.n_q, device="cuda", dtype=torch.int32)
            self.held["pos"] = pos
            j = torch.arange(c.n_kv, device="cuda")
            seen = j[None] <= pos[:, None]
            if c.window:
                seen &= pos[:, None] - j[None] < c.window
            self.seen = seen[None, None]
        elif c.mask:
            mask = normal(c.m3, c.m2, c.n_q, c.n_kv).half()
            if c.mask != "alibi":
                mask = mask * 0 if c.mask == "random" else mask
                hidden = torch.rand(mask.shape, device="cuda", generator=noise) < 0.3
                mask[hidden] = -float("inf")
                mask[..., : c.n_kv // 2] = -float("inf")  # whole tiles
                mask[..., c.n_q // 2, :] = -float("inf")  # a row that sees nothing
            self.held["mask"], self.mask = mask, mask.double()
        if c.sinks:
            self.held["sinks"] = normal(c.heads)
        if c.kv_len >= 0:
            self.held["kv_len"] = torch.tensor([c.kv_len], device="cuda", dtype=torch.int32)
        self.lse = bool(c.attrs.get("lse"))
        self.out = torch.empty(c.n3 * c.n_q * c.heads * (c.d_v + self.lse) + 512, device="cuda")
        self.room = torch.empty(max(scratch_of(c), 256) + 512, device="cuda", dtype=torch.uint8)
        self.poison(float("nan"), 255)
        at = {name: x.data_ptr() for name, x in self.held.items()}
        at["out"] = self.out.data_ptr() + 1024
        at["v"] = at.get("v", 0)
        self.launches = record(c, at, (self.room.data_ptr() + 256, self.room.numel() - 512))

    def rows(self, name: str, x: Any, kind: str) -> Any:
        """Stores x as `kind`; what it then holds."""
        if kind in ("f32", "f16", "bf16"):
            types = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
            self.held[name] = x.to(types[kind])
            return self.held[name].double()
        if kind == "q8_0":
            blocks = x.reshape(*x.shape[:-1], -1, 32)
            d = (blocks.abs().amax(-1, keepdim=True) / 127).half()
            codes = (blocks / d.float()).round().clamp(-127, 127).to(torch.int8)
            raw = torch.cat([d.contiguous().view(torch.int8), codes], -1)
            self.held[name] = raw.contiguous()
            return (d.double() * codes.double()).reshape(x.shape)
        raw = quants.encode_rows(kind, x.cpu().numpy())
        self.held[name] = torch.from_numpy(np.ascontiguousarray(raw)).cuda()
        return torch.from_numpy(quants.decode_rows(kind, raw).astype(np.float64)).cuda()

    def poison(self, value: float, byte: int) -> None:
        self.out.fill_(value)
        self.room.fill_(byte)

    def run(self) -> Any:
        torch.cuda.synchronize()  # the operands are made in another stream
        launch(self.launches)
        c = self.case
        return self.out[256:-256].view(c.n3, c.n_q, c.heads, c.d_v + self.lse).clone()

    def reference(self) -> Any:
        c = self.case
        attrs = {"scale": c.d_k**-0.5, **c.attrs}
        ratio = c.heads // c.heads_kv
        out = torch.empty(c.n3, c.n_q, c.heads, c.d_v + 1, device="cuda", dtype=torch.float64)
        live = c.n_kv if c.kv_len < 0 else max(0, min(c.n_kv, c.kv_len - attrs.get("kv0", 0)))
        for i3 in range(c.n3):
            for h in range(c.heads):
                s = attrs["scale"] * (self.q[i3, h].double() @ self.k[i3, h // ratio].T)
                cap = attrs.get("logit_softcap", 0.0)
                if cap:
                    s = cap * torch.tanh(s / cap)
                if c.pos:
                    s = s.masked_fill(~self.seen[0, 0], -float("inf"))
                if self.mask is not None:
                    slope = 1.0
                    if c.mask == "alibi":
                        power = 1 << (c.heads.bit_length() - 1)
                        slope = 2.0 ** (-8.0 * (h + 1 if h < power else h - power + 0.5) / power)
                    s = s + slope * self.mask[i3 % c.m3, h % c.m2]
                s[:, live:] = -float("inf")
                if c.sinks:
                    sink = self.held["sinks"][h].double().expand(c.n_q, 1)
                    s = torch.cat([s, sink], 1)
                lse = torch.logsumexp(s, 1, keepdim=True)
                p = torch.exp(s - lse).nan_to_num(0.0)[:, : c.n_kv]
                out[i3, :, h, :-1] = p @ self.v[i3, h // ratio]
                out[i3, :, h, -1:] = lse
        return out if self.lse else out[..., :-1]


def judge(data: Data) -> tuple[bool, str]:
    case = data.case
    first = data.run()
    around = torch.cat([data.out[:256], data.out[-256:]])
    outside = not bool(torch.isnan(around).all()) or bool((data.room[-256:] != 255).any())
    data.poison(1e30, 127)
    same = bool((first.view(torch.int32) == data.run().view(torch.int32)).all())
    want, got = data.reference(), first.double()
    wild = ~torch.isfinite(want)
    error = float(((got - want)[~wild] ** 2).sum() / (want[~wild] ** 2).sum().clamp_min(1e-300))
    wrong = int((got[wild] != want[wild]).sum())
    files = {one.file for one in data.launches}
    kind = "f32" if "attention_any.cu" in files else "bf16" if case.kind == "bf16" else "f16"
    ok = same and not outside and not wrong and error <= CLASSES[kind]
    text = f"NMSE {error:.2e} of {CLASSES[kind]:g}"
    text += ("" if same else ", two runs differ") + (", wrote outside" if outside else "")
    return ok, text + (f", {wrong} infinities wrong" if wrong else "")


def check(group: str) -> None:
    for i, case in enumerate(groups()[group]):
        try:
            ok, text = judge(Data(case, i))
        except Exception as error:
            ok, text = False, f"{type(error).__name__}: {error}"
        tell(ok=ok, case=f"{case}", text=text)
        if "CUDA_ERROR" in text or "AcceleratorError" in text:
            break


def tell(**row: Any) -> None:
    print(json.dumps(row), flush=True)


def run_all() -> int:
    """Groups beside each other; what was wrong."""
    counts = {name: len(cases) for name, cases in groups().items()} | {"others": len(others())}
    logs = {group: TemporaryFile("w+") for group in counts}  # noqa: SIM115
    started = {
        group: subprocess.Popen(
            ["timeout", "-k", "2", "100", sys.executable, __file__, group], stdout=log, stderr=log
        )
        for group, log in logs.items()
    }
    failed = 0
    for group, process in started.items():
        status = process.wait()
        logs[group].seek(0)
        text = logs[group].read()
        rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        bad = [row for row in rows if not row["ok"]]
        print(f"{group}: {len(rows) - len(bad)} of {counts[group]} right")
        for row in bad[:7]:
            print(f"   {row['text'][:120]}  {row['case']}")
        if status:
            print(f"!! {group}: exit {status}: {text[-600:]}")
        failed += bool(status) or len(rows) - len(bad) < counts[group]
    return int(failed > 0)


def main() -> int:
    for group in sys.argv[1:]:
        if group == "others":
            check_others()
        else:
            check(group)
    return 0 if sys.argv[1:] else run_all()


if __name__ == "__main__":
    sys.exit(main())

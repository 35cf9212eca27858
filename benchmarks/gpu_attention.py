"""flash_attn_ext on a GPU without the rest of the backend: every kernel checked, the bars timed.

    python benchmarks/gpu_attention.py compile FOLDER     anywhere: cubins for 9.0a
    python benchmarks/gpu_attention.py run FOLDER OUT     on the GPU: checks, then times

Each group of cases runs in a process of its own with a time limit, so one kernel that hangs or
faults does not take the others along. References are float64, outputs and scratch are poisoned.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from gpu_attention_cases import BARS, Case, groups, node_of, others

import pyggml as gg
from pyggml import quants
from pyggml.backends.cuda import attention, attention_parts, compiler, softmax
from pyggml.backends.cuda import attention_routes as routes
from pyggml.backends.cuda.launch import Call, Launch, Operand, Value
from pyggml.backends.cuda.table import KERNELS
from pyggml.dtypes import I32
from pyggml.parity.tolerance import CLASSES

assert attention_parts and softmax  # importing them fills the table


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

    attention.Shape = type("Forced", (), {"of": staticmethod(of)})  # type: ignore[misc,assignment]


ORIGINAL = routes.Shape


def record(case: Case, at: dict[str, int], scratch: tuple[int, int]) -> list[Launch]:
    attention.Shape = ORIGINAL  # type: ignore[misc]
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
        attention.flash_attn_causal(call, pos, case.window)
    else:
        attention.flash_attn_ext(call)
    return call.records  # type: ignore[return-value]


def scratch_of(case: Case) -> int:
    attention.Shape = ORIGINAL  # type: ignore[misc]
    force(case.route)
    return attention.Shape.of(node_of(case)).scratch()


def record_other(node: gg.Node, at: list[int]) -> list[Launch]:
    ptrs = iter(at)
    out, *src = (None if n is None else layout(n, next(ptrs)) for n in (node, *node.src))
    assert out is not None
    call = Call(node, out, src, node.attrs)
    KERNELS[node.op].record(call)
    return call.records  # type: ignore[return-value]


def check_others(gpu: Gpu) -> None:
    torch = gpu.torch
    for node, arrays in others():
        want = gg.compile({"y": node}).run(**arrays)["y"].astype(np.float64)
        held = [torch.from_numpy(x).cuda() for x in arrays.values()]
        out = torch.full(want.shape, float("nan"), device="cuda", dtype=torch.float32)
        if node.dtype.name == "f16":
            out = out.half()
        gpu.launch(record_other(node, [x.data_ptr() for x in (out, *held)]))
        got = out.double().cpu().numpy()
        wild = ~np.isfinite(want)
        error = float(((got - want)[~wild] ** 2).sum() / max((want[~wild] ** 2).sum(), 1e-300))
        ok = error <= 1e-10 and bool((got[wild] == want[wild]).all())
        tell(ok=ok, case=str(node), text=f"NMSE {error:.2e}")


# ---- compiling ----------------------------------------------------------------------------------


def key(file: str, name: str) -> str:
    return hashlib.sha256(f"{file} {name}".encode()).hexdigest()[:16]


def compile_all(folder: Path) -> None:
    attention.tensor_map = lambda *a: Value(bytes(128), 64)
    folder.mkdir(parents=True, exist_ok=True)
    wanted: dict[tuple[str, str], None] = {}
    for case in [*(c for cases in groups().values() for c in cases), *BARS.values()]:
        at = dict.fromkeys(("q", "k", "v", "mask", "sinks", "kv_len", "pos", "out"), 1 << 20)
        for one in record(case, at, (1 << 20, scratch_of(case))):
            wanted[one.file, one.name] = None
    for node, _ in others():
        for one in record_other(node, [1 << 20] * 7):
            wanted[one.file, one.name] = None
    told = {}
    for i, (file, name) in enumerate(wanted):
        start = time.time()
        made = compiler.compile_instance(file, name, "90a")
        told[key(file, name)] = made.symbol
        (folder / key(file, name)).write_bytes(made.code)
        print(
            f"{i + 1}/{len(wanted)} {name}: {made.registers} registers, {made.spilled} spilled, "
            f"{time.time() - start:.1f} s",
            flush=True,
        )
    (folder / "symbols.json").write_text(json.dumps(told))


# ---- running ------------------------------------------------------------------------------------


class Gpu:
    """Cubins, and launches on PyTorch's stream."""

    def __init__(self, folder: Path) -> None:
        import torch
        from cuda.bindings import driver

        self.torch, self.cu, self.folder = torch, driver, folder
        torch.zeros(1, device="cuda")
        self.symbols = json.loads((folder / "symbols.json").read_text())
        self.functions: dict[str, Any] = {}

    def check(self, answer: tuple[Any, ...]) -> Any:
        if answer[0] != self.cu.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{answer[0].name}")
        return answer[1] if len(answer) > 1 else None

    def function(self, one: Launch) -> Any:
        at = key(one.file, one.name)
        if at not in self.functions:
            module = self.check(self.cu.cuModuleLoadData((self.folder / at).read_bytes()))
            found = self.check(self.cu.cuModuleGetFunction(module, self.symbols[at].encode()))
            limit = self.cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            if one.shared > 48 * 1024:
                self.check(self.cu.cuFuncSetAttribute(found, limit, one.shared))
            self.functions[at] = found
        return self.functions[at]

    def launch(self, launches: list[Launch]) -> None:
        stream = self.torch.cuda.current_stream().cuda_stream
        cu = self.cu
        for one in launches:
            held, size = ctypes.create_string_buffer(one.args), ctypes.c_size_t(len(one.args))
            extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(held), 2, ctypes.addressof(size), 0)
            config = cu.CUlaunchConfig()
            config.gridDimX, config.gridDimY, config.gridDimZ = one.grid
            config.blockDimX, config.blockDimY, config.blockDimZ = one.block
            config.sharedMemBytes, config.hStream = one.shared, stream
            attributes = []
            if one.overlap:
                attribute = cu.CUlaunchAttribute()
                attribute.id = (
                    cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
                )
                attribute.value.programmaticStreamSerializationAllowed = 1
                attributes.append(attribute)
            config.attrs, config.numAttrs = attributes, len(attributes)
            self.check(cu.cuLaunchKernelEx(config, self.function(one), 0, ctypes.addressof(extra)))


class Data:
    """Operands of a case on the GPU, and what they hold in float64."""

    def __init__(self, gpu: Gpu, case: Case, seed: int) -> None:
        torch = gpu.torch
        self.gpu, self.case = gpu, case
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
        torch = self.gpu.torch
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
        self.gpu.launch(self.launches)
        self.gpu.torch.cuda.synchronize()
        c = self.case
        return self.out[256:-256].view(c.n3, c.n_q, c.heads, c.d_v + self.lse).clone()

    def reference(self) -> Any:
        torch, c = self.gpu.torch, self.case
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
    torch, case = data.gpu.torch, data.case
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


def check(gpu: Gpu, group: str) -> None:
    for i, case in enumerate(groups()[group]):
        try:
            ok, text = judge(Data(gpu, case, i))
        except Exception as error:
            ok, text = False, f"{type(error).__name__}: {error}"
        tell(ok=ok, case=f"{case}", text=text)
        if "CUDA_ERROR" in text or "AcceleratorError" in text:
            break


def measure(gpu: Gpu, launches: list[list[Launch]], count: int = 20) -> list[float]:
    """Microseconds of each of 20 samples; launches take turns. Short ones in a graph of `count`."""
    torch = gpu.torch
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for one in launches:
            gpu.launch(one)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(count):
                gpu.launch(launches[i % len(launches)])
        return samples(torch, graph.replay, count)


def samples(torch: Any, run: Any, count: int, n: int = 20) -> list[float]:
    start = time.time()
    while time.time() < start + 0.2:  # until the clocks are up
        run()
        torch.cuda.synchronize()
    taken = []
    for _ in range(n):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) * 1000 / count)
    return taken


def rate(case: Case, us: float) -> str:
    pairs = case.n_q * case.n_kv * (0.5 if case.pos else 1)
    flops = 2 * case.heads * pairs * (case.d_k + case.d_v)
    width = case.d_k if case.inside >= 0 else case.d_k + case.d_v
    size = {"q8_0": 34 / 32}.get(case.kind, 2)
    moved = case.n_kv * case.heads_kv * width * size
    return f"{flops / us * 1e-6:8.1f} TFLOP/s {moved / us * 1e-6:7.3f} TB/s"


def bars(gpu: Gpu, only: str) -> None:
    for name, case in ((n, c) for n, c in BARS.items() if only in n):
        try:
            data = [Data(gpu, case, i) for i in range(sets_of(case))]
            count = max(2 if case.n_q > 1 else 20, len(data))
            taken = measure(gpu, [d.launches for d in data], count)
            us = float(np.median(taken))
            tell(row=name, us=us, rate=rate(case, us), samples=taken)
            if case.n_q == 1:
                for at, what in ((0, "first"), (-1, "last")):
                    alone = measure(gpu, [[d.launches[at]] for d in data], count)
                    tell(row=f"  its {what} kernel", us=float(np.median(alone)))
            del data
        except Exception as error:
            tell(row=name, error=f"{type(error).__name__}: {error}")
            return
        gpu.torch.cuda.empty_cache()


def sets_of(case: Case) -> int:
    """So many inputs that none is found in a cache."""
    rows = 2 * case.n_kv * case.heads_kv + 4 * case.n_q * case.heads
    return max(1, min(24, -(-260_000_000 // (rows * (case.d_k + case.d_v)))))


def tell(**row: Any) -> None:
    print(json.dumps(row), flush=True)


def peers(gpu: Gpu) -> None:
    """PyTorch's attention on cuDNN for the rows that it takes."""
    for name, case in BARS.items():
        if case.inside < 0 and case.kind == "f16" and case.d_k != 256 and "tiles" not in name:
            try:
                us = float(np.median(peer(gpu, case)))
                tell(row=f"cudnn {name}", us=us, rate=rate(case, us))
            except Exception as error:
                tell(row=f"cudnn {name}", error=str(error)[:200])
            gpu.torch.cuda.empty_cache()


def peer(gpu: Gpu, case: Case) -> list[float]:
    torch = gpu.torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def tensor(heads: int, n: int, d: int) -> Any:
        return torch.randn(1, heads, n, d, device="cuda", dtype=torch.float16)

    def operands() -> tuple[Any, Any, Any]:
        keys = (case.heads_kv, case.n_kv)
        return tensor(case.heads, case.n_q, case.d_k), *(
            tensor(*keys, d) for d in (case.d_k, case.d_v)
        )

    data = itertools.cycle([operands() for _ in range(sets_of(case))])
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        grouped = case.heads != case.heads_kv
        run = lambda: sdpa(*next(data), is_causal=case.pos, enable_gqa=grouped)  # noqa: E731
        return samples(torch, run, 1)


def run_all(folder: Path, out: Path) -> None:
    """Checks beside each other, then times one after another."""
    me = [sys.executable, __file__]

    def start(*args: str) -> tuple[str, Any, Any]:
        log = (out / f"{'_'.join(args)}.log").open("w+")
        command = ["timeout", "-k", "2", "70", *me, args[0], str(folder), *args[1:]]
        return "_".join(args), log, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def finish(name: str, log: Any, process: Any) -> list[dict[str, Any]]:
        process.wait()
        log.seek(0)
        text = log.read()
        rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        if process.returncode:
            print(f"!! {name}: exit {process.returncode}: {text[-600:]}")
        return rows

    counts = {name: len(cases) for name, cases in groups().items()} | {"others": len(others())}
    started = [start("check", group) for group in counts]
    for one in started:
        rows = finish(*one)
        bad = [r for r in rows if not r["ok"]]
        print(f"{one[0]}: {len(rows) - len(bad)} of {counts[one[0][6:]]} right")
        for r in bad[:7]:
            print(f"   {r['text'][:120]}  {r['case']}")
    rows = ("fa_192", "fa_576", "fa_128", "fa_64", "fa_256", "tiles", "latent")
    for what in (*(("bars", name) for name in rows), ("peers",)):
        for r in finish(*start(*what)):
            told = str(r.get("rate", r.get("error", "")))[:200]
            print(f"{r['row']:34s} {r.get('us', 0):9.2f} us {told}")


def main() -> None:
    what, folder, *rest = sys.argv[1:]
    if what == "compile":
        compile_all(Path(folder))
    elif what == "run":
        run_all(Path(folder), Path(rest[0]))
    else:
        gpu = Gpu(Path(folder))
        if what == "check":
            if rest[0] == "others":
                check_others(gpu)
            else:
                check(gpu, rest[0])
        elif what == "bars":
            bars(gpu, rest[0])
        else:
            peers(gpu)


if __name__ == "__main__":
    main()

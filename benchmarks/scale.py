"""One graph over several GPUs: correctness, sums in our graphs, and speed against one GPU.

    python -m benchmarks.scale [PART ..] [--layers N] [--lite FILE] [--out FILE]

boxes  how the GPUs are linked, and the versions
check  tiny models, sharded against whole: heads, experts, rows, layers, sequence, with f32, f16 and
       q8_0 caches; two runs, and one process and two (mpiexec), bit for bit
nccl   an all-reduce of 16 MiB in our graphs against a loop of NCCL calls, and smaller ones; by our
       own kernels and by NCCL. The sums of both are compared bit for bit
lite   V2-Lite: a prompt of 8192 tokens and decoding at depth 4096, over 1 and 2 GPUs, in one
       process and, for decoding, in two
v3     layers of the V3 shape: a prompt of 2048 tokens and decoding at depth 8192, over 1 and 2;
       decoding also with experts cut by rows, so that no GPU has more of a token's experts
depth  the most layers of the V3 shape that fit over 1 and 2 (from plans)
lite4, v34  over 1 and 4 GPUs: a prompt of V2-Lite of 8192 tokens; of 2048 of three layers of the V3
       shape. With the memory of each GPU as planned and as measured. Nothing, if there are fewer
       GPUs. Each takes less than a minute, so they predict nothing; `pyggml plan` does

In "decode" the GPU chooses the tokens and the host reads 64 of them at a time; in "decode_logits"
the host reads all logits of a token before it feeds the next.

Each part is a process of its own with a time limit. Ratios are to one GPU of the same host in the
same run. Weights are random.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np

import pyggml as gg
from benchmarks import gpu_record, record
from benchmarks.gpu_bench import ROWS, smi, write_row
from benchmarks.scale_sums import PLACES, microseconds, other_bits, own_loop, reduce_chain
from pyggml import backends, gguf
from pyggml.backends.cuda import peer_sum
from pyggml.bench.runs import WARMUPS, Test, nanoseconds_of
from pyggml.generate.plans import padded_rows
from pyggml.models.model import Model, load
from pyggml.models.presets import TINY, V2_LITE, V3
from pyggml.models.synth import synth
from pyggml.parity.tolerance import nmse

#: Part -> seconds that it may take.
PARTS = {"boxes": 60, "check": 240, "nccl": 90, "lite": 300, "v3": 420, "depth": 60,
         "lite4": 240, "v34": 420}  # fmt: skip
#: Ratio -> the bar and the goal.
BARS = {
    "lite_prompt_8192": (1.6, 1.85), "v3_prompt_2048": (1.7, 1.9), "v3_decode_d8192": (1.3, 1.7),
    "lite_decode_d4096": (0.95, 1.2), "lite_decode_logits_d4096": (0.95, 1.2),
    "depth": (1.95, 2.0), "nccl_16mib": (0.95, 1.0), "v3_decode_d8192_by_rows": (1.3, 1.7),
    "lite_prompt_8192_over_4": (2.8, 3.5), "v3_prompt_2048_over_4": (2.8, 3.5),
}  # fmt: skip
REPEATS = 3
#: Tokens of a batch of a prompt.
N_BATCH = 2048
#: Layers of `v34`: all that fit take minutes to write and to read.
LAYERS = 3
#: Threads that write a file.
WRITERS = 16


def ratio(name: str, value: float) -> None:
    """A row whose value more GPUs, or our graphs, must reach."""
    bar, goal = BARS[name]
    print(f"ROW {name + '_ratio':32} {value:10.4g}   (bar {bar}, goal {goal})", flush=True)
    if path := os.environ.get(ROWS):
        line = record.row(f"{name}_ratio", "", value, better="more", bar=bar, goal=goal)
        with Path(path).open("a") as file:
            file.write(json.dumps(line) + "\n")


# -- boxes ------------------------------------------------------------------------------------


def boxes() -> None:
    topology = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True).stdout
    print(topology, flush=True)
    from pyggml.backends.cuda.device.nccl import library

    version = library().get_version()
    print(f"NCCL {version}, GPU {smi('name')}", flush=True)
    about = {"topology": topology.splitlines()[:12], "nccl": str(version)}
    if path := os.environ.get(ROWS):
        with Path(path).open("a") as file:
            file.write(json.dumps({"about": about}) + "\n")


# -- check ------------------------------------------------------------------------------------

CUTS: dict[str, dict[str, int]] = {
    "heads": {"heads": 2}, "experts": {"experts": 2}, "rows": {"rows": 2},
    "auto": {"heads": 2, "experts": 2, "rows": 2}, "layers": {"layers": 2},
    "sequence": {"sequence": 2},
}  # fmt: skip
#: Cache -> the largest relative error against the whole graph.
ERRORS = {"f32": 1e-5, "f16": 3e-3, "q8_0": 3e-2}


def answers(path: Path, cut: Mapping[str, int] | None, cache: str, ranks: Any = None) -> Any:
    """Logits of a prompt, of tokens after it, and of the same again."""
    places = PLACES if cut else PLACES[:1]
    options = {"backends": places, "shard": cut, "cache_k": cache, "cache_v": cache}
    with load(path, prec="f32", ranks=ranks, **options) as model:  # type: ignore[arg-type]
        runs = []
        for _ in range(2):
            session = model.session(n_ctx=64, n_batch=32)
            logits = [session.forward(range(40), "all")]
            logits += [session.forward([token]) for token in range(5)]
            runs.append(np.concatenate(logits))
    return np.stack(runs)


def check_cases(folder: Path) -> Iterator[tuple[str, Path, Mapping[str, int], str]]:
    path = folder / "tiny.gguf"
    for cut, cache in product(CUTS, ERRORS):
        yield f"{cut}_{cache}", path, CUTS[cut], cache


def check() -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        synth(folder / "tiny.gguf", replace(TINY, n_rot=32))  # rows of whole blocks of q8_0
        whole = {cache: answers(folder / "tiny.gguf", None, cache) for cache in ERRORS}
        sharded = {}
        for case, path, cut, cache in check_cases(folder):
            try:
                sharded[case] = answers(path, cut, cache)
            except Exception as error:
                print(f"FAIL {case}: {type(error).__name__}: {error}", flush=True)
                continue
            distance = nmse(sharded[case][0], whole[cache][0]) ** 0.5
            same = bool((sharded[case][0] == sharded[case][1]).all())
            verdict = "PASS" if distance <= ERRORS[cache] and same else "FAIL"
            print(f"{verdict} {case}: error {distance:.1e}, runs equal {same}", flush=True)
            write_row(f"check_{case}_error", "", [distance])
        status = processes(["spmd", str(folder)], limit=60)
        equal = []
        for case, *_ in check_cases(folder):
            for rank in range(2):
                path = folder / f"{case}.{rank}.npy"
                if case in sharded and path.exists():
                    equal.append(bool((np.load(path) == sharded[case]).all()))
                    if not equal[-1]:
                        print(f"FAIL {case}: rank {rank} has other bits than one process")
        print(f"{'PASS' if equal and all(equal) else 'FAIL'} processes: status {status}, "
              f"{sum(equal)} of {2 * len(sharded)} equal bit for bit", flush=True)  # fmt: skip
        write_row("check_processes_equal_cases", "cases", [sum(equal)])


def spmd(folder: str) -> None:
    """One of the processes of `check`."""
    ranks = gg.join()
    for case, path, cut, cache in check_cases(Path(folder)):
        np.save(Path(folder) / f"{case}.{ranks.rank}.npy", answers(path, cut, cache, ranks))


def processes(words: list[str], limit: float, n: int = 2) -> int:
    """Run a function of this file in processes of mpiexec; the exit status."""
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if mpiexec is None:
        print("mpiexec is not installed", flush=True)
        return -1
    command = [mpiexec, "-n", str(n), sys.executable, "-m", "benchmarks.scale", "--only", *words]
    try:
        return subprocess.run(command, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return 124


# -- nccl -------------------------------------------------------------------------------------


SIZES = {"16mib": (16 << 20, 40), "1mib": (1 << 20, 100), "128kb": (128 << 10, 200),
         "32kb": (32 << 10, 200), "8kb": (8 << 10, 200)}  # fmt: skip


def nccl() -> None:
    times: dict[tuple[str, str], list[float]] = {}
    for name, (nbytes, count) in SIZES.items():
        ways: dict[str, Callable[..., Any]] = {
            "graph": partial(reduce_chain, boxes=False),
            "loop": own_loop,
        }
        if nbytes <= 4 * peer_sum.ROOM:
            ways["boxes"] = reduce_chain
        for way, make in ways.items():
            times[name, way] = microseconds(make(nbytes, count), count)
            write_row(f"nccl_{name}_{way}", "us", times[name, way])
        write_row(f"nccl_{name}_other_bits", "elements", [other_bits(nbytes)])
    ratio("nccl_16mib", median(times["16mib", "loop"]) / median(times["16mib", "graph"]))


# -- models -----------------------------------------------------------------------------------


def rates(
    path: Path, tests: Mapping[str, Test], n_batch: int, memory: str = "", **options: Any
) -> dict[str, Any]:
    """Name of a test -> samples of tokens a second.

    memory  also rows of the memory of each GPU, planned and measured, with this prefix
    """
    result: dict[str, Any] = {}
    before = used(len(options["backends"])) if memory else []
    with load(path, **options) as model:
        n_ctx = max(test.n_depth + test.n_tokens for test in tests.values()) + 64
        session = model.session(n_ctx=n_ctx, n_batch=n_batch)
        for name, test in tests.items():
            start = perf_counter()
            turns = range(WARMUPS + REPEATS)
            times = [nanoseconds_of(session, test, perf_counter_ns) for _ in turns]
            result[name] = [test.n_tokens * 1e9 / time for time in times[WARMUPS:]]
            print(f"  {name}: {perf_counter() - start:.1f} s", flush=True)
        if memory:
            rows = session.memory().devices
            for i, (row, was, now) in enumerate(zip(rows, before, used(len(rows)))):
                write_row(f"{memory}_gpu{i}_planned", "bytes", [row.total])
                write_row(f"{memory}_gpu{i}_connections_estimate", "bytes", [row.connections])
                write_row(f"{memory}_gpu{i}_measured", "bytes", [now - was])
    return result


def used(n: int) -> list[int]:
    """The bytes that are in use on each of the first n GPUs."""
    result = []
    for i in range(n):
        context = backends.get("cuda", i).context  # type: ignore[attr-defined]
        with context:
            free, total = context.driver.mem_get_info()
        result.append(total - free)
    return result


def predicted(path: Path, tests: Mapping[str, Test], **options: Any) -> dict[str, float]:
    """Name of a test -> tokens a second by the cost rules of the ops."""
    result = {}
    with load(path, **options) as model:
        for name, test in tests.items():
            n_ctx = test.n_depth + test.n_tokens + 64
            session = model.session(n_ctx=n_ctx, n_batch=N_BATCH)
            steps = range(N_BATCH, test.n_prompt + 1, N_BATCH) or [test.n_depth + 1]
            size = N_BATCH if test.n_prompt else 1
            plans = [session.plan(size, padded_rows(end, n_ctx), 1) for end in steps]
            seconds = sum(plan.predict().total for plan in plans)
            result[name] = size * len(plans) / seconds
    return result


def one_and_two(prefix: str, path: Path, tests: Mapping[str, Test]) -> dict[str, Any]:
    """Rows of one GPU, of two in one process, and their ratios, measured and predicted. Returns the
    samples of one."""
    guesses = [
        predicted(path, tests, backends=PLACES[:1]),
        predicted(path, tests, backends=PLACES, shard="auto"),
    ]
    for name in tests:
        write_row(f"{prefix}_{name}_ratio_predicted", "", [guesses[1][name] / guesses[0][name]])
    one = rates(path, tests, N_BATCH, backends=PLACES[:1])
    two = rates(path, tests, N_BATCH, backends=PLACES, shard="auto")
    for name, values in one.items():
        write_row(f"{prefix}_{name}_1", "t/s", values)
        write_row(f"{prefix}_{name}_2", "t/s", two[name])
        if f"{prefix}_{name}" in BARS:
            ratio(f"{prefix}_{name}", median(two[name]) / median(values))
    return one


def one_and_four(name: str, path: Path, test: Test) -> None:
    """Rows of one GPU, of four in one process, and their ratio."""
    tests = {name: test}
    places = [f"cuda:{i}" for i in range(4)]
    four = rates(path, tests, N_BATCH, f"{name}_over_4", backends=places, shard="auto")[name]
    one = rates(path, tests, N_BATCH, backends=places[:1])[name]
    write_row(f"{name}_over_4_4", "t/s", four)
    write_row(f"{name}_over_4_1", "t/s", one)
    ratio(f"{name}_over_4", median(four) / median(one))


LITE = {
    "prompt_8192": Test(8192),
    "decode_logits_d4096": Test(0, 64, 4096),
    "decode_d4096": Test(0, 64, 4096, loop=True),
}  # fmt: skip
SHAPE = {
    "prompt_2048": Test(2048),
    "decode_logits_d8192": Test(0, 32, 8192),
    "decode_d8192": Test(0, 64, 8192, loop=True),
}  # fmt: skip


def lite(layers: int | None, file: Path | None) -> None:
    with lite_file(layers, file) as path:
        one_and_two("lite", path, LITE)
        processes(["decode", str(path)], limit=90)


def decode(path: str) -> None:
    """One of the processes of `lite`."""
    ranks = gg.join()
    tests = {name: test for name, test in LITE.items() if test.n_gen}
    samples = rates(Path(path), tests, N_BATCH, backends=PLACES, shard="auto", ranks=ranks)
    for name, values in samples.items() if ranks.rank == 0 else ():
        write_row(f"lite_{name}_2_processes", "t/s", values)


def v3(layers: int | None) -> None:
    with model_file(v3_shape(layers), repeated=True) as path:
        one = one_and_two("v3", path, SHAPE)
        tests = {name: test for name, test in SHAPE.items() if test.n_gen}
        two = rates(path, tests, N_BATCH, backends=PLACES, shard={"heads": 2, "rows": 2})
        for name, values in two.items():
            write_row(f"v3_{name}_by_rows_1", "t/s", one[name])
            write_row(f"v3_{name}_by_rows_2", "t/s", values)
        name = "decode_d8192"
        ratio(f"v3_{name}_by_rows", median(two[name]) / median(one[name]))


def four_gpus() -> bool:
    """Whether this machine has four; it says so if not."""
    from pyggml.backends.cuda.device.driver import driver

    count = driver().Device.count()
    if count < 4:
        print(f"this machine has {count} GPUs; nothing to measure", flush=True)
    return bool(count >= 4)


def lite4(layers: int | None, file: Path | None) -> None:
    if four_gpus():
        with lite_file(layers, file) as path:
            one_and_four("lite_prompt_8192", path, LITE["prompt_8192"])


def lite_file(layers: int | None, file: Path | None) -> AbstractContextManager[Path]:
    """A file of V2-Lite: the one that is given, or a new one."""
    if file is not None:
        return nullcontext(file)
    return model_file(replace(V2_LITE, n_block=layers) if layers else V2_LITE)


def v34(layers: int | None) -> None:
    if four_gpus():
        with model_file(v3_shape(layers or LAYERS), repeated=True) as path:
            one_and_four("v3_prompt_2048", path, SHAPE["prompt_2048"])


def v3_shape(layers: int | None) -> Any:
    """Layers with experts, and a small head, since the layers are measured."""
    return replace(V3, n_block=layers or fitting(1), n_layer_dense=0, n_vocab=1024)


class model_file:
    """A file with random weights, in memory if there is room.

    repeated  the layers have the same weights as the first: writing them takes a tenth of the time
    """

    def __init__(self, arch: Any, repeated: bool = False) -> None:
        room = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0
        self._folder = TemporaryDirectory(dir="/dev/shm" if room > 90 << 30 else None)
        self._arch, self._repeated = arch, repeated

    def __enter__(self) -> Path:
        path, start = Path(self._folder.name) / "model.gguf", perf_counter()
        if self._repeated:
            write_repeated(path, self._arch)
        else:
            synth(path, self._arch, dtype="iq4_nl")
        print(f"wrote {path.stat().st_size:,} bytes in {perf_counter() - start:.1f} s", flush=True)
        return path

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def write_repeated(path: Path, arch: Any) -> None:
    """A file of the model whose layers have the bytes of the first."""
    first = path.with_name("first.gguf")
    synth(first, replace(arch, n_block=1), dtype="iq4_nl")
    synth(path, arch, dtype="iq4_nl", header_only=True)
    with gguf.open(first) as source, gguf.open(path, allow_missing_data=True) as target:
        data = np.memmap(first, np.uint8, "r")
        ends = [t.offset + t.nbytes for t in target.tensors.values()]
        os.truncate(path, max(ends))
        out = np.memmap(path, np.uint8, "r+")

        def copy(name: str) -> None:
            words, tensor = name.split("."), target.tensors[name]
            same = ".".join(["blk", "0", *words[2:]]) if words[0] == "blk" else name
            start = source.tensors[same].offset
            out[tensor.offset : tensor.offset + tensor.nbytes] = data[start : start + tensor.nbytes]

        with ThreadPoolExecutor(WRITERS) as pool:
            deque(pool.map(copy, target.tensors), maxlen=0)
    first.unlink()


# -- depth ------------------------------------------------------------------------------------


def fitting(n: int, room: float = 78.5) -> int:
    """The most layers of the V3 shape over n GPUs of `room` GiB, by the planned memory."""
    places = [f"cuda:{i}:{room}GiB" for i in range(n)]
    most = 0
    with TemporaryDirectory() as folder:
        for layers in range(8, 40):
            arch = replace(V3, n_block=layers, n_layer_dense=0, n_vocab=1024)
            path = Path(folder) / f"{layers}.gguf"
            synth(path, arch, dtype="iq4_nl", header_only=True)
            options: Any = {"backends": places, "shard": "auto" if n > 1 else None}
            with Model(gguf.open(path, allow_missing_data=True), **options) as model:
                memory = model.session(n_ctx=8448, n_batch=2048).memory()
            if max(row.total for row in memory.devices) > room * 2**30:
                return most
            most = layers
    return most


def depth() -> None:
    layers = {n: fitting(n) for n in (1, 2)}
    for n, count in layers.items():
        write_row(f"depth_{n}", "layers", [count])
    ratio("depth", layers[2] / layers[1])


# -- all --------------------------------------------------------------------------------------


def run_part(name: str, layers: int | None, file: Path | None, rows: Path) -> float:
    """Run a part in a process of its own; the seconds that it took."""
    command = [sys.executable, "-m", "benchmarks.scale", "--only", name]
    if layers:
        command += ["--layers", str(layers)]
    if file:
        command += ["--lite", str(file)]
    start = perf_counter()
    print(f"== {name}", flush=True)
    try:
        done = subprocess.run(command, timeout=PARTS[name], env=os.environ | {ROWS: str(rows)})
        status = f"status {done.returncode}"
    except subprocess.TimeoutExpired:
        status = f"ended after {PARTS[name]} s"
    seconds = perf_counter() - start
    print(f"== {name}: {status}, {seconds:.0f} s", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="*", help=f"of: {', '.join(PARTS)} (default: all)")
    add("--layers", type=int, help="of lite, v3, lite4 and v34 (default: all that fit)")
    add("--lite", type=Path, help="a file of V2-Lite for lite and lite4 (default: a new one)")
    add("--out", type=Path, help="the record's file")
    add("--only", action="store_true", help="run the part in this process")
    args = parser.parse_args()
    if args.only:
        name, *words = args.parts
        options = {"layers": args.layers} if name in ("lite", "v3", "lite4", "v34") else {}
        options |= {"file": args.lite} if name in ("lite", "lite4") else {}
        globals()[name](*words, **options)
        return
    names = args.parts or list(PARTS)
    with TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        seconds = {name: run_part(name, args.layers, args.lite, rows) for name in names}
        lines = gpu_record.lines_of(rows)
    if args.out:
        about = {"seconds": seconds} | {
            key: value for line in lines for key, value in line.get("about", {}).items()
        }
        fields = {"machine": gpu_record.machine(), "versions": gpu_record.versions()}
        command = " ".join(["python -m benchmarks.scale", *names])
        rows_only = [line for line in lines if "name" in line]
        record.write(args.out, record.new(command, **fields, about=about) | {"rows": rows_only})


if __name__ == "__main__":
    main()

"""Shared by the GPU benchmarks: rows of the record, timing, and random data.

A time is the median of 20 replays of a CUDA graph, divided by the number of calls in it. First,
replays for 0.2 s bring the clocks up. The calls use different inputs in turn, so that four times
the L2 cache is read between two uses of the same input (`copies`).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import pyggml as gg
from benchmarks.record import row
from pyggml import backends
from pyggml.dtypes import TYPES

#: Submits work to a stream.
Action = Callable[[], object]
#: Bytes read between two uses of an input: four times the L2 cache of an H200.
APART = 4 * (60 << 20)
#: Environment variable: only check that everything runs.
SMOKE = "PYGGML_BENCH_SMOKE"
SAMPLES = 3 if os.environ.get(SMOKE) else 20
#: Calls in a graph, if one may take less than 20 us.
SHORT = 20
#: Seconds of replays before the first sample.
WARM = 0.02 if os.environ.get(SMOKE) else 0.2
#: Microseconds of work to queue before nvidia-smi starts, which takes about a second.
BUSY = 2e6
#: Environment variable: the file for rows, as lines of JSON. gpu.py sets it.
ROWS = "PYGGML_BENCH_ROWS"


def copies(nbytes: int) -> int:
    """How many inputs of `nbytes` each are needed so that none is in the cache when it is used."""
    return max(1, -(-APART // nbytes))


def cuda() -> Any:
    """The backend of the first GPU."""
    return backends.get("cuda")


# -- rows -------------------------------------------------------------------------------------


def write_row(name: str, unit: str, samples: Sequence[float], **more: Any) -> None:
    """Write a row of the record. Its value is the median of the samples. more: as for `row`."""
    value = median(samples)
    numbers = {key: each for key, each in more.items() if isinstance(each, int | float)}
    text = "".join(f", {key} {each:.4g}" for key, each in numbers.items())
    print(f"ROW {name:32} {value:10.4g} {unit}{text}", flush=True)
    _write(row(name, unit, value, list(samples), **more))


def write_skipped(text: str) -> None:
    """Write why rows are left out: "what they begin with: why"."""
    print(f"SKIPPED {text}", flush=True)
    _write({"skipped": text})


def _write(line: dict[str, Any]) -> None:
    if path := os.environ.get(ROWS):
        with Path(path).open("a") as file:
            file.write(json.dumps(line) + "\n")


def smi(query: str) -> str:
    """The answer of nvidia-smi for the first visible GPU; empty if there is no nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command += ["-i", visible.split(",")[0]]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.partition("\n")[0].strip()


def write_clocks(what: str, run: Action, us: float) -> None:
    """Write the SM clock, memory clock and power while `run`, which takes `us`, is running."""
    for _ in range(int(BUSY / us) + 1):
        run()
    values = smi("clocks.sm,clocks.mem,power.draw").split(", ")
    sm, memory, power = values if len(values) == 3 else ["unknown"] * 3
    print(f"CLOCKS {what}: SM {sm}, memory {memory}, {power}", flush=True)
    _write({"clocks": what, "sm": sm, "memory": memory, "power": power})


# -- times ------------------------------------------------------------------------------------


def node_microseconds(nodes: Sequence[gg.Node], inputs: Mapping[str, Any]) -> list[float]:
    """Samples of the mean time of a node. One plan computes all nodes."""
    plan = gg.compile({f"y{i}": node for i, node in enumerate(nodes)}, backends=["cuda"])
    plan.run(inputs)
    return plan_microseconds([plan], len(nodes))


def plan_microseconds(plans: Sequence[gg.Plan], nodes: int = 1) -> list[float]:
    """Samples of the mean time of a plan, or of one of its `nodes`.

    The plans run in turn. Each must have run before, and must use nothing but the GPU.
    """
    device, run = cuda(), replays(plans)
    with device.context:
        run()  # captures
        device.synchronize()
        return sampled(run, device.context.external, len(plans) * nodes)


def replays(plans: Sequence[gg.Plan]) -> Action:
    """An action that submits each plan's graph once."""
    runners = [runner for plan in plans for runner in plan.runners]
    assert len(runners) == len(plans), "a plan uses other devices too"
    return partial(_all, [runner.run for runner in runners])


def sampled(run: Action, stream: Any, calls: int = 1) -> list[float]:
    """Samples of the microseconds per call; `run` submits `calls` of them to a CuPy stream."""
    import cupy

    end = perf_counter() + WARM
    while perf_counter() < end:
        run()
        stream.synchronize()
    times = []
    for _ in range(SAMPLES):
        before, after = cupy.cuda.Event(), cupy.cuda.Event()
        before.record(stream)
        run()
        after.record(stream)
        after.synchronize()
        times.append(1000 * cupy.cuda.get_elapsed_time(before, after) / calls)
    return times


def peer_microseconds(calls: Sequence[Action]) -> list[float]:
    """Samples of the mean time of PyTorch calls. One CUDA graph has all calls."""
    import cupy
    import torch

    torch.cuda.synchronize()  # the operands are computed in another stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        external = cupy.cuda.ExternalStream(stream.cuda_stream)
        return sampled(graph.replay, external, len(calls))


def copy_rates() -> list[float]:
    """TB/s of a copy of 1 GiB, read and written, by the copy engine or by a kernel."""
    import torch

    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    ways = (partial(target.copy_, source), partial(torch.neg, source, out=target))
    rates = [[8 * source.numel() / t / 1e6 for t in peer_microseconds([way] * 3)] for way in ways]
    del source, target
    torch.cuda.empty_cache()
    return max(rates, key=median)


def _all(actions: Sequence[Action]) -> None:
    for action in actions:
        action()


# -- data -------------------------------------------------------------------------------------


def random_blocks(name: str, rows: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [rows, blocks, bytes of a block] with scales of a realistic size."""
    t = TYPES[name]
    raw = rng.integers(0, 256, (rows, k // t.block, t.nbytes), np.uint8)

    def halves(at: int, low: float, high: float) -> None:
        values = rng.uniform(low, high, raw.shape[:2]).astype(np.float16)
        raw[..., at : at + 2] = values[..., None].view(np.uint8)

    if name == "mxfp4":
        raw[..., 0] = rng.integers(112, 124, raw.shape[:2])
    elif name == "nvfp4":
        raw[..., :4] = rng.integers(8, 56, (*raw.shape[:2], 4))
    elif name == "iq1_m":
        raw[..., 55] = raw[..., 55] & 0x0F | 0x20  # d, in the upper halves of four words
    elif name == "q6_K":
        halves(208, 1e-5, 1e-4)
    elif name in ("q3_K", "tq1_0", "tq2_0"):
        halves(t.nbytes - 2, 1e-3, 1e-2)
    elif name == "q2_K":
        halves(80, 1e-3, 1e-2)
        halves(82, 1e-3, 1e-2)
    else:
        halves(0, 1e-3, 1e-2)
        if name in ("q4_1", "q5_1", "q4_K", "q5_K"):
            halves(2, 1e-3, 1e-2)
    return raw

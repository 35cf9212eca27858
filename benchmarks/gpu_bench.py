"""What the timings on a GPU share: rows of the record, times, data.

A time is the median of 20 replays of a graph in which all calls take turns, divided by their
number, after replays of 0.2 s that bring the clocks up. Inputs rotate: between two uses of one lie
at least four times the L2 cache (`copies`).
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
from pyggml import backends
from pyggml.dtypes import TYPES

#: Puts something into a stream.
Action = Callable[[], object]
#: Bytes that lie between two uses of an input: four times the L2 cache of an H200.
APART = 4 * (60 << 20)
#: Set where all that counts is whether everything runs.
SMOKE = "PYGGML_BENCH_SMOKE"
SAMPLES = 3 if os.environ.get(SMOKE) else 20
#: A graph of kernels that may take less than 20 us holds so many.
SHORT = 20
#: Seconds of replays before the first sample.
WARM = 0.02 if os.environ.get(SMOKE) else 0.2
#: Microseconds for which the queue is filled before nvidia-smi, which takes about a second, starts.
BUSY = 2e6
#: Where rows go as lines of JSON; gpu.py gives it.
ROWS = "PYGGML_BENCH_ROWS"


def copies(nbytes: int) -> int:
    """So many inputs of `nbytes` each that none is found in the cache."""
    return max(1, -(-APART // nbytes))


def cuda() -> Any:
    """The backend on the GPU."""
    return backends.get("cuda")


# -- rows -------------------------------------------------------------------------------------


def tell(name: str, unit: str, samples: Sequence[float]) -> None:
    """A row: its value is the median of the samples."""
    value = median(samples)
    print(f"ROW {name:32} {value:10.4g} {unit}", flush=True)
    _write({"name": name, "value": value, "unit": unit, "samples": list(samples)})


def _write(line: dict[str, Any]) -> None:
    if path := os.environ.get(ROWS):
        with Path(path).open("a") as file:
            file.write(json.dumps(line) + "\n")


def smi(query: str) -> str:
    """What nvidia-smi says of the first GPU; an empty string where there is no nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return told.stdout.partition("\n")[0].strip()


def tell_clocks(what: str, run: Action, us: float) -> None:
    """SM and memory clock while `run` (of `us`), put into a queue again and again, is running."""
    for _ in range(int(BUSY / us) + 1):
        run()
    told = smi("clocks.sm,clocks.mem,power.draw").split(", ")
    sm, memory, power = told if len(told) == 3 else ["unknown"] * 3
    print(f"CLOCKS {what}: SM {sm}, memory {memory}, {power}", flush=True)
    _write({"clocks": what, "sm": sm, "memory": memory, "power": power})


# -- times ------------------------------------------------------------------------------------


def node_microseconds(nodes: Sequence[gg.Node], given: Mapping[str, Any]) -> list[float]:
    """Samples of the mean time of a node, all of them computed by one plan."""
    plan = gg.compile({f"y{i}": node for i, node in enumerate(nodes)}, backends=["cuda"])
    plan.run(given)
    return plan_microseconds([plan], len(nodes))


def plan_microseconds(plans: Sequence[gg.Plan], nodes: int = 1) -> list[float]:
    """Samples of the mean time of a plan, or of one of its `nodes`. The plans, which were run and
    need the GPU alone, take turns."""
    device, run = cuda(), replays(plans)
    with device.context:
        run()  # captures
        device.synchronize()
        return sampled(run, device.context.external, len(plans) * nodes)


def replays(plans: Sequence[gg.Plan]) -> Action:
    """What puts each plan's graph into the queue once."""
    runners = [runner for plan in plans for runner in plan.runners]
    assert len(runners) == len(plans), "a plan needs other devices too"
    return partial(_all, [runner.run for runner in runners])


def sampled(run: Action, stream: Any, calls: int = 1) -> list[float]:
    """Microseconds of a call, of which `run` puts so many into a stream of CuPy's."""
    import cupy

    end = perf_counter() + WARM
    while perf_counter() < end:
        run()
        stream.synchronize()
    taken = []
    for _ in range(SAMPLES):
        before, after = cupy.cuda.Event(), cupy.cuda.Event()
        before.record(stream)
        run()
        after.record(stream)
        after.synchronize()
        taken.append(1000 * cupy.cuda.get_elapsed_time(before, after) / calls)
    return taken


def peer_microseconds(calls: Sequence[Action]) -> list[float]:
    """Samples of the mean time of PyTorch's calls, all of them in one graph."""
    import cupy
    import torch

    torch.cuda.synchronize()  # what the operands wait for is in another stream
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


def _all(actions: Sequence[Action]) -> None:
    for one in actions:
        one()


# -- data -------------------------------------------------------------------------------------


def random_blocks(kind: str, rows: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [rows, blocks, bytes of a block] with scales like those of real weights."""
    t = TYPES[kind]
    raw = rng.integers(0, 256, (rows, k // t.block, t.nbytes), np.uint8)

    def halves(at: int, low: float, high: float) -> None:
        values = rng.uniform(low, high, raw.shape[:2]).astype(np.float16)
        raw[..., at : at + 2] = values[..., None].view(np.uint8)

    if kind == "mxfp4":
        raw[..., 0] = rng.integers(112, 124, raw.shape[:2])
    elif kind == "nvfp4":
        raw[..., :4] = rng.integers(8, 56, (*raw.shape[:2], 4))
    elif kind == "iq1_m":
        raw[..., 55] = raw[..., 55] & 0x0F | 0x20  # d, in the upper halves of four words
    elif kind == "q6_K":
        halves(208, 1e-5, 1e-4)
    elif kind in ("q3_K", "tq1_0", "tq2_0"):
        halves(t.nbytes - 2, 1e-3, 1e-2)
    elif kind == "q2_K":
        halves(80, 1e-3, 1e-2)
        halves(82, 1e-3, 1e-2)
    else:
        halves(0, 1e-3, 1e-2)
        if kind in ("q4_1", "q5_1", "q4_K", "q5_K"):
            halves(2, 1e-3, 1e-2)
    return raw

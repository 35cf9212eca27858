"""One V2-Lite MoE layer on a GPU: a decode step, a prompt, and compiling its kernels.

    python benchmarks/gpu_layer.py [--steps]    rows of the layer
    python benchmarks/gpu_layer.py compile      seconds to compile or load its kernels

IQ4_NL weights, f16 latent cache; inputs are on the device. A decode step reads about 50 MB, which
fits in the L2 cache. So six plans take turns, each with its own weights, cache and token, and a
sample is the mean of their graphs. A prompt reads more than four times the L2 cache.

compile: the time in `Context.load` for all kernels of the plans of a decode step and of a prompt
(latent and expanded): NVRTC or reading the cache, loading the machine code into the driver, and
looking up the functions. Each sample is a new process. Cold: with an empty cache; cached: with the
cache that the last cold process filled. Loading NVRTC itself is not included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np

import pyggml as gg
from benchmarks.gpu_bench import (
    SMOKE,
    copies,
    cuda,
    plan_microseconds,
    replays,
    write_clocks,
    write_row,
)
from pyggml import gguf
from pyggml.models.base import Architecture
from pyggml.models.batch import Batch, Options
from pyggml.models.model import Model
from pyggml.models.presets import V2_LITE
from pyggml.models.synth import synth
from pyggml.models.weights import Layer

#: name, tokens, depth, rows of the cache, mla (1 latent, 3 expanded), bytes that a run reads
ROWS = (
    ("layer_decode_d4096", 1, 4096, 4096 + 256, 1, 50_000_000),
    ("layer_prompt_2048", 2048, 2048, 2048, 3, 330_000_000),
    ("layer_prompt_2048_latent", 2048, 2048, 2048, 1, 330_000_000),
)


@contextmanager
def lite() -> Iterator[tuple[Architecture, Layer]]:
    """A layer of V2-Lite with experts and random weights."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "lite.gguf"
        arch = replace(V2_LITE, n_block=1, n_layer_dense=0, n_vocab=256)
        synth(path, arch, dtype="iq4_nl")
        with gguf.open(path) as file:
            model = Model(file)
            yield model.arch, model.layer(0)


def layer_plan(arch: Architecture, layer: Layer, n_tokens: int, n_kv: int, mla: int) -> gg.Plan:
    """A plan of the layer, with its own store."""
    options = Options(mla=mla)
    x = gg.input("x", "f32", ne=(arch.n_embd, n_tokens))
    batch = Batch(n_tokens, n_kv, options, n_tokens, padded=False)
    y = arch.layer(x, layer, arch.cache(layer.il, n_kv, n_tokens, options), batch)
    return gg.compile({"y": y}, backends=["cuda"])


def tokens(plan: gg.Plan, depth: int, rng: np.random.Generator) -> dict[str, Any]:
    """The plan's inputs: random tokens at the last positions before `depth`."""
    n_tokens, n_embd = plan.inputs["x"].shape
    x = rng.standard_normal((n_tokens, n_embd), dtype=np.float32)
    return {"x": x, "pos": np.arange(depth - n_tokens, depth)}


#: Samples of each row of `compile`.
TIMES = 1 if os.environ.get(SMOKE) else 3


def loaded() -> tuple[float, int]:
    """Seconds that this process spends in `Context.load`, and the number of kernels."""
    context = cuda().context
    seconds: list[float] = []
    kernels: set[tuple[str, str]] = set()
    load = context.load

    def timed(launches: Any) -> None:
        kernels.update((launch.file, launch.name) for launch in launches)
        begin = perf_counter()
        load(launches)
        seconds.append(perf_counter() - begin)

    context.load = timed
    rng = np.random.default_rng(0)
    with lite() as (arch, layer):
        for _, n_tokens, depth, n_kv, mla, _ in ROWS:
            plan = layer_plan(arch, layer, n_tokens, n_kv, mla)
            plan.run(tokens(plan, depth, rng))
    return sum(seconds), len(kernels)


def load_seconds(cache: str) -> float:
    """Seconds to load the kernels in a new process with this cache folder."""
    command = [sys.executable, "-W", "ignore", __file__, "loaded"]
    environment = {**os.environ, "PYGGML_CACHE": cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    if done.returncode:
        raise RuntimeError(f"the process ended with {done.returncode}: {done.stderr[-600:]}")
    seconds, kernels = json.loads(done.stdout.splitlines()[-1])
    print(f"{kernels} kernels in {seconds:.3f} s")
    return float(seconds)


def compile_rows() -> None:
    """Rows of the seconds to compile and to load kernels."""
    cold = []
    for _ in range(TIMES - 1):
        with TemporaryDirectory() as cache:
            cold.append(load_seconds(cache))
    with TemporaryDirectory() as cache:
        cold.append(load_seconds(cache))
        write_row("compile_cold", "s", cold)
        write_row("compile_cached", "s", [load_seconds(cache) for _ in range(TIMES)])


def layer_rows(steps: bool) -> None:
    """Rows of the layer; with `steps`, also print the time of each step."""
    rng = np.random.default_rng(0)
    with lite() as (arch, layer):
        for name, n_tokens, depth, n_kv, mla, nbytes in ROWS:
            plans = [layer_plan(arch, layer, n_tokens, n_kv, mla) for _ in range(copies(nbytes))]
            for plan in plans:
                plan.run(tokens(plan, depth, rng))
            times = plan_microseconds(plans)
            if n_tokens == 1:
                write_row(name, "us", times)
            else:
                write_row(name, "ms", [t / 1000 for t in times])
                write_clocks(name, replays(plans), median(times))
            if steps:
                print(plans[0].profile(tokens(plans[0], depth, rng)), flush=True)
            del plans


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("part", nargs="?", choices=("layer", "compile", "loaded"), default="layer")
    add("--steps", action="store_true", help="also print the time of each step")
    args = parser.parse_args()
    if args.part == "loaded":
        print(json.dumps(loaded()))
    elif args.part == "compile":
        compile_rows()
    else:
        layer_rows(args.steps)


if __name__ == "__main__":
    main()

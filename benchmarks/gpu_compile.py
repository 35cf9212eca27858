"""Seconds to get the kernels of a V2-Lite MoE layer: compiled, and out of the filled cache.

    python benchmarks/gpu_compile.py

Counted is what `Context.load` does, and nothing else: NVRTC (or reading the cache), loading the
machine code into the driver and finding the functions, for every kernel of the plans of a decode
step and of a prompt (latent and expanded). Each sample is a process of its own. Cold: the cache is
empty; cached: it was filled so. NVRTC is loaded before, as by every start of the backend.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
from gpu_bench import SMOKE, cuda, tell
from gpu_layer import ROWS, feed, layer_plan, lite

TIMES = 1 if os.environ.get(SMOKE) else 3


def loaded() -> tuple[float, int]:
    """Seconds in `Context.load`, and kernels, of this process."""
    context, spent, kernels = cuda().context, [], set()
    load = context.load

    def timed(launches: Any) -> None:
        kernels.update((one.file, one.name) for one in launches)
        begin = perf_counter()
        load(launches)
        spent.append(perf_counter() - begin)

    context.load = timed
    rng = np.random.default_rng(0)
    with lite() as layer:
        for _, n_tokens, depth, n_kv, form, _ in ROWS:
            feed(layer_plan(layer, n_tokens, n_kv, form), depth, rng)
    return sum(spent), len(kernels)


def begun(cache: str) -> float:
    """The seconds of a new process that uses the cache folder."""
    command = [sys.executable, "-W", "ignore", __file__, "one"]
    environment = {**os.environ, "PYGGML_CACHE": cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    if done.returncode:
        raise RuntimeError(f"the process ended with {done.returncode}: {done.stderr[-600:]}")
    seconds, kernels = json.loads(done.stdout.splitlines()[-1])
    print(f"{kernels} kernels in {seconds:.3f} s")
    return float(seconds)


def main() -> None:
    if sys.argv[1:] == ["one"]:
        print(json.dumps(loaded()))
        return
    cold = []
    for _ in range(TIMES - 1):
        with TemporaryDirectory() as cache:
            cold.append(begun(cache))
    with TemporaryDirectory() as cache:
        cold.append(begun(cache))
        tell("compile_cold", "s", cold)
        tell("compile_cached", "s", [begun(cache) for _ in range(TIMES)])


if __name__ == "__main__":
    main()

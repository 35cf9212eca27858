"""Speed on the CPU beside llama.cpp's, in turn on the same machine.

    python benchmarks/cpu.py [--backend cpu] [--runs 5] [--only NAME ...] [--quick]

Needs llama-cpp-python (extra `oracle`). Each row is pyggml's speed divided by llama.cpp's, the
median of the pairs of runs; the samples are tokens a second. Products are a share of this machine's
read bandwidth, measured between them, the best of both. The record is
benchmarks/results/cpu/DATE.json; rows of the same day that are not measured again stay in it.
--quick only checks that everything runs: one tiny file, one run, no record.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np

import pyggml as gg
from benchmarks.cpu_engines import Process
from benchmarks.gpu_bench import random_blocks
from benchmarks.record import RESULTS, ROOT, Row, new, read, row, write
from pyggml.backends.processors import n_processors
from pyggml.models.presets import preset
from pyggml.models.synth import synth
from tools.fetch import fetch


@dataclass(frozen=True)
class Speed:
    """A test of both engines on a file."""

    name: str
    file: str
    test: dict[str, Any]
    bar: float
    goal: float

    @property
    def n_ctx(self) -> int:
        return max(1024, int(self.test.get("depth", 0)) + 256)


SPEEDS = (
    Speed("decode_small", "small", {"test": "decode", "depth": 0, "n": 32}, 1.0, 1.2),
    Speed("decode_smollm2", "smollm2", {"test": "decode", "depth": 0, "n": 64}, 1.0, 1.2),
    Speed("prompt_512_small", "small", {"test": "prompt", "n": 512}, 1.2, 2.0),
    Speed("prompt_512_smollm2", "smollm2", {"test": "prompt", "n": 512}, 1.2, 2.0),
    Speed("decode_d4096_small", "small", {"test": "decode", "depth": 4096, "n": 32}, 1.0, 1.3),
    Speed("decode_v2_lite", "v2-lite", {"test": "decode", "depth": 0, "n": 16}, 1.0, 1.2),
)
QUICK = (
    Speed("decode", "tiny", {"test": "decode", "depth": 8, "n": 4}, 1.0, 1.2),
    Speed("prompt", "tiny", {"test": "prompt", "n": 32}, 1.2, 2.0),
)
#: Types of the product 4096 x 14336 by one column.
PRODUCTS = ("iq4_nl", "q4_K", "q8_0", "q6_K")
PRESETS = {"small": "small", "v2-lite": "deepseek-v2-lite", "tiny": "tiny-llama"}


def file_of(name: str) -> Path:
    """The model file, fetched or written to the cache."""
    if name == "smollm2":
        return next(fetch(name).rglob("*.gguf"))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyggml" / "bench"
    path = cache / f"{name}.gguf"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        synth(part, preset(PRESETS[name]), dtype="iq4_nl")
        part.rename(path)
    return path


# -- models -----------------------------------------------------------------------------------


def speed_rows(speeds: list[Speed], backend: str, threads: int, runs: int) -> Iterator[Row]:
    """The engines take turns, and wait without using a core. Each test runs once unmeasured."""
    for speed in speeds:
        path = file_of(speed.file)
        names = (f"pyggml:{backend}", "llama.cpp")
        engines = [Process(name, path, threads, speed.n_ctx) for name in names]
        samples: list[list[float]] = [[], []]
        for number in range(runs + 1):
            for engine, rates in zip(engines, samples):
                seconds = engine.seconds(dict(speed.test))
                if number:
                    rates.append(speed.test["n"] / seconds)
        for engine in engines:
            engine.close()
        ours, theirs = samples
        ratio = median(a / b for a, b in zip(ours, theirs))
        print(
            f"{speed.name:24} {median(ours):9.2f} t/s   llama.cpp {median(theirs):9.2f} t/s   "
            f"{ratio:5.2f} (bar {speed.bar}, goal {speed.goal})",
            flush=True,
        )
        yield row(
            speed.name, "of llama.cpp", ratio, {"pyggml t/s": ours, "llama.cpp t/s": theirs},
            bar=speed.bar, goal=speed.goal, peer=median(theirs),
        )  # fmt: skip


def first_token_rows(backend: str, runs: int) -> Iterator[Row]:
    """From starting Python to the end of `pyggml run -n 1` on SmolLM2."""
    path = file_of("smollm2")
    for name, bar, goal, cached in (
        ("first_token_cached", 1.5, 1.0, True), ("first_token", 40.0, 15.0, False)
    ):  # fmt: skip
        with TemporaryDirectory() as cache:
            if cached:
                _first_token(path, backend, cache)
            samples = [_first_token(path, backend, cache) for _ in range(runs if cached else 1)]
        value = median(samples)
        print(f"{name:24} {value:9.2f} s (bar {bar}, goal {goal})", flush=True)
        yield row(name, "s", value, samples, bar=bar, goal=goal)


def _first_token(path: Path, backend: str, cache: str) -> float:
    words = ["-m", "pyggml", "run", "-m", str(path), "-p", "Hi", "-n", "1", "--backend", backend]
    environment = {**os.environ, "PYGGML_CACHE": cache, "PYTHONPATH": str(ROOT)}
    start = perf_counter()
    subprocess.run([sys.executable, *words], check=True, env=environment, stdout=subprocess.DEVNULL)
    return perf_counter() - start


# -- products ---------------------------------------------------------------------------------


def reader(threads: int, nbytes: int = 128 << 20) -> Callable[[], float]:
    """A function that reads memory on all threads and returns the bytes a second."""
    parts = [np.ones(nbytes // 4, np.float32) for _ in range(threads)]
    pool = ThreadPoolExecutor(threads)

    def read(part: np.ndarray) -> float:
        return float(part @ part)

    return lambda: threads * nbytes / _seconds(lambda: list(pool.map(read, parts)))


def _seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def product_rows(backend: str, threads: int, runs: int) -> Iterator[Row]:
    """Products of a 14336 x 4096 weight and one column, by turns with reads of memory.

    The highest rate of each: other processes only ever slow one of the two down, and the median of
    their quotients was 0.7 in one record and 1.0 in another.
    """
    rng, read = np.random.default_rng(0), reader(threads)
    k, m = 4096, 14336
    x = rng.standard_normal(k, np.float32)
    rates: dict[str, list[float]] = {}
    reads: list[float] = []
    for name in PRODUCTS:
        raw = random_blocks(name, m, k, rng)
        raw = raw.reshape(m, -1)
        y = gg.mul_mat(gg.constant(raw, name="w", dtype=name), gg.input("x", "f32", ne=(k,)))
        plan = gg.compile({"y": y}, backends=[backend])
        rates[name] = []
        for _ in range(5 * runs):
            rates[name].append(raw.nbytes / plan.time({"x": x}, 1))
            reads.append(read())
    for name, products in rates.items():
        value = max(products) / max(reads)
        print(f"product_{name:16} {value:9.2f} of read bandwidth (bar 0.8, goal 0.95)", flush=True)
        yield row(
            f"product_{name}", "of read bandwidth", value,
            {"product B/s": products, "read B/s": reads}, bar=0.8, goal=0.95, peer=max(reads),
        )  # fmt: skip


# -- the record -------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--threads", type=int, default=n_processors())
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="names of rows, or `product` and `first`")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    only, runs = args.only, 1 if args.quick else args.runs
    speeds = [s for s in (QUICK if args.quick else SPEEDS) if only is None or s.name in only]
    rows = list(speed_rows(speeds, args.backend, args.threads, runs))
    if not args.quick and (only is None or "first" in only):
        rows += first_token_rows(args.backend, runs)
    if not args.quick and (only is None or "product" in only):
        rows += product_rows(args.backend, args.threads, runs)
    if args.quick:
        return
    about = {"threads": args.threads, "backend": args.backend}
    record = new("python benchmarks/cpu.py", about=about)
    others = ("llama_cpp", "numba")
    record["versions"] |= {name: import_module(name).__version__ for name in others}
    record["rows"] = rows
    path = RESULTS / "cpu" / f"{record['date']}.json"
    if path.exists():
        measured = {row["name"] for row in rows}
        record["rows"] = [row for row in read(path)["rows"] if row["name"] not in measured] + rows
    write(path, record)
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

"""DeepSeek-V2-Lite by pyggml and by llama-bench, in turn, on one file and one GPU.

    PYGGML_LLAMA_BENCH=build/llama/bin/llama-bench python benchmarks/gpu_peers.py [--file lite.gguf]

whole    all layers on the GPU
experts  the routed experts stay on the host: `pins={"exps": "cpu"}` and `-ot exps=CPU`

Each round runs llama-bench once, then our session. Decoding reads the logits of every token and
chooses the next one on the host. Rows end in `_of_llama`: our median speed divided by its own.
Without PYGGML_LLAMA_BENCH (benchmarks/peers.py builds it) only our rows are measured.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter_ns
from typing import Any

from benchmarks.gpu_bench import SMOKE, write_row
from benchmarks.gpu_model import MODEL, N_BATCH, seconds
from benchmarks.peers import llama_bench
from pyggml.backends.processors import n_processors
from pyggml.bench.runs import WARMUPS, Test, fill, nanoseconds_of
from pyggml.generate.session import Session
from pyggml.models.model import load
from pyggml.models.synth import synth

STEPS = 64
TESTS = [Test(512), Test(2048), Test(0, STEPS), Test(0, STEPS, 4096)]
ROUNDS = 1 if os.environ.get(SMOKE) else 3
THREADS = str(n_processors())
#: For each of TESTS, and for all layers of a model on the GPU.
LLAMA = f"-ngl 99 -fa 1 -b {N_BATCH} -ub {N_BATCH} -p 512,2048 -n {STEPS} -d 0,4096".split()
SETTINGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "whole": ({"backends": ["cuda"]}, []),
    "experts": (
        {"backends": ["cuda", "cpu"], "pins": {"exps": "cpu"}},
        ["-ot", "exps=CPU", "-t", THREADS],
    ),
}


def rate(session: Session, test: Test) -> float:
    """Tokens a second of one run of a test."""
    if test.n_prompt:
        return test.n_prompt * 1e9 / nanoseconds_of(session, test, perf_counter_ns)
    fill(session, test.n_depth)
    session.forward([1])
    return test.n_gen / seconds(partial(_decode, session, test.n_gen))


def _decode(session: Session, n: int) -> None:
    token = 1
    for _ in range(n):
        token = int(session.forward([token])[0].argmax())


def turns(path: Path, name: str, binary: Path | None) -> Iterable[tuple[str, Test, float]]:
    """Engine, test and tokens a second, in turn."""
    options, llama = SETTINGS[name]
    with load(path, **options) as model:
        session = model.session(n_ctx=4096 + 2 * STEPS, n_batch=N_BATCH)
        for test in TESTS * WARMUPS:
            rate(session, test)
        for _ in range(ROUNDS):
            if binary is not None:
                rates, _build = llama_bench(binary, path, [*LLAMA, *llama])
                for test in TESTS:
                    yield "llama", test, rates[test][0]
            for test in TESTS:
                yield "pyggml", test, rate(session, test)


def measure(path: Path, binary: Path | None, names: Iterable[str]) -> None:
    for name in names:
        samples: dict[tuple[str, Test], list[float]] = defaultdict(list)
        for engine, test, value in turns(path, name, binary):
            samples[engine, test].append(value)
        for test in TESTS:
            what = f"prompt_{test.n_prompt}" if test.n_prompt else f"decode_d{test.n_depth}"
            ours = samples["pyggml", test]
            write_row(f"{name}_{what}", "t/s", ours)
            if theirs := samples.get(("llama", test)):
                write_row(f"{name}_{what}_llama", "t/s", theirs)
                write_row(
                    f"{name}_{what}_of_llama", "of llama.cpp", [median(ours) / median(theirs)]
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, help="a V2-Lite file (default: write one)")
    parser.add_argument("--only", choices=SETTINGS, help="one of the settings")
    args = parser.parse_args()
    text = os.environ.get("PYGGML_LLAMA_BENCH")
    run: Callable[[Path], None] = partial(
        measure, binary=Path(text) if text else None, names=[args.only] if args.only else SETTINGS
    )
    if args.file:
        run(args.file)
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "lite.gguf"
        synth(path, MODEL, dtype="iq4_nl")
        run(path)


if __name__ == "__main__":
    main()

"""All of DeepSeek-V2-Lite on a GPU, by a session: loading, prompts, and decoding by depth.

    python benchmarks/gpu_model.py [--file lite.gguf] [--depths 0,4096,16384] [--compare N]

Without --file, a file of the full size with random IQ4_NL weights is written first (8.3 GiB).
A prompt runs in batches of 2048 tokens. Decoding feeds a token and reads its logits' argmax in
every step, as a program that generates text does. `standard` and `q8_0` are other caches, `softmax`
is attention without flash attention. --compare also runs N tokens on NumPy, for the
NMSE of the logits.
"""

from __future__ import annotations

import argparse
import os
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, perf_counter_ns

import numpy as np

from benchmarks.gpu_bench import SMOKE, plan_microseconds, write_row
from pyggml.bench.runs import WARMUPS, Test, fill, nanoseconds_of
from pyggml.generate.plans import padded_rows
from pyggml.generate.session import Session
from pyggml.models.model import Model, load
from pyggml.models.presets import V2_LITE
from pyggml.models.synth import synth
from pyggml.parity.tolerance import nmse
from pyggml.runtime.plan import Plan

#: With PYGGML_BENCH_SMOKE, two of the layers.
MODEL = replace(V2_LITE, n_block=2, n_vocab=1024) if os.environ.get(SMOKE) else V2_LITE
N_BATCH = 2048
PROMPTS = (512, 2048, 8192, 16384)
STEPS = 64
#: Tokens of a session.
N_CTX = max(PROMPTS) + 512
#: MiB of attention memory of a row.
AMB = 256


def seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def rates_of(session: Session, test: Test, repeats: int = 3) -> list[float]:
    """Tokens a second of a test of `pyggml bench`, warmed up as there."""
    times = [nanoseconds_of(session, test, perf_counter_ns) for _ in range(WARMUPS + repeats)]
    return [test.n_tokens * 1e9 / time for time in times[WARMUPS:]]


def prompt_rows(session: Session) -> None:
    for n in PROMPTS:
        write_row(f"model_prompt_{n}", "t/s", rates_of(session, Test(n_prompt=n)))


def decode_rows(session: Session, depths: list[int]) -> dict[str, list[float]]:
    """Tokens a second of decoding from each depth; returns those of the last depth."""
    rows: dict[str, list[float]] = {}
    for depth in depths:
        rows = decode_rates(session, depth)
        for name, rates in rows.items():
            write_row(f"model_decode{name}_d{depth}", "t/s", rates)
    return rows


def decode_rates(session: Session, depth: int) -> dict[str, list[float]]:
    """Tokens a second of decoding from a depth.

    logits   the host reads all logits of each token and chooses the next
    (none)   the device chooses, and the host reads each token
    loop     the host reads 64 tokens at a time
    """
    fill(session, depth)
    rows: dict[str, list[float]] = {}
    for name, steps in (("_logits", logits_steps), ("", token_steps)):
        rates = []
        for _ in range(WARMUPS + 3):
            session.truncate(depth)
            rates.append(STEPS / seconds(partial(steps, session)))
        rows[name] = rates[WARMUPS:]
    rows["_loop"] = rates_of(session, loop(depth))
    return rows


def loop(depth: int) -> Test:
    return Test(n_gen=STEPS, n_depth=depth, loop=True)


def form_rows(model: Model, depths: list[int]) -> None:
    """Rows of other caches; a session for each."""
    size = {"n_ctx": N_CTX, "n_batch": N_BATCH}
    standard = model.session(**size, mla=0)
    for depth in depths:
        write_row(f"model_standard_decode_loop_d{depth}", "t/s", rates_of(standard, loop(depth)))
    del standard
    q8_0 = model.session(**size, cache_k="q8_0", cache_v="q8_0")
    write_row(f"model_q8_0_decode_loop_d{depths[-1]}", "t/s", rates_of(q8_0, loop(depths[-1])))
    del q8_0


def softmax_rows(path: Path) -> None:
    """Rows of a prompt without flash attention, with and without a budget. Each has a model of its
    own, so that both find the GPU alike."""
    prompt = Test(n_prompt=PROMPTS[-1])
    for name, amb in (("", None), (f"_amb_{AMB}", AMB)):
        with load(path, backends=["cuda"], amb=amb, flash=False) as model:
            rates = rates_of(model.session(n_ctx=N_CTX, n_batch=N_BATCH), prompt)
        write_row(f"model_softmax{name}_prompt_{PROMPTS[-1]}", "t/s", rates)


def share_rows(rates: dict[str, list[float]], graph: list[float]) -> None:
    """The host's share of a step: the time of a token less that of the captured graph alone.

    host_share_us         the device chooses, and the host reads each token
    host_share_logits_us  the host reads all logits and chooses
    """
    for name, row in (("", "host_share_us"), ("_logits", "host_share_logits_us")):
        write_row(row, "us", [1e6 / rate - median(graph) for rate in rates[name]])


def logits_steps(session: Session) -> None:
    token = 1
    for _ in range(STEPS):
        token = int(session.forward([token])[0].argmax())


def token_steps(session: Session) -> None:
    deque(session.generate([1], STEPS), maxlen=0)


def compare(path: Path, n: int) -> None:
    """Write the NMSE of the logits against NumPy's, for the default and for f32 everywhere."""
    tokens = np.arange(n)
    for row, prec, cache in (
        ("model_nmse", "default", "f16"), ("model_nmse_f32", "f32", "f32")
    ):  # fmt: skip
        logits = []
        for place in ("cuda", "numpy"):
            with load(path, backends=[place], prec=prec, cache_k=cache, cache_v=cache) as model:
                logits.append(model.session(256).forward(tokens, "all"))
        same = int((logits[0].argmax(1) == logits[1].argmax(1)).sum())
        print(f"logits of {n} tokens, prec={prec}: top-1 {same} of {n}", flush=True)
        write_row(row, "", [nmse(*logits)])


def profile(session: Session) -> None:
    """Print where the host's time of a decode step goes."""
    import cProfile
    import pstats

    session.truncate(len(session.tokens) - STEPS)
    with cProfile.Profile() as profiler:
        token_steps(session)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def measure(path: Path, args: argparse.Namespace) -> None:
    run(path, args)
    if args.compare:
        compare(path, args.compare)


def run(path: Path, args: argparse.Namespace) -> None:
    with load(path, backends=["cuda"]) as model:
        session_rows(model.session(n_ctx=N_CTX, n_batch=N_BATCH), args)
        form_rows(model, args.depths)
    softmax_rows(path)


def session_rows(session: Session, args: argparse.Namespace) -> None:
    """Rows of the default options."""
    write_row("model_load", "s", [seconds(lambda: session.forward([0]))])
    prompt_rows(session)
    rates = decode_rows(session, args.depths)
    graph = plan_microseconds([last_plan(session)])
    write_row("model_decode_graph", "us", graph)
    share_rows(rates, graph)
    if args.profile:
        profile(session)


def last_plan(session: Session) -> Plan:
    """The plan of the last decode step."""
    return session.plan(1, padded_rows(len(session.tokens), session.n_ctx), 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--file", type=Path, help="a V2-Lite file (default: write one)")
    add("--depths", type=lambda s: [int(n) for n in s.split(",")], default=[0, 4096, 16384])
    add("--compare", type=int, default=0, metavar="N", help="compare N tokens with NumPy")
    add("--profile", action="store_true", help="print where the host's time goes")
    args = parser.parse_args()
    if args.file:
        measure(args.file, args)
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "lite.gguf"
        duration = seconds(lambda: synth(path, MODEL, dtype="iq4_nl"))
        print(f"wrote {path.stat().st_size:,} bytes in {duration:.1f} s", flush=True)
        measure(path, args)


if __name__ == "__main__":
    main()

"""All of DeepSeek-V4-Flash on one GPU: memory by plan and by measurement, loading, prompts, tokens.

    python benchmarks/gpu_v4.py [--layers N] [--type iq3_xxs]

The file is only a header, and the weights are random (`load(random_weights=True)`): a tensor is a
part of what the host draws once for each type and scale. The GPU has every tensor of every layer,
loaded in the same way as from a file. A model that does not fit is left out. With fewer layers than
the model has, names of rows begin with v4_N_layers.

v4_whole_PART            GiB, beside those that were planned: of `weights`, `caches` and `compute`
                         what their allocation took, of `driver` all that came beside them
v4_whole_memory          GiB of the GPU that came into use from beginning to end, by nvidia-smi;
                         the bar is the total of `pyggml plan`
v4_whole_load            s until the GPU has packed all weights, which are in the host's memory
v4_whole_first_token     s until the first logits after that, with compiling and recording
v4_whole_prompt_N        t/s of a prompt in batches of 2048
v4_whole_decode_d8192    t/s; this, _logits and _loop as in gpu_model.py
v4_whole_decode_graph    us of a token on the GPU alone
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.gpu_bench import (
    SMOKE,
    plan_microseconds,
    replays,
    smi,
    write_clocks,
    write_row,
    write_skipped,
)
from benchmarks.gpu_model import decode_rates, last_plan, rates_of, seconds
from pyggml.bench.runs import Test, fill
from pyggml.generate.fit import lines
from pyggml.generate.session import Session
from pyggml.models.model import Model, load
from pyggml.models.presets import preset
from pyggml.models.synth import synth
from pyggml.ops.leaf import constant_op, state_op
from pyggml.runtime.leaves import Need
from pyggml.runtime.places import parse
from pyggml.transfer import origin

SMALL = bool(os.environ.get(SMOKE))
PRESET = "tiny-deepseek4" if SMALL else "deepseek-v4-flash"
N_BATCH, PROMPTS, DEPTH = (64, (64, 256), 256) if SMALL else (2048, (2048, 8192), 8192)
#: Tokens of context: those of the deepest test, and room for the tokens that it generates.
N_CTX = DEPTH + 512
MIB, GIB = 1 << 20, 1 << 30

#: Bytes in use on the device.
Used = Callable[[], int]


def opened(path: Path, *, layers: int | None, dtype: str, place: str) -> Model:
    """The model from a header at `path`, with random weights. They are drawn, and not loaded."""
    start = perf_counter()
    synth(path, preset(PRESET, layers=layers), dtype=dtype, header_only=True)
    model = load(path, backends=[place], random_weights=True)
    for name in model.file.tensors:
        model.file.array(name)
    print(f"drawn in {perf_counter() - start:.1f} s: {model!r}", flush=True)
    return model


def part_of(model: Model) -> str:
    """How the names of a model's rows begin."""
    n_layer = model.arch.n_layer
    return "v4_whole" if n_layer == preset(PRESET).n_layer else f"v4_{n_layer}_layers"


def planned(session: Session) -> dict[str, int]:
    """What `pyggml plan` prints for a session on one device, by the names of the rows."""
    [line] = lines(session.memory(), [parse(text) for text in session.model.backends])
    row = line.row
    return {
        "weights": row.weights, "caches": row.states, "compute": row.compute,
        "driver": line.driver, "memory": line.total,
    }  # fmt: skip


def loaded(session: Session, used: Used) -> dict[str, int]:
    """Load a session, and write the time of its weights; the bytes that came into use by parts."""
    needs = [need for plan in session.plans.largest() for need in plan.needs]
    name, store = part_of(session.model), session.store
    backend = parse(session.model.backends[0]).backend

    def load_weights() -> None:
        store.reserve(leaves(needs, constant_op), {}, {})
        backend.synchronize()

    backend.synchronize()  # the driver's context comes before the first part
    steps = [used()]
    write_row(f"{name}_load", "s", [seconds(load_weights)])
    steps.append(used())
    store.reserve(leaves(needs, state_op), {}, {})
    steps.append(used())
    session.plans.reserve()
    steps.append(used())
    write_row(f"{name}_first_token", "s", [seconds(lambda: check(session.forward([1])))])
    sizes = [after - before for before, after in pairwise(steps)]
    return dict(zip(("weights", "caches", "compute"), sizes))


def leaves(needs: Sequence[Need], op: Any) -> list[Need]:
    return [need for need in needs if origin(need.node).op is op]


def check(logits: np.ndarray) -> None:
    if not np.isfinite(logits).all() or not logits.any():
        raise SystemExit("logits are not finite, or all zero")


def memory_rows(session: Session, parts: dict[str, int], total: int) -> None:
    """Rows of the parts that were measured, and of all that came into use."""
    measured = {**parts, "driver": total - sum(parts.values()), "memory": total}
    for part, plan in planned(session).items():
        bar = plan / GIB if part == "memory" else None
        name = f"{part_of(session.model)}_{part}"
        write_row(name, "GiB", [measured[part] / GIB], planned=plan / GIB, bar=bar)


def speed_rows(session: Session) -> None:
    name = part_of(session.model)
    for n in PROMPTS:
        write_row(f"{name}_prompt_{n}", "t/s", rates_of(session, Test(n_prompt=n)))
    for way, rates in decode_rates(session, DEPTH).items():
        write_row(f"{name}_decode{way}_d{DEPTH}", "t/s", rates)
    fill(session, DEPTH)
    check(session.forward([1]))


def measure(model: Model, used: Used, begin: int) -> Session:
    """Write the rows of a model.

    begin  the bytes in use before this process had the device
    """
    session = model.session(N_CTX, N_BATCH)
    parts = loaded(session, used)
    memory_rows(session, parts, used() - begin)  # these stay if there is no end
    speed_rows(session)
    memory_rows(session, parts, used() - begin)
    return session


def graph_rows(session: Session) -> None:
    """The time of a token's graph, and clocks meanwhile."""
    name, plan = part_of(session.model), last_plan(session)
    times = plan_microseconds([plan])
    write_row(f"{name}_decode_graph", "us", times)
    write_clocks(f"{name}_decode", replays([plan]), median(times))


def used_bytes() -> int:
    return int(smi("memory.used").split()[0]) * MIB


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--type", default="iq3_xxs", help="of weights (default: %(default)s)")
    args = parser.parse_args()
    begin, free = used_bytes(), int(smi("memory.free").split()[0]) * MIB
    with TemporaryDirectory() as folder:
        path = Path(folder) / "v4.gguf"
        model = opened(path, layers=args.layers, dtype=args.type, place="cuda")
    need = planned(model.session(N_CTX, N_BATCH))["memory"]
    if need > free:
        text = f"{need / GIB:.1f} GiB are needed, {free / GIB:.1f} free"
        write_skipped(f"{part_of(model)}: {text}")
        return
    graph_rows(measure(model, used_bytes, begin))


if __name__ == "__main__":
    main()

"""The launches of a layer's decode step, or prompt, on CUDA, in order. Needs no GPU.

    python tools/launches.py [-n TOKENS] [-d DEPTH] [-t TYPE] [-g GPUS] KIND ...

KIND is window, ratio_4 or ratio_128 (DeepSeek-V4-Flash), v3, v32, glm_5 or v2_lite. A line for each
launch: the ops of its step, the size of its result, its kernel, blocks and threads. The layer is
the second one of its kind, so what layers of a kind compute once is left out. Of several GPUs, with
shard="auto", those of the last one.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyggml as gg
from pyggml import gguf
from pyggml.backends.cuda.launch import Launch, Record
from pyggml.backends.cuda.recording import record_step
from pyggml.backends.step import Step
from pyggml.models.base import Architecture
from pyggml.models.batch import Batch, Options
from pyggml.models.compressed import HEAVY, PLAIN, SPARSE
from pyggml.models.deepseek4 import DeepSeek4
from pyggml.models.model import Model
from pyggml.models.presets import GLM_5, V2_LITE, V3, V4_FLASH, V32
from pyggml.models.synth import synth
from pyggml.runtime.kernels import planned_memory


def _v4(ratio: int, n_hash: int = 0) -> Architecture:
    return replace(
        V4_FLASH, n_block=3, ratios=3 * (ratio,), n_hash=n_hash, n_vocab=256,
        clamp=3 * (10.0,), clamp_shared=3 * (10.0,),
    )  # fmt: skip


#: Models of layers of one kind. The last layer is for the outputs only, so it is not taken.
KINDS: dict[str, Architecture] = {
    "window": _v4(PLAIN, n_hash=3),
    "ratio_4": _v4(SPARSE),
    "ratio_128": _v4(HEAVY),
    "v3": replace(V3, n_block=3, n_layer_dense=0, n_vocab=256),
    "v32": replace(V32, n_block=3, n_layer_dense=0, n_vocab=256),
    "glm_5": replace(GLM_5, n_block=3, n_layer_dense=0, n_vocab=256, types=3 * (True,)),
    "v2_lite": replace(V2_LITE, n_block=3, n_layer_dense=0, n_vocab=256),
}


def launches_of(
    arch: Architecture,
    n_layer: int,
    n_tokens: int = 1,
    depth: int = 8192,
    dtype: str = "q2_K",
    gpus: int = 1,
) -> list[tuple[Step, Record]]:
    """The launches of the first layers of a model on the last GPU, each with its step."""
    places = [f"cuda:{i}:140GiB" for i in range(gpus)]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        synth(path, arch, dtype=dtype, header_only=True)
        with gguf.open(path, allow_missing_data=True) as file:
            model, options = Model(file), Options()
            batch = Batch(n_tokens, depth, options, n_tokens, padded=False)
            streams = (arch.n_stream,) if isinstance(arch, DeepSeek4) else ()
            x = gg.input("x", ne=(arch.n_embd, *streams, n_tokens))
            for il in range(n_layer):
                cache = arch.cache(il, depth, n_tokens, options)
                x = arch.layer(x, model.layer(il), cache, batch)
            shard = "auto" if gpus > 1 else None
            plan = gg.compile({"y": x}, updates=batch.writes, backends=places, shard=shard)
            work = plan._work
    at, arenas = planned_memory(work)
    last = f"cuda:{gpus - 1}"
    arena = arenas[last].ptr
    return [
        (step, record)
        for step, offset in zip(work.steps, work.placed.scratch_at)
        if work.home(step.node).device == last
        for record in record_step(step, at, (arena + offset, step.scratch), names_only=True)
    ]


def layer_launches(arch: Architecture, **sizes: Any) -> list[tuple[Step, Record]]:
    """The launches of a second layer, which follow those of the first."""
    return launches_of(arch, 2, **sizes)[len(launches_of(arch, 1, **sizes)) :]


def line(step: Step, record: Record) -> str:
    ops = "+".join(node.op.name for node in step.nodes)
    sizes = "x".join(map(str, step.node.ne)).removesuffix("x1").removesuffix("x1")
    if not isinstance(record, Launch):
        return f"{sizes:12} {type(record).__name__}   {ops}"
    blocks = "x".join(map(str, record.grid))
    return f"{sizes:12} {record.name:44} {blocks:9} of {record.block[0]:4}   {ops}"


def main() -> None:
    parser = argparse.ArgumentParser(description="The launches of a layer on CUDA, in order.")
    parser.add_argument("kinds", nargs="+", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("-n", type=int, default=1, help="tokens")
    parser.add_argument("-d", type=int, default=8192, help="rows of the cache")
    parser.add_argument("-t", default="q2_K", help="type of the weights")
    parser.add_argument("-g", type=int, default=1, help="GPUs")
    args = parser.parse_args()
    for kind in args.kinds:
        sizes = {"n_tokens": args.n, "depth": args.d, "dtype": args.t, "gpus": args.g}
        launches = layer_launches(KINDS[kind], **sizes)
        print(f"{kind}: {len(launches)} launches")
        for number, launch in enumerate(launches, 1):
            print(f"{number:3} {line(*launch)}")


if __name__ == "__main__":
    main()

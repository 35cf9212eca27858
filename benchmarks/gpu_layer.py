"""One V2-Lite MoE layer on a GPU: a decode step replayed, and a prompt.

    python benchmarks/gpu_layer.py [--steps]

IQ4_NL weights, f16 latent cache; inputs are on the device. A decode step reads about 50 MB, which
the cache would keep: six plans with weights, cache and token of their own take turns, and a sample
is the mean of their graphs, one after another. A prompt reads more than four times the cache.
`--steps` prints what each launch adds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from gpu_bench import copies, cuda, plan_microseconds, replays, sampled, tell, tell_clocks

import pyggml as gg
from pyggml import gguf
from pyggml.models.config import DeepSeek2Config
from pyggml.models.deepseek2 import AttentionOptions, Cache, Layer
from pyggml.models.feed_forward import layer_output
from pyggml.models.presets import preset, synth

#: name, tokens, depth, rows of the cache, form of attention, bytes that a run reads
ROWS = (
    ("layer_decode_d4096", 1, 4096, 4096 + 256, "latent", 50_000_000),
    ("layer_prompt_2048", 2048, 2048, 2048, "expanded", 330_000_000),
    ("layer_prompt_2048_latent", 2048, 2048, 2048, "latent", 330_000_000),
)


@contextmanager
def lite() -> Iterator[Layer]:
    """A layer of V2-Lite with experts and random weights."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "lite.gguf"
        model = replace(preset("deepseek-v2-lite", layers=1), n_layer_dense=0, n_vocab=256)
        synth(path, model, type="iq4_nl")
        with gguf.open(path) as file:
            yield Layer.of(file, DeepSeek2Config.from_gguf(file.fields, file.tensors), 0)


def layer_plan(layer: Layer, n_tokens: int, n_kv: int, form: str) -> gg.Plan:
    """With a store of its own."""
    options = AttentionOptions(form, True, "f16")
    x = gg.input("x", "f32", ne=(layer.config.n_embd, n_tokens))
    pos = gg.input("pos", "i32", ne=(n_tokens,))
    mask = gg.causal_mask(pos, n_kv=n_kv)
    cache = Cache.of(layer.config, options, n_kv, layer.il)
    y = layer_output(x, pos, pos, mask, layer, cache, options)
    return gg.compile({"y": y}, backends=["cuda"])


def feed(plan: gg.Plan, depth: int, rng: np.random.Generator) -> None:
    """Run the plan with the last tokens before `depth`."""
    n_tokens, n_embd = plan.inputs["x"].shape
    x = rng.standard_normal((n_tokens, n_embd), dtype=np.float32)
    plan.run(x=x, pos=np.arange(depth - n_tokens, depth))


def by_launch(plan: gg.Plan) -> Iterator[str]:
    """What each launch adds to a replayed graph of all up to it, in us, and its step."""
    runner: Any
    (runner,) = plan.runners
    named = [(s, a) for s, actions in zip(runner.steps, runner.actions) for a in actions]
    before, context = 0.0, cuda().context
    with context:
        stream = context.external
        for n, (step, last) in enumerate(named, 1):
            stream.begin_capture()
            for _, action in named[:n]:
                action()
            graph = stream.end_capture()
            now = median(sampled(partial(graph.launch, stream), stream))
            kernel = getattr(last.args[0], "name", "") if isinstance(last, partial) else ""
            yield f"{now - before:8.2f} {now:9.2f}  {step.node.op.name:16} {kernel}"
            before = now


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", action="store_true")
    steps, rng = parser.parse_args().steps, np.random.default_rng(0)
    with lite() as layer:
        for name, n_tokens, depth, n_kv, form, nbytes in ROWS:
            plans = [layer_plan(layer, n_tokens, n_kv, form) for _ in range(copies(nbytes))]
            for plan in plans:
                feed(plan, depth, rng)
            taken = plan_microseconds(plans)
            if n_tokens == 1:
                tell(name, "us", taken)
            else:
                tell(name, "ms", [t / 1000 for t in taken])
                tell_clocks(name, replays(plans), median(taken))
            if steps:
                print(*by_launch(plans[0]), sep="\n", flush=True)
            del plans


if __name__ == "__main__":
    main()

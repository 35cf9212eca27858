"""One V2-Lite MoE layer on a GPU: a decode step replayed, and a prompt.

    python benchmarks/gpu_layer.py [--json FILE] [--steps]

IQ4_NL weights, f16 latent cache. Times are of the captured graph between events, inputs on the
device; median of 20 after a warm-up. `--steps` prints the slowest steps one by one.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

import pyggml as gg
from pyggml import backends, gguf
from pyggml.models.config import DeepSeek2Config
from pyggml.models.deepseek2 import AttentionOptions, Cache, Layer
from pyggml.models.feed_forward import layer_output
from pyggml.models.presets import preset, synth

#: name, tokens, rows of the cache, form of attention
ROWS = (
    ("layer_decode_d4096", 1, 4096 + 256, "latent"),
    ("layer_prompt_2048", 2048, 2048, "expanded"),
    ("layer_prompt_2048 latent", 2048, 2048, "latent"),
)


def layer_plan(
    layer: Layer, config: DeepSeek2Config, n_tokens: int, n_kv: int, form: str
) -> gg.Plan:
    options = AttentionOptions(form, True, "f16")
    x = gg.input("x", "f32", ne=(config.n_embd, n_tokens))
    pos = gg.input("pos", "i32", ne=(n_tokens,))
    mask = gg.causal_mask(pos, n_kv=n_kv)
    cache = Cache.of(config, options, n_kv, layer.il)
    y = layer_output(x, pos, pos, mask, layer, cache, options)
    return gg.compile({"y": y}, backends=["cuda"])


def timed(plan: gg.Plan, repeat: int = 20) -> list[float]:
    """Microseconds of the plan's graph, `repeat` times."""
    import cupy

    context = backends.get("cuda").context  # type: ignore[attr-defined]
    assert plan._execution is not None
    (runner,) = plan._execution.runners
    with context:
        stream, found = context.external, []
        for _ in range(repeat + 5):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(stream)
            runner.run()
            end.record(stream)
            end.synchronize()
            found.append(1000 * cupy.cuda.get_elapsed_time(start, end))
    return found[5:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", action="store_true")
    args = parser.parse_args()
    rng, rows = np.random.default_rng(0), []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "lite.gguf"
        model = replace(preset("deepseek-v2-lite", layers=1), n_layer_dense=0, n_vocab=256)
        synth(path, model, type="iq4_nl")
        with gguf.open(path) as file:
            config = DeepSeek2Config.from_gguf(file.fields, file.tensors)
            layer = Layer.of(file, config, 0)
            for name, n_tokens, n_kv, form in ROWS:
                plan = layer_plan(layer, config, n_tokens, n_kv, form)
                feed = {
                    "x": rng.standard_normal((n_tokens, config.n_embd), dtype=np.float32),
                    "pos": np.arange(n_kv - n_tokens, n_kv) - (256 if n_tokens == 1 else 0),
                }
                for _ in range(3):
                    plan.run(feed)
                samples = timed(plan)
                rows.append({"name": name, "value": median(samples), "unit": "us"})
                rows[-1]["samples"] = samples
                print(f"{name:28} {median(samples):10.1f} us  {len(plan.steps)} steps", flush=True)
                if args.steps:
                    print(plan.profile(feed), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()

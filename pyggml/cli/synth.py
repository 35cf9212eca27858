"""Write a GGUF file with random weights of realistic scale.

Presets named after models have their published sizes, small is a DeepSeek model for CPUs, and tiny
(DeepSeek), tiny-llama and others that begin so are for tests. Norms, the router, its bias and
indexer.proj are f32. A row that is not whole blocks of TYPE (a row of 128 in attn_k_b, for a type
with blocks of 256) becomes q8_0, or f16 if it is not whole blocks of 32 either. output.weight is
q6_K if TYPE has fewer bits.
With mxfp4, only experts have it and the others are q8_0, as in the published files of gpt-oss.

--header-only writes the keys and the tensor table but no weights. `pyggml info` and `pyggml plan`
need no more, but such a file cannot run.

pyggml synth tiny.gguf --preset tiny
pyggml synth lite.gguf --preset deepseek-v2-lite --type q4_K   9 GB
pyggml synth v3.gguf --preset deepseek-v3 --header-only
"""

from __future__ import annotations

import argparse
import time

from pyggml.cli.options import natural, option, whole
from pyggml.cli.progress import progress
from pyggml.cli.terminal import print_json
from pyggml.gguf.synth import DRAWN, drawn_type
from pyggml.models.base import MAX_LAYERS
from pyggml.models.presets import PRESETS, preset
from pyggml.models.synth import synth


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("out", metavar="OUT", help="the file to write; it appears when it is complete")
    add("--preset", choices=PRESETS, default="small",
        help="size of the model (default: %(default)s)")  # fmt: skip
    add("--layers", type=whole(1, MAX_LAYERS), metavar="N",
        help="number of layers instead of the preset's")  # fmt: skip
    add("--type", type=_type, default="iq4_nl", metavar="TYPE",
        help=f"storage type (default: %(default)s): {' '.join(DRAWN)}")  # fmt: skip
    add("--kv-b", choices=("split", "joined"), default="split",
        help="store attn_k_b and attn_v_b, or attn_kv_b (default: %(default)s)")  # fmt: skip
    add("--seed", type=natural, default=0, metavar="N",
        help="seed of the weights (default: %(default)s)")  # fmt: skip
    add("--header-only", action="store_true", help="write no weights")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    config = preset(args.preset, layers=args.layers, kv_b=args.kv_b)
    start = time.perf_counter()
    size = synth(
        args.out,
        config,
        dtype=args.type,
        seed=args.seed,
        name=f"{args.preset} random",
        header_only=args.header_only,
        progress=progress("writing", "bytes"),
    )
    seconds = time.perf_counter() - start
    if args.json:
        print_json({"file": args.out, "bytes": size, "seconds": seconds})
        return 0
    print(f"{args.out}: {size:,} bytes in {seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s")
    return 0


@option
def _type(text: str) -> str:
    return drawn_type(text).name

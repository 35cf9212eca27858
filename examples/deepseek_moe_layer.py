"""One DeepSeek MoE layer on several devices, compared with float64.

The layer has attention with a latent cache, routing, experts (moe_up_gate, down) and shared
experts. Each run is a prompt and then tokens decoded one by one. Everything runs twice. A row of
the table is a place and a cache type; "+ experts on numpy" is a device with the experts' weights on
numpy. If a token goes to other experts than in float64, it is a near tie if the scores of
the last expert chosen and the best one not chosen are too close for the cache type.

Without --model, the example first writes a file with one V2-Lite layer and random IQ4_NL weights.

    python examples/deepseek_moe_layer.py
    python examples/deepseek_moe_layer.py --backend numpy --backend cuda --json rows.json

The exit status is 0 if all errors are within their bounds, all choices are float64's or near ties,
and the two runs are bit-equal. Otherwise it is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import pyggml as gg
from pyggml import gguf
from pyggml.graph import precise
from pyggml.models.batch import Batch, Options
from pyggml.models.deepseek2 import DeepSeek2
from pyggml.models.model import Model
from pyggml.models.presets import V2_LITE
from pyggml.models.synth import synth
from pyggml.parity.tolerance import relative_error
from pyggml.runtime import places

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for the float64 reference

from tests.reference.deepseek_layer import layer_f64, weights_of

MIB = 2**20
#: Bounds of the relative error of the layer's output, by precision and cache type.
BOUNDS = {"default": {"f16": 1e-2, "q8_0": 3e-2}, "f32": {"f16": 1e-3, "q8_0": 2e-2}}
#: A margin below this fraction of the bound is a near tie, because a relative error of the hidden
#: states changes the experts' scores by about the same relative error.
NEAR = 1 / 3


@dataclass(frozen=True)
class Row:
    """A line of the table; sizes in MiB, times in ms.

    same   number of tokens with float64's experts
    near   number of tokens with other experts because of a near tie
    other  number of tokens with other experts without a near tie
    equal  whether both runs gave the same bits
    """

    place: str
    cache: str
    prompt_error: float
    decode_error: float
    bound: float
    same: int
    near: int
    other: int
    equal: bool
    prompt: float
    decode: float
    weights: float
    arena: float

    @property
    def ok(self) -> bool:
        errors = self.prompt_error, self.decode_error
        return all(e <= self.bound for e in errors) and not self.other and self.equal


class Bench:
    """One layer, one sequence of tokens, and its output and routing in float64."""

    def __init__(self, file: gguf.GGUFFile, args: argparse.Namespace) -> None:
        model = Model(file)
        if not isinstance(model.arch, DeepSeek2):
            raise gg.GGUFError(f"{file.paths[0]}: the example is for architecture deepseek2")
        self.config = c = model.arch
        il = c.n_layer_dense if args.layer is None else args.layer
        self.layer = model.layer(il)
        if "ffn_gate_inp" not in self.layer:
            raise gg.ShapeError(
                f"layer {self.layer.il} is dense; use --layer to choose one with experts"
            )
        self.n_prompt, self.prec = args.prompt, args.prec
        self.pos = np.arange(args.prompt + args.decode, dtype=np.int32)
        self.n_kv = -(-len(self.pos) // 256) * 256
        rng = np.random.default_rng(args.seed)
        self.x = rng.standard_normal((len(self.pos), c.n_embd), dtype=np.float32)
        self.expected, routing = layer_f64(weights_of(file, self.layer.il), self.x, self.pos, c)
        assert routing is not None  # the layer has experts
        self.routing = routing

    def plan(self, where: dict[str, Any], cache: str, n_tokens: int, store: gg.Store) -> gg.Plan:
        x = gg.input("x", "f32", ne=(self.config.n_embd, n_tokens))
        options = Options(mla=1, cache_k=cache)
        batch = Batch(n_tokens, self.n_kv, options, n_tokens, padded=False)
        states = self.config.cache(self.layer.il, self.n_kv, n_tokens, options)
        y = self.config.layer(x, self.layer, states, batch)
        graph = gg.Graph({"y": y})
        outputs = (graph if self.prec == "default" else precise(graph)).outputs
        return gg.compile(outputs, store=store, observe=["ffn_moe_topk-*"], **where)

    def run(self, prompt: gg.Plan, single: gg.Plan) -> tuple[Any, Any, float, float]:
        """Outputs and experts of all tokens, ms of the prompt, ms of the fastest token."""
        runs = [(prompt, slice(self.n_prompt))]
        runs += [(single, slice(i, i + 1)) for i in range(self.n_prompt, len(self.x))]
        outputs, ms = [], []
        for plan, tokens in runs:
            start = time.perf_counter()
            outputs.append(plan.run(x=self.x[tokens], pos=self.pos[tokens]))
            ms.append(1e3 * (time.perf_counter() - start))
        y, ids = (np.concatenate(parts) for parts in zip(*(o.values() for o in outputs)))
        return y, ids, ms[0], min(ms[1:])

    def measure(self, place: str, where: dict[str, Any], cache: str) -> Row:
        store, bound = gg.Store(), BOUNDS[self.prec][cache]
        prompt, single = (self.plan(where, cache, n, store) for n in (self.n_prompt, 1))
        # In the second run, the cache has the rows of the first, but the mask hides them.
        first_y, first_ids, *_ = self.run(prompt, single)
        y, ids, prompt_ms, decode_ms = self.run(prompt, single)
        same = (np.sort(ids, axis=1) == np.sort(self.routing.ids, axis=1)).all(axis=1)
        near = ~same & (self.routing.margin < NEAR * bound)
        return Row(
            place=place,
            cache=cache,
            prompt_error=relative_error(y[: self.n_prompt], self.expected[: self.n_prompt]),
            decode_error=relative_error(y[self.n_prompt :], self.expected[self.n_prompt :]),
            bound=bound,
            same=int(same.sum()),
            near=int(near.sum()),
            other=int((~same & ~near).sum()),
            equal=np.array_equal(first_y, y) and np.array_equal(first_ids, ids),
            prompt=prompt_ms,
            decode=decode_ms,
            weights=prompt.memory.weights / MIB,
            arena=max(plan.memory.compute for plan in (prompt, single)) / MIB,
        )


def wheres(backends: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Title and keywords of `compile`: each place alone, then the first device other than numpy
    with the experts on numpy.
    """
    names = list(dict.fromkeys(str(places.parse(text)) for text in backends))
    yield from ((name, {"backends": [name]}) for name in names)
    for name in [name for name in names if name != "numpy"][:1]:
        yield f"{name} + experts on numpy", {"backends": [name], "pins": {"_exps": "numpy"}}


COLUMNS = "place", "cache", "error", "error", "same experts", "runs", "ms", "ms", "MiB", "MiB"
PARTS = "", "", "prompt", "decode", "of tokens", "", "prompt", "decode", "weights", "arena"
LINE = "{:<28}  {:<5}  {:>7}  {:>7}  {:<19}  {:<9}  {:>7}  {:>7}  {:>7}  {:>7}"


def line(row: Row) -> str:
    other = f", {row.near} near ties" * (row.near > 0) + f", {row.other} others" * (row.other > 0)
    return LINE.format(
        row.place,
        row.cache,
        f"{row.prompt_error:.1e}",
        f"{row.decode_error:.1e}",
        f"{row.same}/{row.same + row.near + row.other}{other}",
        "bit-equal" if row.equal else "DIFFER",
        f"{row.prompt:.1f}",
        f"{row.decode:.2f}",
        f"{row.weights:.1f}",
        f"{row.arena:.2f}" + ("" if row.ok else "  FAILED"),
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", metavar="FILE", help="a deepseek2 GGUF file (default: write one)")
    add("--layer", type=int, metavar="I", help="its number (default: the first with experts)")
    add("--prompt", type=int, default=16, metavar="N", help="tokens (default: %(default)s)")
    add("--decode", type=int, default=4, metavar="N", help="tokens (default: %(default)s)")
    add("--types", default="f16,q8_0", help="cache types (default: %(default)s)")
    add("--prec", choices=tuple(BOUNDS), default="default", help="precision of ops that have one")
    add("--seed", type=int, default=0, help="seed of weights and tokens (default: 0)")
    add("--backend", action="append", metavar="PLACE", help="repeatable; default: numpy and null")
    add("--json", metavar="FILE", help="write the rows to FILE")
    args = parser.parse_args(argv)
    args.types, args.backend = args.types.split(","), args.backend or ["numpy", "null"]
    if unknown := set(args.types) - set(BOUNDS["default"]):
        parser.error(f"no cache type {unknown.pop()!r}; choose from {', '.join(BOUNDS['default'])}")
    if args.prompt < 1 or args.decode < 1 or args.seed < 0:
        parser.error("--prompt and --decode must be at least 1, --seed must not be negative")
    return args


def run(args: argparse.Namespace, path: str) -> int:
    with gguf.open(path) as file:
        return report(Bench(file, args), args, Path(path).name)


def report(bench: Bench, args: argparse.Namespace, name: str) -> int:
    c, e = bench.config, bench.config.experts
    head = (
        f"{name} layer {bench.layer.il}: n_embd {c.n_embd}, {c.n_head} heads, "
        f"{e.n_used} of {e.n_expert} experts of {e.n_ff}, {e.n_shared} shared; "
        f"prompt {args.prompt}, decode {args.decode}, seed {args.seed}, prec {args.prec}; "
        f"smallest margin of a choice {bench.routing.margin.min():.1e}"
    )
    print(head, LINE.format(*COLUMNS), LINE.format(*PARTS), sep="\n", flush=True)
    rows = []
    for place, where in wheres(args.backend):
        for cache in args.types:
            rows.append(bench.measure(place, where, cache))
            print(line(rows[-1]), flush=True)
    bad = sum(not row.ok for row in rows)
    bounds = ", ".join(f"{BOUNDS[args.prec][cache]:g} ({cache})" for cache in args.types)
    print(f"{bad} of {len(rows)} rows FAILED." if bad else f"All {len(rows)} rows passed.", end=" ")
    print(f"Required: errors within {bounds}, float64's experts or near ties, bit-equal runs.")
    if args.json:
        table = {"header": head, "rows": [{**asdict(row), "ok": row.ok} for row in rows]}
        Path(args.json).write_text(json.dumps(table, indent=1) + "\n")
    return int(bad > 0)


def lite(folder: str, seed: int) -> str:
    """A file with one layer of V2-Lite with experts. A layer uses no vocabulary, so it is small."""
    path = str(Path(folder) / "deepseek-v2-lite.gguf")
    config = replace(V2_LITE, n_block=1, n_layer_dense=0, n_vocab=256)
    synth(path, config, dtype="iq4_nl", seed=seed)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        with TemporaryDirectory() as folder:
            return run(args, args.model or lite(folder, args.seed))
    except (gg.PyggmlError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

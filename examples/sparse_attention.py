"""Sparse attention of DeepSeek V3.2, GLM-5.2 and DeepSeek V4 next to dense attention, by depth.

One layer of each kind has its own random weights, in files that the example writes first:

V3.2     dense     latent attention to all rows of the cache
         sparse    the same layer with its indexer, which chooses 2,048 rows for each token
GLM-5.2  dense, sparse   as in V3.2
         shared    the next layer, which has no indexer: it reads the rows that the first one chose
V4       dense     the layer of the next line with a window of all tokens; no published model has it
         window    the last 128 tokens
         4         the window, and of the rows that stand for 4 tokens each the 512 best
         128       the window, and all rows, which stand for 128 tokens each

The depth is the number of tokens in the cache at the end. The last ones are a part of a prompt and
then single tokens. Their outputs are compared with float64, token by token. Graphs without outputs
fill the cache with the tokens before, in batches: they compute all that the layer writes to its
cache, but no attention.

Rounding swaps rows whose scores are close to the border of the choice, and random scores are so
dense that nearly every token has such rows. So float64 attends to the rows that the run chose, and
no token is left out. The table counts the rows that float64 would not have chosen, per token
("swaps"). A swapped row fails if its score in float64 is too far from the border.

Head sizes, ranks, windows and numbers of chosen rows are those of the models. --n-embd and --cut
make the layers smaller. Times are the fastest of three; 2.0x is half the time of the dense form.

    python examples/sparse_attention.py
    python examples/sparse_attention.py --types f16 --plot sparse.png --json rows.json
    python examples/sparse_attention.py --backend cuda --cut 1 --n-embd 4096 --depths 4096,65536

The exit status is 0 if all errors and swapped rows are within their bounds, and the two runs are
bit-equal. Otherwise it is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pyggml as gg
from pyggml import gguf
from pyggml.models.base import Architecture
from pyggml.models.batch import Batch, Options
from pyggml.models.cache import Cache
from pyggml.models.deepseek4 import DeepSeek4
from pyggml.models.deepseek32 import DeepSeek32
from pyggml.models.glm_dsa import GlmDsa
from pyggml.models.mla import mla
from pyggml.models.model import Model
from pyggml.models.presets import GLM_52, V4_FLASH, V32
from pyggml.models.synth import synth
from pyggml.parity.tolerance import relative_error

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for the float64 reference

from tests.reference.compressed_layer import CompressedLayer
from tests.reference.sparse_layer import Choice, SparseLayer, best_f64

MIB = 2**20
#: Bounds by cache type: of a token's relative error, and of a swapped row's distance from the
#: border, relative to the token's largest score.
BOUNDS = {"f32": (1e-2, 2e-3), "f16": (1e-2, 2e-3), "q8_0": (3e-2, 2e-2)}
#: The least size of the batches that fill the cache.
BATCH = 128


@dataclass(frozen=True)
class Form:
    """A form of attention.

    il     its layer in the model's file
    given  whether the chosen rows are an input of the graph
    """

    name: str
    il: int = 0
    given: bool = False


FORMS = {
    "V3.2": (Form("dense"), Form("sparse")),
    "GLM-5.2": (Form("dense"), Form("sparse"), Form("shared", 1, given=True)),
    "V4": (Form("dense"), Form("window"), Form("4", 1), Form("128", 2)),
}


@dataclass(frozen=True)
class Row:
    """A line of the table; sizes in MiB, times in ms.

    error   the largest of all tokens
    swaps   chosen rows that float64 would not have chosen, per token; None without an indexer
    far     the largest distance of a swapped row from the border
    bounds  of `error` and `far`
    states  the layer's cache
    arena   what a run needs besides weights and states
    peak    scores and copies of rows in memory at once
    gains   times of the dense form divided by `prompt` and `token`
    equal   whether both runs gave the same bits
    """

    model: str
    form: str
    depth: int
    cache: str
    error: float
    swaps: float | None
    far: float
    bounds: tuple[float, float]
    states: float
    arena: float
    peak: float
    prompt: float
    token: float
    gains: tuple[float, float]
    equal: bool

    @property
    def ok(self) -> bool:
        error, far = self.bounds
        return self.error <= error and self.far <= far and self.equal


class Case:
    """The graphs of a form at a depth, and their memory."""

    def __init__(self, bench: Bench, form: Form, depth: int, cache_type: str) -> None:
        self.bench, self.form, self.depth = bench, form, depth
        self.options = Options(cache_k=cache_type, cache_i=cache_type)
        self.store = gg.Store(like=bench.store)
        self.arch: Any = bench.model.arch
        self.latent_dense = form.name == "dense" and isinstance(self.arch, DeepSeek32)
        if form.name == "dense" and isinstance(self.arch, DeepSeek4):
            self.arch = replace(self.arch, attn=replace(self.arch.attn, window=depth))
        cache = self.arch.cache(form.il, depth, bench.n_batch, self.options)
        self.cache = Cache(cache.states[:1]) if self.latent_dense else cache
        #: The first token whose output is computed.
        self.start = depth - bench.n_prompt - bench.n_tokens

    def attention(self, n_tokens: int) -> tuple[gg.Node, Batch]:
        """The output of so many tokens, and their batch."""
        x = gg.input("x", "f32", ne=(self.arch.n_embd, n_tokens))
        batch = Batch(n_tokens, self.depth, self.options, padded=False)
        layer = self.bench.model.layer(self.form.il)
        if self.latent_dense:
            a, rotate = self.arch.mla_numbers, self.arch.rotation(batch)
            form = self.arch.form(batch)
            return mla(layer, x, self.cache, batch, a, rotate, form=form), batch
        if self.form.given and self.depth > (k := self.arch.indexer.top_k):
            batch.chosen = gg.input("ids", "i32", ne=(k, n_tokens))
        return self.arch.attention(x, layer, self.cache, batch), batch

    def plan(self, n_tokens: int, observe: Sequence[str] = ()) -> gg.Plan:
        y, _ = self.attention(n_tokens)
        return self.compile({"y": y}, observe=observe).bind()

    def compile(self, outputs: dict[str, gg.Node], **more: Any) -> gg.Plan:
        return gg.compile(outputs, backends=[self.bench.backend], store=self.store, **more)

    def fill(self) -> None:
        """Write the tokens before `start` to the cache."""
        plans: dict[int, gg.Plan] = {}
        for first in range(0, self.start, self.bench.n_batch):
            pos = np.arange(first, min(first + self.bench.n_batch, self.start), dtype=np.int32)
            if len(pos) not in plans:
                _, batch = self.attention(len(pos))
                plans[len(pos)] = self.compile({}, updates=batch.writes)
            plans[len(pos)].run(x=self.bench.x[self.form.il, pos], pos=pos)

    def inputs(self, tokens: slice, ids: NDArray[Any] | None) -> dict[str, NDArray[Any]]:
        """The inputs of a run of these tokens, counted from `start`."""
        pos = np.arange(self.start, self.depth, dtype=np.int32)[tokens]
        inputs = {"x": self.bench.x[self.form.il, pos], "pos": pos}
        return inputs if ids is None else inputs | {"ids": ids[tokens]}


class Bench:
    """The layers of a file, their inputs, and their rows in float64."""

    def __init__(self, name: str, model: Model, file: gguf.GGUFFile, args: Any) -> None:
        self.name, self.model, self.store = name, model, gg.Store()
        self.n_prompt, self.n_tokens, self.backend = args.prompt, args.tokens, args.backend
        self.n_batch = max(BATCH, args.prompt + args.tokens)
        n_layer = model.arch.n_layer
        rng = np.random.default_rng(args.seed)
        ne = n_layer, max(args.depths), model.arch.n_embd
        self.x = rng.standard_normal(ne, dtype=np.float32)
        kind: Any = CompressedLayer if isinstance(model.arch, DeepSeek4) else SparseLayer
        self.layers = [kind.of(file, il) for il in range(n_layer)]
        self.rows = [layer.rows(x.astype("f8")) for layer, x in zip(self.layers, self.x)]

    def measure(
        self, case: Case, ids: NDArray[Any] | None, dense: Row | None
    ) -> tuple[Row, NDArray[Any] | None]:
        """The row of a case, and the rows that it chose for each token.

        ids  the rows of a form that does not choose them itself
        """
        choice = self.choice(case)
        case.fill()
        parts = [slice(0, self.n_prompt)]
        parts += [slice(i, i + 1) for i in range(self.n_prompt, self.n_prompt + self.n_tokens)]
        inputs = [case.inputs(part, ids) for part in parts]
        plans = case.plan(self.n_prompt), case.plan(1)
        first = outputs(plans, inputs)["y"]
        # The second run writes the same rows, and returns its choice, too.
        observe = [] if choice is None else ["top_k-*"]
        second = outputs((case.plan(self.n_prompt, observe), case.plan(1, observe)), inputs)
        if choice is not None:
            ids = second[f"top_k-{case.form.il}"]
        expected, swaps, far = self.expected(case, choice, ids)
        prompt, token = (1e3 * fastest(*pair) for pair in zip(plans, (inputs[0], inputs[-1])))
        memory = [plan.memory for plan in plans]
        cache = case.options.cache_k
        row = Row(
            self.name, case.form.name, case.depth, cache,
            error=float(np.max([relative_error(*pair) for pair in zip(first, expected)])),
            swaps=swaps, far=far, bounds=BOUNDS[cache],
            states=sum(state.spec.nbytes for state in case.cache.states) / MIB,
            arena=max(each.compute for each in memory) / MIB,
            peak=max(each.score_peak for each in memory) / MIB,
            prompt=prompt, token=token,
            gains=(dense.prompt / prompt, dense.token / token) if dense else (1.0, 1.0),
            equal=np.array_equal(first, second["y"]),
        )  # fmt: skip
        return row, ids

    # -- float64 ------------------------------------------------------------------------------

    def last(self, case: Case) -> tuple[Any, Any, Any]:
        """The layer, its input for the tokens whose output is computed, and the rows of all."""
        il = case.form.il
        x = self.x[il, case.start : case.depth].astype("f8")
        return self.layers[il], x, self.rows[il].first(case.depth)

    def choice(self, case: Case) -> Choice | None:
        """The choice of an indexer; None for a form that sees all rows."""
        layer, x, rows = self.last(case)
        top_k = layer.k["attention.indexer.top_k"]
        if case.form.name not in ("sparse", "4") or len(rows.index_keys) <= top_k:
            return None
        return best_f64(layer.scores(x, rows), top_k)

    def expected(
        self, case: Case, choice: Choice | None, ids: NDArray[Any] | None
    ) -> tuple[NDArray[Any], float | None, float]:
        """The output, `swaps` and `far`; the tokens attend to those of the rows `ids` that they
        see."""
        layer, x, rows = self.last(case)
        seen = layer.visible(x, rows)
        if ids is not None:
            listed = np.zeros_like(seen)
            np.put_along_axis(listed, ids, True, axis=1)
            seen &= listed
        if isinstance(layer, CompressedLayer):
            layer.window = case.arch.attn.window
        swaps = (None, 0.0) if choice is None else choice.swaps(seen)
        return layer.attention(x, rows, seen), *swaps

    # -- the table ----------------------------------------------------------------------------

    def table(self, depths: Sequence[int], types: Sequence[str]) -> Iterator[Row]:
        for cache, depth in product(types, depths):
            ids, dense = None, None
            for form in FORMS[self.name]:
                case = Case(self, form, depth, cache)
                row, chosen = self.measure(case, ids if form.given else None, dense)
                ids, dense = chosen, dense or row
                yield row


def outputs(
    plans: tuple[gg.Plan, gg.Plan], inputs: Sequence[dict[str, NDArray[Any]]]
) -> dict[str, NDArray[Any]]:
    """The outputs of the part of a prompt and of the tokens after it."""
    runs = [plans[i > 0].run(each) for i, each in enumerate(inputs)]
    return {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}


def fastest(plan: gg.Plan, inputs: dict[str, NDArray[Any]]) -> float:
    """Seconds of the fastest of a few runs."""
    return min(plan.time(inputs, 1) for _ in range(3))


# -- the layers -----------------------------------------------------------------------------------


def layers(name: str, n_embd: int, cut: int) -> Architecture:
    """Layers with 1/cut of the heads, index heads and groups of heads. Attention uses neither the
    vocabulary nor the feed-forward net, so both are small."""
    small: dict[str, Any] = {"n_vocab": 259, "n_embd": n_embd, "n_ff": 32}
    if name == "V4":
        a, e = V4_FLASH.attn, V4_FLASH.experts
        small |= {"clamp": 3 * (10.0,), "clamp_shared": 3 * (10.0,)}
        return replace(
            V4_FLASH, n_block=3, ratios=(0, 4, 128), n_hash=0, n_stream=1, **small,
            experts=replace(e, n_ff=32, n_expert=1, n_used=1),
            attn=replace(
                a, n_head=a.n_head // cut, n_index=a.n_index // cut, n_group=a.n_group // cut
            ),
        )  # fmt: skip
    whole, n_block = {"V3.2": (V32, 1), "GLM-5.2": (GLM_52, 2)}[name]
    indexer = replace(whole.indexer, n_head=whole.indexer.n_head // cut)
    small |= {"n_block": n_block, "n_layer_dense": n_block, "n_head": whole.n_head // cut}
    if isinstance(whole, GlmDsa):
        small["types"] = (True, False)
    return replace(whole, indexer=indexer, **small)


# -- output ---------------------------------------------------------------------------------------

HEADS = {
    "model": "", "form": "", "cache": "", "depth": "", "error": "", "swaps": "a token",
    "states": "MiB", "arena": "MiB", "peak": "MiB", "prompt": "ms", "": "", "token": "ms", " ": "",
}  # fmt: skip
WIDTHS = 7, 6, 5, 6, 7, 7, 7, 7, 7, 8, 6, 8, 6


def line(texts: Iterable[str]) -> str:
    aligned = (f"{t:<{w}}" if i < 3 else f"{t:>{w}}" for i, (t, w) in enumerate(zip(texts, WIDTHS)))
    return "  ".join(aligned).rstrip()


def cells(row: Row) -> list[str]:
    prompt, token = (f"{gain:.1f}x" for gain in row.gains)
    return [
        row.model, row.form, row.cache, str(row.depth), f"{row.error:.1e}",
        "-" if row.swaps is None else f"{row.swaps:.1f}",
        f"{row.states:.2f}", f"{row.arena:.2f}", f"{row.peak:.2f}" if row.peak else "-",
        f"{row.prompt:.1f}", prompt, f"{row.token:.2f}", token,
    ]  # fmt: skip


def problems(row: Row) -> str:
    error, far = row.bounds
    texts = {
        f"error above {error:g}": not row.error <= error,
        f"a swapped row is {row.far:.1e} from the border": not row.far <= far,
        "two runs differ": not row.equal,
    }
    return "".join(f"  FAILED: {text}" for text, wrong in texts.items() if wrong)


def header(args: argparse.Namespace) -> str:
    whole = {"V3.2": V32.n_head, "GLM-5.2": GLM_52.n_head, "V4": V4_FLASH.attn.n_head}
    heads = ", ".join(f"{whole[name] // args.cut} ({name})" for name in args.models)
    return (
        f"n_embd {args.n_embd}, random {args.weights} weights, 1/{args.cut} of the heads: {heads}. "
        "Head sizes and chosen rows are\nthose of the models. At each depth a part of a prompt "
        f"({args.prompt}) and {args.tokens} tokens; seed {args.seed}, {args.backend}"
    )


def verdict(rows: Sequence[Row]) -> str:
    bounds = {row.cache: row.bounds for row in rows}
    errors = ", ".join(f"{error:g} ({cache})" for cache, (error, _) in bounds.items())
    bad = sum(not row.ok for row in rows)
    goal = f"errors within {errors}, swapped rows next to the border, bit-equal runs."
    return (
        f"{bad} of {len(rows)} rows FAILED. Required: {goal}"
        if bad
        else f"All {len(rows)} rows have {goal}"
    )


def plot(rows: Sequence[Row], path: str) -> None:
    """Draw the time of a token and the memory of each form by depth, for one cache type."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = [row for row in rows if row.cache == rows[0].cache]
    models = list(dict.fromkeys(row.model for row in rows))
    figure = Figure(figsize=(4 * len(models), 6.4), layout="constrained")
    grid = figure.subplots(2, len(models), sharex=True, sharey="row", squeeze=False)
    for model, column in zip(models, grid.T):
        for form in dict.fromkeys(row.form for row in rows if row.model == model):
            of_form = [row for row in rows if (row.model, row.form) == (model, form)]
            depths = [row.depth for row in of_form]
            name = f"ratio {form}" if form.isdigit() else form
            style: dict[str, Any] = {"marker": "o", "label": name}
            style |= {"color": "0.5", "linestyle": "--"} if form == "dense" else {}
            column[0].plot(depths, [row.token for row in of_form], **style)
            column[1].plot(depths, [row.states + row.arena for row in of_form], **style)
        column[0].set_title(f"{model}, {rows[0].cache} cache")
        column[1].set_xlabel("tokens in the cache")
        for axes in column:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(depths, [f"{depth:,}" for depth in depths], minor=False)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.margins(x=0.12)
            axes.grid(color="0.9")
            axes.spines[["top", "right"]].set_visible(False)
        column[0].legend(loc="upper left", frameon=False)
    grid[0, 0].set_ylabel("one token [ms]")
    grid[1, 0].set_ylabel("cache and arena [MiB]")
    figure.savefig(path, dpi=120)


# -- the command ----------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--depths", default="1024,4096,16384", metavar="N,..", help="(default: %(default)s)")
    add("--types", default="f16,q8_0", help=f"cache types, some of {','.join(BOUNDS)}")
    add("--models", default=",".join(FORMS), help="some of %(default)s")
    add("--n-embd", type=int, default=512, metavar="N", help="input size (default: %(default)s)")
    add("--cut", type=int, choices=(1, 2, 4, 8), default=4, help="1/N of the heads (default: 4)")
    add("--weights", default="f32", metavar="TYPE", help="of the matrices (default: f32)")
    add("--prompt", type=int, default=16, metavar="N", help="tokens of a part (default: 16)")
    add("--tokens", type=int, default=4, metavar="N", help="single tokens (default: 4)")
    add("--seed", type=int, default=0, help="seed of weights and tokens (default: 0)")
    add("--backend", default="numpy", help="place to run on (default: numpy)")
    add("--quick", action="store_true", help="smaller defaults of all sizes, for tests")
    add("--json", metavar="FILE", help="write the rows to FILE")
    add("--plot", metavar="FILE", help="draw time and memory to FILE (needs the extra 'plot')")
    args = parser.parse_args(argv)
    if args.quick:
        quick = {"depths": "256,2304", "types": "f16", "cut": 8, "n_embd": 128}
        parser.set_defaults(**quick, prompt=4, tokens=2)
        args = parser.parse_args(argv)
    for name, known in (("types", BOUNDS), ("models", FORMS)):
        setattr(args, name, getattr(args, name).split(","))
        if unknown := set(getattr(args, name)) - set(known):
            parser.error(f"--{name}: no {unknown.pop()!r}; choose from {', '.join(known)}")
    try:
        args.depths = [int(text) for text in args.depths.split(",")]
    except ValueError:
        parser.error(f"--depths {args.depths!r} must be numbers with commas between them")
    if min(args.prompt, args.tokens, args.n_embd) < 1 or args.seed < 0:
        parser.error("--prompt, --tokens and --n-embd must be at least 1, --seed not negative")
    least = args.prompt + args.tokens
    if min(args.depths) < least:
        parser.error(f"--depths must be at least {least}: --prompt plus --tokens")
    if args.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: install the extra 'plot'")
    return args


def run(args: argparse.Namespace, folder: str) -> int:
    head = header(args)
    print(head, line(HEADS), line(HEADS.values()), sep="\n", flush=True)
    rows = []
    for name in args.models:
        path = Path(folder) / f"{name}.gguf"
        arch = layers(name, args.n_embd, args.cut)
        synth(path, arch, dtype=args.weights, seed=args.seed)
        with gguf.open(path) as file:
            bench = Bench(name, Model(file), file, args)
            for row in bench.table(args.depths, args.types):
                print(line(cells(row)) + problems(row), flush=True)
                rows.append(row)
    print(verdict(rows))
    if args.json:
        table = {"header": head, "rows": [{**asdict(row), "ok": row.ok} for row in rows]}
        Path(args.json).write_text(json.dumps(table, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)
    return 0 if all(row.ok for row in rows) else 1


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        with TemporaryDirectory() as folder:
            return run(args, folder)
    except (gg.PyggmlError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

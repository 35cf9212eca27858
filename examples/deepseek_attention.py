"""DeepSeek attention in every form, with and without a memory budget, compared with float64.

Each run fills a cache with a prompt and then decodes tokens one by one. Everything runs twice. A
row of the table is a form of attention (standard, latent or expanded) with or without flash
attention (FA), a cache type, and an attention memory budget (amb). Its error is the larger of the
prompt's and the decoded tokens'.

Without --model, the example first writes a file with one V2-Lite layer and random weights.

    python examples/deepseek_attention.py
    python examples/deepseek_attention.py --types f16 --plot arena.png --json rows.json

The exit status is 0 if every error is within its bound, every score peak is within its amb, and the
two runs are bit-equal. Otherwise it is 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

import pyggml as gg
from pyggml import gguf
from pyggml.backends.step import LoopStep
from pyggml.dtypes import dtype
from pyggml.graph import precise
from pyggml.models.batch import Batch, Options
from pyggml.models.deepseek2 import DeepSeek2
from pyggml.models.layers import norm
from pyggml.models.model import Model
from pyggml.models.presets import V2_LITE
from pyggml.models.synth import synth
from pyggml.parity.tolerance import relative_error

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for the float64 reference

from tests.reference.deepseek import attention_f64

MIB = 2**20
#: Bounds of the relative error of the layer's output, by precision and cache type.
BOUNDS = {
    "default": {"f32": 1e-2, "f16": 1e-2, "bf16": 2e-2, "q8_0": 3e-2},
    "f32": {"f32": 1e-3, "f16": 1e-3, "bf16": 1e-2, "q8_0": 2e-2},
}
FORMS = [(form, flash) for form in ("standard", "latent", "expanded") for flash in (True, False)]


@dataclass(frozen=True)
class Variant:
    """How the layer attends."""

    form: str
    flash: bool
    cache_type: str

    @property
    def options(self) -> Options:
        mla = {"standard": 0, "latent": 1, "expanded": 3}[self.form]
        return Options(
            mla=mla, expand_from=2, flash=self.flash, cache_k=self.cache_type,
            cache_v=self.cache_type,
        )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of the table; sizes in MiB, times in ms.

    amb    None without a budget
    live   bytes of the prompt's arena in use at each of its steps
    equal  whether both runs gave the same bits
    """

    form: str
    flash: bool
    cache: str
    amb: float | None
    cut: str
    error: float
    peak: float
    arena: float
    prompt: float
    decode: float
    live: tuple[int, ...]
    bound: float
    equal: bool

    @property
    def ok(self) -> bool:
        within = self.amb is None or self.peak <= self.amb
        return self.error <= self.bound and within and self.equal


@dataclass(frozen=True)
class Absent:
    """A line for a combination that does not exist."""

    form: str
    flash: bool
    cache: str
    why: str


class Bench:
    """One layer, one sequence of tokens, and its output in float64."""

    def __init__(self, file: gguf.GGUFFile, args: argparse.Namespace) -> None:
        model = Model(file)
        if not isinstance(model.arch, DeepSeek2):
            raise gg.GGUFError(f"{file.paths[0]}: the example is for architecture deepseek2")
        self.config, self.layer = model.arch, model.layer(args.layer)
        self.n_prompt, self.n_kv, self.backend = args.prompt, args.n_kv, args.backend
        self.prec = args.prec
        rng = np.random.default_rng(args.seed)
        n_tokens = args.prompt + args.decode
        self.x = rng.standard_normal((n_tokens, self.config.n_embd), dtype=np.float32)
        self.pos = np.arange(n_tokens, dtype=np.int32)
        self.expected = reference(file, self.config, args.layer, self.x, self.pos)

    def plan(self, variant: Variant, n_tokens: int, amb: float | None, store: gg.Store) -> gg.Plan:
        c = self.config
        x = gg.input("x", "f32", ne=(c.n_embd, n_tokens))
        batch = Batch(n_tokens, self.n_kv, variant.options, padded=False)
        cache = c.cache(self.layer.il, self.n_kv, n_tokens, variant.options)
        y = c.attention(norm(self.layer, "attn_norm", x, c.rms_eps), self.layer, cache, batch)
        graph = gg.Graph({"y": y})
        outputs = (graph if self.prec == "default" else precise(graph)).outputs
        return gg.compile(outputs, backends=[self.backend], amb=amb, store=store)

    def plans(self, variant: Variant, amb: float | None) -> tuple[gg.Plan, gg.Plan]:
        """Plans for the prompt and for one token. After an expanded prompt, decoding is latent."""
        store = gg.Store()
        return self.plan(variant, self.n_prompt, amb, store), self.plan(variant, 1, amb, store)

    def budgets(self, variant: Variant) -> list[float | None]:
        """None, and three budgets in MiB.

        They are the score peak of the whole prompt, the least budget plus a third of the difference
        to that peak, and one that cuts even a single head into pieces. [None] without scores.
        """
        whole = self.plans(variant, None)[0].memory.score_peak
        if not whole:
            return [None]
        least, peak = 0.0, whole
        try:
            self.plans(variant, 1 / MIB)
        except gg.BudgetError as error:
            least = error.least
        # A budget one byte below the peak forces finer pieces. Repeat until single heads are cut.
        while (peak - 1) / MIB >= least:
            finer = self.plans(variant, (peak - 1) / MIB)[0]
            if not re.fullmatch("heads [0-9x]+", pieces(finer, variant)):
                break
            peak = finer.memory.score_peak
        return [None, whole / MIB, least + (whole / MIB - least) / 3, (least + peak / MIB) / 2]

    def run(self, prompt: gg.Plan, single: gg.Plan) -> tuple[Any, float, float]:
        """Outputs of all tokens, seconds of the prompt, seconds of the fastest token."""
        runs = [(prompt, slice(self.n_prompt))]
        runs += [(single, slice(i, i + 1)) for i in range(self.n_prompt, len(self.x))]
        outputs, seconds = [], []
        for plan, tokens in runs:
            start = time.perf_counter()
            outputs.append(plan.run(x=self.x[tokens], pos=self.pos[tokens])["y"])
            seconds.append(time.perf_counter() - start)
        return np.concatenate(outputs), seconds[0], min(seconds[1:])

    def measure(self, variant: Variant, amb: float | None) -> Row:
        prompt, single = (plan.bind() for plan in self.plans(variant, amb))
        # In the second run, the cache has the rows of the first, but the mask hides them.
        first, *_ = self.run(prompt, single)
        second, prompt_s, decode_s = self.run(prompt, single)
        parts = slice(self.n_prompt), slice(self.n_prompt, None)
        return Row(
            variant.form,
            variant.flash,
            variant.cache_type,
            amb,
            pieces(prompt, variant),
            max(relative_error(second[part], self.expected[part]) for part in parts),
            max(plan.memory.score_peak for plan in (prompt, single)) / MIB,
            max(plan.memory.compute for plan in (prompt, single)) / MIB,
            1e3 * prompt_s,
            1e3 * decode_s,
            prompt.memory.live,
            BOUNDS[self.prec][variant.cache_type],
            np.array_equal(first, second),
        )

    def rows(self, types: Sequence[str]) -> Iterator[Row | Absent]:
        for form, flash in FORMS:
            if (form, flash) == ("expanded", False):
                yield Absent(form, flash, "-", "expanded needs flash attention")
                continue
            c = self.config
            sizes = (c.d_k, c.d_v) if form == "standard" else (c.kv_lora_rank + c.n_rot,)
            for cache_type in types:
                misfits = [n for n in sizes if n % dtype(cache_type).block]
                if misfits:
                    reason = f"a row of {misfits[0]} is not whole blocks"
                    yield Absent(form, flash, cache_type, reason)
                    continue
                variant = Variant(form, flash, cache_type)
                for amb in self.budgets(variant):
                    yield self.measure(variant, amb)


def pieces(plan: gg.Plan, variant: Variant) -> str:
    """How the budget cut the attention: number x size of the pieces of heads, rows or keys."""
    heads, rows = (1, 2) if variant.flash else (2, 1)
    names = {heads: "heads", rows: "rows", "kv": "keys"}
    loops = [step.loop for step in plan.steps if isinstance(step, LoopStep)]
    cuts = [
        f"{names[axis]} {dim.count}x{dim.step}"
        for loop in loops
        for axis, dim in zip(loop.fill, loop.dims)
    ]
    return ", ".join(cuts) or "whole"


# -- the float64 reference ----------------------------------------------------------------------


def reference(
    file: gguf.GGUFFile, config: DeepSeek2, il: int, x: Any, pos: Any
) -> np.ndarray[Any, Any]:
    """The layer in float64, with weights decoded by the gguf package and no code of pyggml's."""
    prefix = f"blk.{il}."
    weights = {
        name.removeprefix(prefix): float64(file, name)
        for name in file.tensors
        if name.startswith(f"{prefix}attn_")
    }
    x = x.astype(np.float64)
    x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + config.rms_eps)
    return attention_f64(
        weights,
        x * weights["attn_norm.weight"],
        pos,
        n_head=config.n_head,
        qk_nope=config.d_nope,
        qk_rope=config.n_rot,
        v_dim=config.d_v,
        kv_lora=config.kv_lora_rank,
        eps=config.rms_eps,
        kq_scale=config.kq_scale,
        freq_base=config.rope.freq_base,
        freq_scale=config.rope.freq_scale,
        ext_factor=config.rope.ext_factor,
        attn_factor=config.rope_attn_factor,
        n_ctx_orig=config.rope.n_ctx_orig,
    )


def float64(file: gguf.GGUFFile, name: str) -> np.ndarray[Any, Any]:
    info, array = file.tensors[name], file.array(name)
    if info.dtype.numpy is None:
        raw = np.ascontiguousarray(array).view(np.uint8)
        array = dequantize(raw, GGMLQuantizationType(info.dtype.ggml_id))
    return array.astype(np.float64)


# -- output -------------------------------------------------------------------------------------

COLUMNS = "form", "", "cache", "amb", "score peak", "arena", "error", "prompt", "decode", "cut into"
UNITS = "", "", "", "MiB", "MiB", "MiB", "", "ms", "ms/token", "pieces x size"
WIDTHS = 8, 5, 5, 9, 10, 9, 8, 8, 8, 24


def line(cells: Sequence[str]) -> str:
    left = (0, 1, 2, 9)
    aligned = (
        text.ljust(width) if i in left else text.rjust(width)
        for i, (text, width) in enumerate(zip(cells, WIDTHS))
    )
    return "  ".join(aligned).rstrip()


def cells(row: Row | Absent) -> tuple[str, ...]:
    flash = "FA" if row.flash else "no FA"
    if isinstance(row, Absent):
        return (row.form, flash, row.cache, *"-" * 6, f"does not exist: {row.why}")
    amb = "none" if row.amb is None else f"{row.amb:.3f}"
    if not row.peak:
        amb = "-"
    return (
        row.form,
        flash,
        row.cache,
        amb,
        f"{row.peak:.3f}" if row.peak else "-",
        f"{row.arena:.2f}",
        f"{row.error:.1e}",
        f"{row.prompt:.1f}",
        f"{row.decode:.2f}",
        (row.cut if row.peak else "no scores to cut")
        + ("" if row.equal else "  TWO RUNS DIFFER")
        + ("" if row.ok else "  FAILED"),
    )


def header(bench: Bench, name: str, args: argparse.Namespace) -> str:
    c = bench.config
    q_lora = "" if c.q_lora_rank is None else f", q_lora {c.q_lora_rank}"
    return (
        f"{name} layer {args.layer}: n_embd {c.n_embd}{q_lora}, {c.n_head} heads, "
        f"standard {c.d_k}/{c.d_v}, latent {c.kv_lora_rank + c.n_rot}/{c.kv_lora_rank}, kv_b "
        f"{c.kv_b}; prompt {args.prompt}, decode {args.decode}, n_kv {args.n_kv}, "
        f"seed {args.seed}, prec {args.prec}, {args.backend}"
    )


def verdict(rows: Sequence[Row]) -> str:
    bounds = ", ".join(
        f"{bound:g} ({cache})" for cache, bound in {r.cache: r.bound for r in rows}.items()
    )
    bad = sum(not row.ok for row in rows)
    goal = f"errors within {bounds}, score peaks within amb, bit-equal runs."
    return (
        f"{bad} of {len(rows)} rows FAILED. Required: {goal}"
        if bad
        else f"All {len(rows)} rows have {goal}"
    )


def plot(rows: Sequence[Row], path: str) -> None:
    """Draw the arena use of the prompt's steps, with and without budget, for one cache type."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    bounded = [row for row in rows if row.peak and row.cache == rows[0].cache]
    groups = dict.fromkeys((row.form, row.flash) for row in bounded)
    figure = Figure(figsize=(4.5 * len(groups), 3.8), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(groups), sharey=True, squeeze=False)[0], groups):
        for row in (r for r in bounded if (r.form, r.flash) == group):
            mib = [n / MIB for n in row.live]
            if row.amb is None:
                axes.stairs(mib, label="none", color="0.85", fill=True)
            elif row.cut != "whole":
                axes.stairs(mib, label=f"{row.amb:.2f} MiB: {row.cut}", linewidth=1.8)
        axes.set_title(f"{group[0]}, {'FA' if group[1] else 'no FA'}, {rows[0].cache} cache")
        axes.set_xlabel("step of the prompt")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(title="amb", loc="upper left", alignment="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("arena in use [MiB]")
    figure.axes[0].set_ylim(top=1.45 * figure.axes[0].get_ylim()[1])  # room for the legends
    figure.savefig(path, dpi=120)


# -- the command --------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", metavar="FILE", help="a deepseek2 GGUF file (default: write one)")
    add("--layer", type=int, default=0, metavar="I", help="number of the layer (default: 0)")
    add("--prompt", type=int, default=512, metavar="N", help="tokens (default: %(default)s)")
    add("--decode", type=int, default=4, metavar="N", help="tokens (default: %(default)s)")
    add("--n-kv", type=int, metavar="N", help="rows of the cache (default: a multiple of 256)")
    add("--types", default="f16,q8_0", help=f"cache types, some of {','.join(BOUNDS['f32'])}")
    add("--prec", choices=tuple(BOUNDS), default="default", help="precision of ops that have one")
    add("--seed", type=int, default=0, help="seed of weights and tokens (default: 0)")
    add("--backend", default="numpy", help="place to run on (default: numpy)")
    add("--json", metavar="FILE", help="write the rows to FILE")
    add("--plot", metavar="FILE", help="draw the arena use to FILE (needs the extra 'plot')")
    args = parser.parse_args(argv)
    args.types = args.types.split(",")
    if unknown := set(args.types) - set(BOUNDS["f32"]):
        parser.error(f"no cache type {unknown.pop()!r}; choose from {', '.join(BOUNDS['f32'])}")
    if args.prompt < 1 or args.decode < 1 or args.seed < 0:
        parser.error("--prompt and --decode must be at least 1, --seed must not be negative")
    total = args.prompt + args.decode
    args.n_kv = args.n_kv if args.n_kv is not None else -(-total // 256) * 256
    if args.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: install the extra 'plot'")
    if args.n_kv < total:
        parser.error(f"--n-kv {args.n_kv} has no room for {total} tokens")
    return args


def lite(folder: str, seed: int) -> str:
    """A file with one layer of V2-Lite. Attention uses neither the vocabulary nor the feed-forward
    net, so both are small.
    """
    path = str(Path(folder) / "deepseek-v2-lite.gguf")
    config = replace(V2_LITE, n_block=1, n_vocab=256, n_ff=256)
    synth(path, config, dtype="q8_0", seed=seed)
    return path


def run(args: argparse.Namespace, path: str) -> int:
    with gguf.open(path) as file:
        return report(Bench(file, args), args, Path(path).name)


def report(bench: Bench, args: argparse.Namespace, name: str) -> int:
    head = header(bench, name, args)
    print(head, line(COLUMNS), line(UNITS), sep="\n", flush=True)
    rows = []
    for row in bench.rows(args.types):
        print(line(cells(row)), flush=True)
        if not isinstance(row, Absent):
            rows.append(row)
    if not rows:
        raise gg.ShapeError(
            f"no form of attention in this model can have a cache of type {', '.join(args.types)}"
        )
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
        if args.model:
            return run(args, args.model)
        with TemporaryDirectory() as folder:
            return run(args, lite(folder, args.seed))
    except (gg.PyggmlError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

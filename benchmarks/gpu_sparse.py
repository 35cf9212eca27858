"""Times of sparse attention on a GPU: parts of DeepSeek V3.2, and V4-Flash by kinds of layers.

    python benchmarks/gpu_sparse.py [parts | v4]

One token at 65,536 rows of f16 cache: 64 index heads of 128, 2,048 chosen rows, 128 heads of
576/512. Sets of caches take turns, so that they are not in the L2 cache.

sparse_indexer_n65536      share of a copy's bandwidth, by the bytes of the index cache
sparse_top_k_nN            us; torch_top_k_nN is PyTorch's, in any order of equal scores
sparse_list_n65536         us of attention to the listed rows
sparse_dense_n65536        us of attention to all rows
sparse_token_n65536        us of indexer, top_k and attention to the list, one after another
sparse_gain_n65536         sparse_dense / sparse_token
sparse_token_q8_0_n65536, sparse_gain_q8_0_n65536   the same with an index cache of q8_0
sparse_prompt_2048_n32768  TFLOP/s of the attention of 2,048 tokens to 2,048 rows each

V4-Flash with Q2_K weights at a depth of 8,192, by its kinds of layers, because the whole does not
fit on every card. The first two see a window, and their experts come from a table; 21 have ratio 4,
20 have ratio 128. A decode step reads other weights, caches and tokens in turn.

v4_decode_KIND, v4_prompt_KIND   us of a token, ms of 2,048 tokens: two layers less one layer.
                                 `head`: embedding, logits, and what a kind's layers compute once
v4_flash_decode, v4_flash_prompt t/s of head + 2 window + 21 ratio_4 + 20 ratio_128
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import pyggml as gg
from benchmarks.gpu_bench import (
    SMOKE,
    copies,
    copy_rates,
    node_microseconds,
    peer_microseconds,
    plan_microseconds,
    random_blocks,
    replays,
    write_clocks,
    write_row,
)
from pyggml.models.batch import Batch, Options
from pyggml.models.compressed import HEAVY, PLAIN, SPARSE
from pyggml.models.model import Model
from pyggml.models.presets import TINY_V4, V4_FLASH
from pyggml.models.synth import synth
from pyggml.ops.leaf import state_op

SMALL = bool(os.environ.get(SMOKE))
#: Rows of the cache, of a longer row for top_k, and at the prompt; chosen rows; heads.
N_KV, LONG, N_PROMPT, TOP_K, HEADS = (
    (512, 1000, 256, 64, 16) if SMALL else (65536, 163840, 32768, 2048, 128)
)
INDEX, INDEX_HEADS, ROW, VALUE = 128, 64, 576, 512
#: Calls in a graph.
TURNS = 20

#: name -> ratio and number of layers.
KINDS = {"window": (PLAIN, 2), "ratio_4": (SPARSE, 21), "ratio_128": (HEAVY, 20)}
#: Two layers of each kind.
MODEL = replace(
    TINY_V4 if SMALL else V4_FLASH,
    n_block=6, ratios=tuple(ratio for ratio, _ in KINDS.values() for _ in range(2)), n_hash=2,
    clamp=6 * (10.0,), clamp_shared=6 * (10.0,),
)  # fmt: skip
DEPTH, PROMPT = (512, 64) if SMALL else (8192, 2048)
#: Bytes of weights that a token reads in a layer.
READ = 80_000_000

#: Samples of a layer, and of what its kind computes once.
Times = tuple[list[float], list[float]]

rng = np.random.default_rng(0)


class Leaves:
    """Inputs by name, each made once, and their values."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._nodes: dict[str, gg.Node] = {}

    def f32(self, name: str, *ne: int) -> gg.Node:
        return self._leaf(name, "f32", ne, lambda: normal(ne))

    def f16(self, name: str, *ne: int) -> gg.Node:
        return self._leaf(name, "f16", ne, lambda: normal(ne).astype(np.float16))

    def q8_0(self, name: str, d: int, n: int) -> gg.Node:
        blocks = partial(random_blocks, "q8_0", n, d, rng)
        return self._leaf(name, "q8_0", (d, n), lambda: blocks().reshape(n, -1))

    def ids(self, name: str, n_rows: int, n_tokens: int) -> gg.Node:
        """TOP_K different rows for each token, in any order."""

        def lists() -> Any:
            rows = [rng.choice(n_rows, TOP_K, replace=False) for _ in range(n_tokens)]
            return np.stack(rows).astype(np.int32)

        return self._leaf(name, "i32", (TOP_K, n_tokens), lists)

    def _leaf(
        self, name: str, dtype: str, ne: tuple[int, ...], values: Callable[[], Any]
    ) -> gg.Node:
        if name not in self._nodes:
            self._nodes[name] = gg.input(name, dtype, ne=ne)
            self.values[name] = values()
        return self._nodes[name]


def normal(ne: tuple[int, ...]) -> Any:
    return rng.standard_normal(ne[::-1], np.float32)


# -- the parts of V3.2's attention ----------------------------------------------------------------


def scores(leaves: Leaves, i: int, cache: str = "f16") -> gg.Node:
    keys = leaves.f16(f"index{i % copies(2 * INDEX * N_KV)}", INDEX, N_KV)
    if cache != "f16":
        keys = leaves.q8_0(f"index{i % copies(34 * INDEX // 32 * N_KV)}_q8_0", INDEX, N_KV)
    queries, weights = f"queries{i}", f"weights{i}"
    return gg.lightning_indexer(
        leaves.f32(queries, INDEX, INDEX_HEADS, 1), keys, leaves.f32(weights, INDEX_HEADS, 1)
    )


def attention(leaves: Leaves, i: int, n_kv: int, ids: gg.Node | None, n_tokens: int = 1) -> gg.Node:
    """Latent attention of tokens to one of the caches."""
    rows = leaves.f16(f"rows{i % copies(2 * ROW * n_kv)}", ROW, n_kv)
    q = leaves.f32(f"q{i}", ROW, n_tokens, HEADS)
    return gg.flash_attn_ext(q, rows, gg.view(rows, ne=(VALUE, n_kv)), ids=ids, scale=ROW**-0.5)


def timed(leaves: Leaves, nodes: Sequence[gg.Node]) -> list[float]:
    """Microseconds of a node, and of all that it needs."""
    graph = gg.Graph({f"y{i}": node for i, node in enumerate(nodes)})
    names = {node.attrs["name"] for node in graph.nodes if node.op.leaf}
    return node_microseconds(nodes, {name: leaves.values[name] for name in names})


def parts() -> None:
    leaves, turns = Leaves(), range(TURNS)
    copy = median(copy_rates())
    times = timed(leaves, [scores(leaves, i) for i in turns])
    shares = [2 * INDEX * N_KV / t / 1e6 / copy for t in times]
    write_row(f"sparse_indexer_n{N_KV}", "of copy", shares)
    for n in (N_KV, LONG):
        rows = [gg.top_k(leaves.f32(f"scores{i}_{n}", n), k=TOP_K) for i in turns]
        write_row(f"sparse_top_k_n{n}", "us", timed(leaves, rows))
        write_row(f"torch_top_k_n{n}", "us", torch_top_k(n))
    listed = [attention(leaves, i, N_KV, leaves.ids(f"ids{i}", N_KV, 1)) for i in turns]
    write_row(f"sparse_list_n{N_KV}", "us", timed(leaves, listed))
    dense = timed(leaves, [attention(leaves, i, N_KV, None) for i in turns])
    write_row(f"sparse_dense_n{N_KV}", "us", dense)
    for cache, name in (("f16", ""), ("q8_0", "_q8_0")):
        token = tokens(leaves, cache)
        gains = [median(dense) / t for t in token]
        write_row(f"sparse_token{name}_n{N_KV}", "us", token)
        write_row(f"sparse_gain{name}_n{N_KV}", "times", gains, better="more")
    prompt()


def tokens(leaves: Leaves, cache: str) -> list[float]:
    """Microseconds of indexer, top_k and attention to the list, with an index cache of a type."""
    ids = [gg.top_k(scores(leaves, i, cache), k=TOP_K) for i in range(TURNS)]
    return timed(leaves, [attention(leaves, i, N_KV, ids[i]) for i in range(TURNS)])


def torch_top_k(n: int) -> list[float]:
    import torch

    rows = [torch.randn(n, device="cuda") for _ in range(TURNS)]
    return peer_microseconds([partial(torch.topk, row, TOP_K) for row in rows])


def prompt() -> None:
    leaves = Leaves()
    ids = leaves.ids("ids", N_PROMPT, PROMPT)
    times = timed(leaves, [attention(leaves, 0, N_PROMPT, ids, PROMPT)])
    work = 2.0 * PROMPT * HEADS * TOP_K * (ROW + VALUE)
    write_row(f"sparse_prompt_{PROMPT}_n{N_PROMPT}", "TFLOP/s", [work / t / 1e6 for t in times])


# -- V4-Flash -------------------------------------------------------------------------------------


def filled(y: gg.Node, batch: Batch, n_tokens: int) -> gg.Plan:
    """A plan with its own weights and random caches, which has run at the end of DEPTH."""
    plan = gg.compile({"y": y}, updates=batch.writes, backends=["cuda"])
    plan.bind()
    past = DEPTH - n_tokens
    for node in plan.graph.nodes:
        if node.op is not state_op:
            continue
        values: Any = rng.standard_normal(node.shape, np.float32)
        if node.dtype.name == "i32":  # 1 + the position in each row of a window's cache
            n = node.spec.elements
            values = (np.arange(n) + 1 + (past - 1 - np.arange(n)) // n * n).reshape(node.shape)
        plan.store.write(node.attrs["name"], values.astype(node.dtype.numpy))
    pos = np.arange(past, DEPTH)
    inputs: dict[str, Any] = {"tokens": rng.integers(0, MODEL.n_vocab, n_tokens), "pos": pos}
    if "x" in plan.inputs:
        inputs["x"] = rng.standard_normal(plan.inputs["x"].shape, np.float32)
    plan.run({name: inputs[name] for name in plan.inputs})
    return plan


def layers(model: Model, numbers: Sequence[int], n_tokens: int) -> gg.Plan:
    options = Options()
    batch = Batch(n_tokens, DEPTH, options, n_tokens, padded=False)
    x = gg.input("x", ne=(MODEL.n_embd, MODEL.n_stream, n_tokens))
    for il in numbers:
        cache = model.arch.cache(il, DEPTH, n_tokens, options)
        x = model.arch.layer(x, model.layer(il), cache, batch)
    return filled(x, batch, n_tokens)


def head(model: Model, n_tokens: int) -> gg.Plan:
    """Embedding and, for one token, logits."""
    batch = Batch(n_tokens, DEPTH, Options(), 1, padded=False)
    x = model.arch.begin(gg.get_rows(model.weights["token_embd"], batch.tokens))
    last = gg.view(x, ne=(*x.ne[:2], 1)) if n_tokens > 1 else x
    return filled(model.head(last), batch, n_tokens)


def kind_times(model: Model, number: int, n_tokens: int, clocks: str = "") -> Times:
    """Microseconds of a layer of kind `number`, and of what its kind computes once."""
    n_copies = copies(READ) if n_tokens == 1 else 1
    samples = []
    for count in (1, 2):
        numbers = range(2 * number, 2 * number + count)
        plans = [layers(model, numbers, n_tokens) for _ in range(n_copies)]
        samples.append(plan_microseconds(plans))
        if clocks and count == 2:
            write_clocks(clocks, replays(plans), median(samples[-1]))
        del plans
    one, two = samples
    each = [t - median(one) for t in two]
    return each, [t - median(each) for t in one]


def v4() -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "v4.gguf"
        synth(path, MODEL, dtype="q2_K")
        with gg.gguf.open(path) as file:
            model = Model(file, backends=["cuda"])
            v4_rows(model, "decode", 1, "us", 1.0)
            v4_rows(model, "prompt", PROMPT, "ms", 1e-3)


def v4_rows(model: Model, name: str, n_tokens: int, unit: str, scale: float) -> None:
    rest = plan_microseconds([head(model, n_tokens)])
    total = np.zeros(len(rest))
    for number, (kind, (_, n_layers)) in enumerate(KINDS.items()):
        clocks = f"v4_{name}" if kind == "ratio_4" else ""
        each, once = kind_times(model, number, n_tokens, clocks)
        write_row(f"v4_{name}_{kind}", unit, [scale * t for t in each])
        rest = [a + b for a, b in zip(rest, once)]
        total += n_layers * np.asarray(each)
    write_row(f"v4_{name}_head", unit, [scale * t for t in rest])
    rates = 1e6 * n_tokens / (total + np.asarray(rest))
    write_row(f"v4_flash_{name}", "t/s", rates.tolist())


def main() -> None:
    chosen = sys.argv[1:] or ["parts", "v4"]
    if "parts" in chosen:
        parts()
    if "v4" in chosen:
        v4()


if __name__ == "__main__":
    main()

"""What attention reads before it waits for the launch before: only what that one cannot write."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import sizeof
from typing import Any

import pytest

import pyggml as gg
from pyggml.backends.cuda.argument import Struct, Tensor
from pyggml.backends.cuda.attention.arguments import Attention, LatentArgument
from pyggml.backends.cuda.hyper_norm import Streams
from pyggml.backends.cuda.indexer import TokenIndexer
from pyggml.backends.cuda.launch import Launch
from pyggml.backends.cuda.recording import record_step
from pyggml.parity.patterns import pattern
from pyggml.runtime.kernels import planned_memory

NOTHING, QUERIES, ALL, SPANS = range(4)  # Early in overlap.cuh
D, N = 576, 256

cache = gg.state("cache", "f16", ne=(D, N))
q, ids = gg.input("q", ne=(D, 1, 16)), gg.input("ids", "i32", ne=(64, 1))
row = gg.input("row", ne=(D, 1))
at, pos = (gg.input(name, "i32", ne=(1,)) for name in ("at", "pos"))
written = gg.set_rows(cache, row, at)


def attention(q: gg.Node, k: gg.Node, ids: gg.Node | None = None, **more: gg.Node) -> gg.Node:
    return gg.flash_attn_ext(q, k, gg.view(k, ne=(512, N)), ids=ids, scale=0.1, **more)


def launches(graph: Mapping[str, gg.Node], *names: str) -> list[Launch]:
    """The launches of a graph whose kernels' names begin so."""
    work = gg.compile(graph, backends=["cuda:0:24GiB"])._work
    places, arenas = planned_memory(work)
    arena = arenas["cuda:0"].ptr
    return [
        record
        for step, offset in zip(work.steps, work.placed.scratch_at)
        for record in record_step(step, places, (arena + offset, step.scratch))
        if isinstance(record, Launch) and record.name.startswith(names)
    ]


def early(*outputs: gg.Node, kind: type[Struct] = Attention) -> int:
    """What the last attention or indexer may read early."""
    launch = launches({f"y{i}": y for i, y in enumerate(outputs)}, "latent", "scores")[-1]
    argument: Any = kind.from_buffer_copy(launch.args)
    return int(getattr(argument, "a", argument).early)


def test_nothing_where_the_launch_before_is_not_known() -> None:
    assert early(attention(q, cache)) == NOTHING


@pytest.mark.parametrize(
    ("outputs", "most"),
    [
        ((gg.relu(row), attention(q, cache)), ALL),
        ((gg.relu(row), attention(gg.relu(q), cache)), NOTHING),
        ((gg.relu(row), attention(gg.reshape(gg.relu(q), ne=q.ne), cache)), NOTHING),
        ((attention(q, written),), QUERIES),
        ((gg.relu(row), attention(q, cache, ids)), ALL),
        ((attention(q, cache, gg.top_k(gg.input("s", ne=(N, 1)), k=64)),), QUERIES),
        ((gg.relu(row), attention(q, cache, kv_len=gg.add(at, at))), NOTHING),
        ((gg.relu(row), attention(q, cache, mask=gg.causal_mask(pos, n_kv=N))), ALL),
        ((attention(gg.relu(q), written, mask=gg.causal_mask(pos, n_kv=N)),), QUERIES),
        ((attention(gg.relu(q), cache, kv_len=at),), SPANS),
        ((gg.relu(row), attention(gg.relu(q), cache, ids, kv_len=at)), NOTHING),
    ],
    ids=(
        *("other", "queries", "reshaped", "cache", "listed", "list", "length", "causal"),
        *("token", "spans", "lists"),
    ),
)
def test_what_the_launch_before_writes_is_waited_for(
    outputs: tuple[gg.Node, ...], most: int
) -> None:
    assert early(*outputs) == most


def test_an_older_version_of_a_cache_is_waited_for_too() -> None:
    """The state is one block of memory, however its writes are named."""
    older = gg.set_rows(cache, row, at)
    newer = gg.set_rows(older, gg.relu(row), at)
    assert early(attention(q, newer)) == QUERIES


def test_a_survey_of_the_mask_is_the_launch_before() -> None:
    mask = gg.input("mask", "f16", ne=(N, 1))
    assert early(gg.relu(row), attention(q, cache, mask=mask)) == NOTHING


def test_nothing_behind_a_product_of_cublas() -> None:
    product = gg.mul_mat(gg.input("a", ne=(64, 300)), gg.input("b", ne=(64, 64)))
    assert early(product, attention(q, cache)) == NOTHING


def test_many_heads_read_all_or_nothing_early() -> None:
    """Keys of q8_0 are decoded by the launch before."""
    many, raw = gg.input("many", ne=(D, 1, 128)), gg.state("raw", "q8_0", ne=(D, N))
    for q, k, most in (
        (many, cache, ALL),
        (gg.relu(many), cache, NOTHING),
        (many, written, NOTHING),
        (gg.input("long", ne=(D, 300, 16)), raw, NOTHING),
    ):
        assert early(gg.relu(row), attention(q, k), kind=LatentArgument) == most


def test_an_indexer_waits_for_its_weights() -> None:
    k, weights = gg.input("k", "f16", ne=(128, N)), gg.input("w", ne=(64, 1))
    queries = gg.input("iq", ne=(128, 64, 1))
    for first, w, most in ((gg.relu(row), weights, ALL), (row, gg.relu(weights), NOTHING)):
        scores = gg.lightning_indexer(queries, k, w)
        assert early(*(x for x in (first, scores) if x is not row), kind=TokenIndexer) == most
    written = gg.set_rows(gg.state("rows", "f16", ne=(128, N)), gg.input("new", ne=(128, 1)), at)
    assert early(gg.lightning_indexer(queries, written, weights), kind=TokenIndexer) == QUERIES


def test_weights_of_mixes_are_read_early_and_streams_that_are_complete() -> None:
    """The launch before is not known; has computed x alone; has computed the streams too."""
    mixes = launches(pattern("hyper_connections").outputs, "hyper_mix")
    place = 8 + sizeof(Tensor)  # behind the sums and fn
    assert [Streams.from_buffer_copy(mix.args, place).early for mix in mixes] == [0, 2, 1]
    assert [mix.early for mix in mixes] == [False, True, True]

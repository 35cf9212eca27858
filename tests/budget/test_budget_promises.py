"""What the search promises whatever a graph needs: pieces that fit, never more with more memory,
and the least budget. Here the needs are random: more pieces may need more memory."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from attentions import Leaves
from checks import MIB, compiled, least_of, pieces
from test_budget_search import graph

import pyggml as gg
from pyggml import backends, passes
from pyggml.node import Node
from pyggml.passes import search as search_module
from pyggml.passes.budget import within_budget
from pyggml.passes.cut import Cut, Cuts, cut
from pyggml.passes.regions import Region, regions
from pyggml.passes.search import Search, Trial
from pyggml.passes.work import Work

SEEDS = [4, 13, 42, 56, 60, 82, 110, 113, 201]


def with_random_needs(seed: int) -> Search:
    """The search of a random graph in which each plan needs half to twice what it does."""

    def finish(work: Work) -> Work:
        done = passes.finish(work)
        share = random.Random(f"{seed} {work.graph}").uniform(0.5, 2)
        arenas = {
            device: replace(arena, score_peak=int(arena.score_peak * share))
            for device, arena in done.placed.arenas.items()
        }
        return replace(done, placement=replace(done.placed, arenas=arenas))

    work = Work(gg.compile(graph(seed)[0]).graph, (backends.get("numpy"),))
    return Search(work, regions(work.graph), finish)


def total(trial: Trial) -> int:
    return sum(choice.pieces for choice in trial.choices)


def budgets(search: Search, seed: int) -> list[int]:
    """From the least budget to more than the graph needs uncut."""
    rng = random.Random(seed)
    least, need = search.least().need, search.plain.need
    return sorted({least, need, *(rng.randint(least, 2 * need) for _ in range(30))})


@pytest.mark.parametrize("seed", SEEDS)
def test_a_larger_limit_never_gives_more_pieces_of_an_attention(seed: int) -> None:
    for choices in with_random_needs(seed).choices:
        least, whole = choices.least, choices.whole.need
        limits = sorted({least, whole, *(least + i * (whole - least) // 50 for i in range(50))})
        best = [choices.best(limit) for limit in limits]
        assert all(choice.need <= limit for choice, limit in zip(best, limits))
        assert all(choices.best(choice.need) == choice for choice in best)
        counts = [choice.pieces for choice in best]
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_larger_budget_never_gives_more_pieces(seed: int) -> None:
    search = with_random_needs(seed)
    trials = [search.fit(amb) for amb in budgets(search, seed)]
    counts = [total(trial) for trial in trials if trial is not None]
    assert len(counts) == len(trials)
    assert counts == sorted(counts, reverse=True)
    for amb, trial in zip(budgets(search, seed), trials):
        assert trial is not None and trial.need <= amb


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_fits_less_than_the_least_budget(seed: int) -> None:
    search = with_random_needs(seed)
    least = search.least().need
    assert search.fit(least) is not None
    assert all(search.fit(int(least * share)) is None for share in (0.5, 0.9, 0.99))
    assert search.fit(least - 1) is None


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("most", [1, 3, 10])
def test_the_least_budget_with_at_most_so_many_pieces_of_an_attention(seed: int, most: int) -> None:
    search = with_random_needs(seed)
    least = search.least_with(most)
    assert least.most <= most
    fit = search.fit(least.need)
    assert fit is not None and total(fit) <= total(least)
    for amb in (least.need - 1, int(0.9 * least.need)):
        below = search.fit(amb)
        assert below is None or below.most > most


# -- attentions that feed each other ----------------------------------------------------------


def second_softmax(at: Leaves, n_kv: int, d: int, n_q: int, heads: int, keys: str) -> Node:
    """The result of an attention goes into a second softmax and product."""
    k = at.state("k", d, n_kv, 1 if keys == "q8_0" else heads, dtype=keys)
    if keys == "q8_0":
        v = at.input("v", n_kv, d, 1, dtype="f16")
    else:
        v = gg.cont(gg.transpose(k))
    first = gg.mul_mat(v, gg.soft_max(gg.mul_mat(k, at.input("q", d, n_q, heads))))
    return gg.mul_mat(at.input("w", d, d), gg.soft_max(first))


@pytest.mark.parametrize(
    ("n_kv", "d", "n_q", "heads", "keys"),
    [
        (1, 32, 5, 2, "q8_0"),  # 98 % of the least budget compiled
        (6, 11, 8, 2, "f32"),  # the least budget was refused
    ],
)
def test_every_budget_from_the_least_on_compiles_and_none_below(
    n_kv: int, d: int, n_q: int, heads: int, keys: str
) -> None:
    outputs = {"y": second_softmax(Leaves(), n_kv, d, n_q, heads, keys)}
    need, least = gg.compile(outputs).memory.score_peak, least_of(outputs)
    most = None
    for amb in (*range(least, need, max(1, (need - least) // 40)), need):
        plan = compiled(outputs, amb)
        assert plan.memory.score_peak <= amb
        assert most is None or pieces(plan) <= most
        most = pieces(plan)
    assert most == 0
    for amb in range(least - 1, 0, -max(1, least // 40)):
        with pytest.raises(gg.BudgetError) as refusal:
            compiled(outputs, amb)
        assert refusal.value.least * MIB == least


def test_one_attention_does_not_change_how_another_is_cut() -> None:
    """Neither reaches into the other, whichever of them is a loop."""
    at = Leaves()
    y = second_softmax(at, 6, 11, 8, 2, "f32")
    first, second = regions(gg.compile({"y": y}).graph)
    assert first.out in second.counted
    assert not set(first.inside) & set(second.inside)


def test_a_long_chain_is_cut_once_for_each_size_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many limits the search tries: cutting takes most of the time."""
    at = Leaves()
    kq = gg.mul_mat(at.state("k", 8, 61, 6), at.input("q", 8, 9, 6))
    bias = at.input("bias", 61, 9, 6)
    for _ in range(50):
        kq = gg.add(kq, bias)
    late = gg.mul_mat(at.input("v", 61, 8, 6), gg.soft_max(kq))
    other = gg.mul_mat(at.state("k2", 8, 97, 6), at.input("q2", 8, 9, 6))
    early = gg.mul_mat(at.input("v2", 97, 8, 6), gg.soft_max(other))
    graph_of = gg.compile({"y": late, "early": early, "kept": gg.sum_rows(other)}).graph
    cuts: Counter[tuple[Node, Cuts]] = Counter()

    def counting(region: Region, axes: Cuts) -> Cut | None:
        cuts[region.out, axes] += 1
        return cut(region, axes)

    monkeypatch.setattr(search_module, "cut", counting)
    work = Work(graph_of, (backends.get("numpy"),), amb=1)
    with pytest.raises(gg.BudgetError):
        within_budget(work, passes.finish)
    assert len(cuts) > 2 and max(cuts.values()) == 1

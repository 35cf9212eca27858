"""The budget in whole graphs: their size, and several attentions in one."""

from __future__ import annotations

import re

import numpy as np
import pytest
from attentions import Latent, Leaves, Scores, counted
from checks import check_together, compiled, counts, layers, least_of

import pyggml as gg
from pyggml.backends.step import LoopStep
from pyggml.graph import toposort
from pyggml.node import Node
from tests.work import work


def sizes(plan: gg.Plan) -> tuple[int, int]:
    """The number of nodes and steps, loop bodies included."""
    bodies = [b for step in plan.steps if isinstance(step, LoopStep) for b in step.bodies]
    nodes = len(plan.graph.nodes) + sum(len(toposort([body.body.out])) for body in bodies)
    return nodes, len(plan.steps) + sum(len(body.steps) for body in bodies)


def with_pieces(outputs: dict[str, Node], need: int, n_pieces: int) -> gg.Plan:
    """The plan whose only loop has `n_pieces` pieces, or the next possible number."""
    low, high = least_of(outputs), need - 1
    while low < high:
        middle = (low + high) // 2
        total = np.prod(counts(compiled(outputs, middle))[0])
        low, high = (low, middle) if total <= n_pieces else (middle + 1, high)
    return compiled(outputs, low)


@pytest.mark.parametrize(
    ("what", "pieces"),
    [
        (Scores(300, 1, 2, 61), [(3,), (300,)]),
        (Scores(1, 1, 600, 13), [(3,), (300,)]),
        (Latent(300, 2, 31), [(3,), (300,)]),
        (Latent(1, 2, 9600), [(3,), (300,)]),
        (Scores(100, 2, 6, 31), [(100, 2), (100, 6)]),
    ],
)  # fmt: skip
def test_three_and_three_hundred_pieces_are_the_same_graph(
    what: Scores | Latent, pieces: list[tuple[int, ...]]
) -> None:
    outputs = {"y": what.build(Leaves())}
    need = gg.compile(outputs).memory.score_peak
    plans = [with_pieces(outputs, need, int(np.prod(count))) for count in pieces]
    assert [counts(plan) for plan in plans] == [[count] for count in pieces]
    assert sizes(plans[0]) == sizes(plans[1])
    outlines = {re.sub(r"\d+", "", str(plan.graph)) for plan in plans}
    assert len(outlines) == 1


def test_compiling_is_no_more_work_with_more_pieces() -> None:
    outputs = {"y": Scores(1, 1, 4096, 13).build(Leaves())}
    need, least = gg.compile(outputs).memory.score_peak, least_of(outputs)
    assert counts(compiled(outputs, least)) == [(4096,)]
    many, few = (work(lambda amb=amb: compiled(outputs, amb)) for amb in (least, need - 1))
    assert many < few


# -- several attentions -----------------------------------------------------------------------


def test_layers_of_different_sizes() -> None:
    """The least budget is that of the layer that needs most, in any order."""
    small, large = Scores(3, 1, 9, 31), Scores(3, 1, 9, 499, mask=(3, 1), max_bias=8.0)
    for order in ((small, large), (large, small), (small, Latent(3, 9, 97), large)):
        outputs, at = layers(*order)
        check_together(outputs, at)


def test_equal_layers_are_cut_alike() -> None:
    outputs, at = layers(*[Scores(6, 2, 9, 61, mask=(1, 1), sinks=True)] * 4)
    plans = check_together(outputs, at)
    assert counts(plans[0]) == counts(plans[0])[:1] * 4


def test_layers_that_differ_in_little_are_cut_on_their_own() -> None:
    """Scores of one size with different masks and ratios of heads, and a view in one of them."""
    outputs, at = layers(
        Scores(12, 1, 9, 61, mask=(12, 1)),
        Scores(12, 1, 9, 61, mask=(4, 1)),
        Scores(12, 3, 9, 61, mask=(1, 1)),
        Scores(12, 4, 9, 61, mask=(12, 1), max_bias=8.0),
        Scores(12, 1, 9, 61, mask=(3, 1), form="window"),
    )
    check_together(outputs, at, parts=12)


def two_alive(at: Leaves, n: tuple[int, int] = (61, 97)) -> dict[str, Node]:
    """Two attentions whose scores exist before either softmax.

    The second reads a cache before a write; the first can only finish after the write.
    """
    d, n_q, heads = 8, 9, 6
    old = at.state("cache", d, n[0], heads)
    ids = at.input("ids", n_q, dtype="i64", values=np.arange(n_q))
    new = gg.set_rows(old, at.input("fresh", d, n_q, heads), ids)
    kq_old = counted(gg.mul_mat(old, at.input("q0", d, n_q, heads)))
    kq_new = counted(gg.mul_mat(new, at.input("q1", d, n_q, heads)))
    outs = []
    for i, kq in enumerate((kq_new, kq_old)):
        soft = counted(gg.soft_max_ext(kq))
        outs.append(gg.mul_mat(at.input(f"v{i}", n[0], d, heads), soft))
    return {"y": gg.add(outs[0], outs[1])}


def test_scores_alive_together_share_the_budget() -> None:
    at = Leaves()
    outputs = two_alive(at)
    whole = gg.compile(outputs)
    order = [step.node.op.name for step in whole.steps]
    assert order.index("soft_max_ext") > order.index("mul_mat") + 1  # both products come first
    nbytes = 61 * 9 * 6 * 4
    assert whole.memory.score_peak >= 2 * nbytes
    apart = compiled(outputs, whole.memory.score_peak - 1)
    assert counts(apart) == [(), ()]  # loops of one piece, one after the other
    check_together(outputs, at, parts=12)


def test_scores_that_another_op_reads_too_count_with_the_loop() -> None:
    """The loop cannot free them: both together fit the budget, or it is refused."""
    at = Leaves()
    kq = counted(gg.mul_mat(at.input("k", 8, 61, 6), at.input("q", 8, 9, 6)))
    late = gg.mul_mat(at.input("v", 61, 8, 6), counted(gg.soft_max_ext(kq)))
    outputs = {"y": late, "sum": gg.sum_rows(kq)}
    check_together(outputs, at)


def test_pieces_shrink_if_scores_must_stay_next_to_their_loop() -> None:
    """A product that is computed before a write and read again after the other attention."""
    at = Leaves()
    old = at.state("cache", 8, 61, 6)
    ids = at.input("ids", 9, dtype="i64", values=np.arange(9))
    new = gg.set_rows(old, at.input("fresh", 8, 9, 6), ids)
    kept = counted(gg.mul_mat(old, at.input("q0", 8, 9, 6)))
    soft = counted(gg.soft_max_ext(counted(gg.mul_mat(new, at.input("q1", 8, 9, 6)))))
    late = gg.sum_rows(gg.mul_mat(at.input("v", 61, 8, 6), soft))
    early = gg.mul_mat(at.input("v0", 61, 8, 6), counted(gg.soft_max_ext(kept)))
    plans = check_together({"y": gg.mul(kept, late), "early": early}, at)
    assert any(counts(plan) for plan in plans)


def test_two_attentions_of_one_softmax() -> None:
    at = Leaves()
    kq = counted(gg.mul_mat(at.input("k", 8, 61, 3), at.input("q", 8, 9, 6)))
    soft = counted(gg.soft_max_ext(kq))
    values = [at.input(f"v{h}", 61, 8, h) for h in (3, 6)]
    check_together({"y": gg.add(*(gg.mul_mat(v, soft) for v in values))}, at)


def test_two_attentions_of_one_expansion() -> None:
    at = Leaves()
    first = Latent(4, 5, 97).build(at)
    q = at.input("other", 48, 5, 4)
    second = gg.flash_attn_ext(q, *first.src[1:3], scale=0.1)
    check_together({"y": gg.add(first, second)}, at)


def test_a_cache_is_written_before_its_loop_reads_it() -> None:
    at = Leaves()
    k, v = at.state("k", 8, 61, 6, dtype="f16"), at.state("v", 8, 61, 6, dtype="f16")
    ids = at.input("ids", 9, dtype="i64", values=np.arange(20, 29))
    k, v = (gg.set_rows(x, at.input(f"new{i}", 8, 9, 6), ids) for i, x in enumerate((k, v)))
    soft = counted(gg.soft_max_ext(counted(gg.mul_mat(k, at.input("q", 8, 9, 6)))))
    check_together({"y": gg.mul_mat(gg.permute(v, axes=(1, 0, 2, 3)), soft)}, at)

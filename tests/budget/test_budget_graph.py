"""The budget and whole graphs: size, several attentions, outputs inside, what is spared."""

from __future__ import annotations

import re
import time
import warnings

import numpy as np
import pytest
from attentions import Latent, Leaves, Scores, counted, run
from checks import Case, compiled, counts, error, least_of, loops
from tracing import measured_peak

import pyggml as gg
from pyggml.graph import toposort
from pyggml.node import Node


def sizes(plan: gg.Plan) -> tuple[int, int]:
    """Nodes and steps, those of loop bodies included."""
    bodies = [body for step in plan.steps for body in step.bodies]
    nodes = len(plan.graph.nodes) + sum(len(toposort([body.body.out])) for body in bodies)
    return nodes, len(plan.steps) + sum(len(body.steps) for body in bodies)


def with_pieces(outputs: dict[str, Node], need: int, wanted: int) -> gg.Plan:
    """The plan whose one loop has `wanted` pieces (or the next that there is)."""
    low, high = least_of(outputs), need - 1
    while low < high:
        middle = (low + high) // 2
        total = np.prod(counts(compiled(outputs, middle))[0])
        low, high = (low, middle) if total <= wanted else (middle + 1, high)
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


def test_compile_time_does_not_grow_with_the_pieces() -> None:
    def seconds(outputs: dict[str, Node], amb: int) -> float:
        best = 1e9
        for _ in range(5):
            start = time.perf_counter()
            compiled(outputs, amb)
            best = min(best, time.perf_counter() - start)
        return best

    outputs = {"y": Scores(1, 1, 4096, 13).build(Leaves())}
    need, least = gg.compile(outputs).memory.score_peak, least_of(outputs)
    assert counts(compiled(outputs, least)) == [(4096,)]
    assert seconds(outputs, least) < 5 * seconds(outputs, need - 1) + 0.02


# -- several attentions -----------------------------------------------------------------------


def layers(*kinds: Scores | Latent) -> tuple[dict[str, Node], Leaves]:
    """One attention after another, their results side by side in one output."""
    at = Leaves()
    total = None
    for i, kind in enumerate(kinds):
        at.prefix = f"l{i}."
        made = gg.sum_rows(gg.sqr(_flat(kind.build(at))))
        total = made if total is None else gg.add(total, made)
    assert total is not None
    return {"y": total}, at


def _flat(node: Node) -> Node:
    return gg.reshape(node, ne=(node.spec.elements,))


def check_together(outputs: dict[str, Node], at: Leaves, parts: int = 6) -> list[gg.Plan]:
    """All budgets from least to need: numbers, peak by address, refusal below."""
    whole = gg.compile(outputs)
    need, wanted = measured_peak(whole, at)
    assert need == whole.memory.score_peak
    least = least_of(outputs)
    plans = []
    for amb in [*range(least, need, max(1, (need - least) // parts)), need]:
        plan = compiled(outputs, amb)
        peak, out = measured_peak(plan, at)
        assert peak == plan.memory.score_peak <= amb
        for key, value in wanted.items():
            assert error(out[key], value) <= 1e-6
        plans.append(plan)
    with pytest.raises(gg.BudgetError) as refused:
        compiled(outputs, least - 1)
    assert refused.value.least * 2**20 == least
    assert not loops(plans[-1])
    return plans


def test_layers_of_different_sizes() -> None:
    """The least is that of the layer that needs most, whichever stands first."""
    small, large = Scores(3, 1, 9, 31), Scores(3, 1, 9, 499, mask=(3, 1), max_bias=8.0)
    for order in ((small, large), (large, small), (small, Latent(3, 9, 97), large)):
        outputs, at = layers(*order)
        check_together(outputs, at)


def test_equal_layers_are_cut_alike() -> None:
    outputs, at = layers(*[Scores(6, 2, 9, 61, mask=(1, 1), sinks=True)] * 4)
    plans = check_together(outputs, at)
    assert counts(plans[0]) == counts(plans[0])[:1] * 4


def test_layers_that_differ_in_little_are_cut_on_their_own() -> None:
    """Same sizes of scores; another mask, another ratio of heads, other heads, a view between."""
    outputs, at = layers(
        Scores(12, 1, 9, 61, mask=(12, 1)),
        Scores(12, 1, 9, 61, mask=(4, 1)),
        Scores(12, 3, 9, 61, mask=(1, 1)),
        Scores(12, 4, 9, 61, mask=(12, 1), max_bias=8.0),
        Scores(12, 1, 9, 61, mask=(3, 1), form="window"),
    )
    check_together(outputs, at, parts=12)


def two_alive(at: Leaves, n: tuple[int, int] = (61, 97)) -> dict[str, Node]:
    """Both score tensors exist before either softmax: the second reads a cache before a write,
    and the first can only be finished after it."""
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
    one = 61 * 9 * 6 * 4
    assert whole.memory.score_peak >= 2 * one
    apart = compiled(outputs, whole.memory.score_peak - 1)
    assert counts(apart) == [(), ()]  # loops of one piece, one after the other
    check_together(outputs, at, parts=12)


def test_scores_that_another_op_reads_too_count_with_the_loop() -> None:
    """The loop cannot free what somebody else reads: together within the budget, or refused."""
    at = Leaves()
    kq = counted(gg.mul_mat(at.input("k", 8, 61, 6), at.input("q", 8, 9, 6)))
    late = gg.mul_mat(at.input("v", 61, 8, 6), counted(gg.soft_max_ext(kq)))
    outputs = {"y": late, "sum": gg.sum_rows(kq)}
    check_together(outputs, at)


def test_pieces_shrink_where_scores_must_stay_beside_their_loop() -> None:
    """A product that is made before a write, and read once more after the other attention."""
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


# -- outputs inside ---------------------------------------------------------------------------


def inside() -> tuple[Leaves, dict[str, Node]]:
    at = Leaves()
    q, k = at.input("q", 8, 9, 6), at.input("k", 8, 61, 6)
    kq = gg.label(counted(gg.mul_mat(k, q)), "kq")
    soft = gg.label(counted(gg.soft_max_ext(gg.scale(kq, s=0.3))), "soft")
    y = gg.label(gg.mul_mat(at.input("v", 61, 8, 6), soft), "kqv")
    return at, {"kq": kq, "soft": soft, "y": y, "turned": gg.permute(kq, axes=(0, 2, 1, 3)),
                "copy": gg.reshape(soft, ne=(61 * 9, 6))}  # fmt: skip


@pytest.mark.parametrize("key", ["kq", "soft", "turned", "copy"])
def test_an_output_inside_exempts_its_attention(key: str) -> None:
    at, made = inside()
    wanted = run(gg.compile({k: made[k] for k in ("y", key)}), at)
    with pytest.warns(UserWarning, match="kqv stays whole") as heard:
        plan = gg.compile({"y": made["y"], key: made[key]}, amb=1e-9)
    assert len(heard) == 1
    assert heard[0].filename == __file__
    assert not loops(plan)
    out = run(plan, at)
    assert all(np.array_equal(out[k], wanted[k]) for k in wanted)


def test_observed_scores_are_exempt_and_other_attentions_are_not() -> None:
    at = Leaves()
    at.prefix = "a."
    first = Scores(6, 1, 9, 61).build(at)
    at.prefix = "b."
    q, k, v = at.input("q", 8, 9, 6), at.input("k", 8, 61, 6), at.input("v", 61, 8, 6)
    soft = gg.label(gg.soft_max_ext(gg.label(gg.mul_mat(k, q), "kq-1")), "soft-1")
    second = gg.sum_rows(_flat(gg.mul_mat(v, soft)))
    outputs = {"y": gg.add(_flat(first), second)}
    wanted = run(gg.compile(outputs), at)["y"]
    with pytest.warns(UserWarning, match="kq-1 is an output"):
        plan = gg.compile(outputs, observe=["kq-*"], amb=10000 / 2**20)
    assert len(loops(plan)) == 1
    out = run(plan, at)
    assert error(out["y"], wanted) <= 1e-6
    assert out["kq-1"].shape == (6, 9, 61)
    whole = gg.compile({"second": second}).memory.score_peak
    kept = 6 * 9 * 61 * 4  # kq-1 is not reused
    assert whole < plan.memory.score_peak <= whole + kept + 10000  # what is exempt is reported too


def test_an_expanded_key_as_an_output_exempts_too() -> None:
    at = Leaves()
    y = Latent(4, 5, 97).build(at)
    k = y.src[1]
    with pytest.warns(UserWarning, match="out stays whole"):
        plan = gg.compile({"y": y, "k": k}, amb=1e-9)
    assert not loops(plan)


def test_the_result_of_an_attention_as_an_output_is_no_exception() -> None:
    case = Case(Scores())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loops(compiled(case.outputs, case.need - 1))


# -- what is spared ---------------------------------------------------------------------------


def plain_flash() -> Node:
    q, k, v = (gg.input(n, "f32", ne=(16, t, 4)) for n, t in (("q", 9), ("k", 61), ("v", 61)))
    return gg.flash_attn_ext(q, k, v, scale=0.2)


def flash_on_a_cache() -> Node:
    """Views, permutes and writes of a state are no expansion."""
    cache = gg.state("cache", "q8_0", ne=(128, 61))
    ids = gg.input("ids", "i64", ne=(5,))
    cache = gg.set_rows(cache, gg.input("new", "f32", ne=(128, 5)), ids)
    heads = gg.permute(gg.reshape(cache, ne=(32, 4, 61)), axes=(0, 2, 1, 3))
    k = gg.view(heads, ne=(32, 61, 2))
    v = gg.view(heads, ne=(32, 61, 2), start=(0, 0, 2))
    return gg.flash_attn_ext(gg.input("q", "f32", ne=(32, 9, 4)), k, v, scale=0.2)


def fresh_keys() -> Node:
    """K and V of this run's tokens, from inputs: no state is in them."""
    x = gg.input("x", "f32", ne=(32, 61))
    w = gg.constant(np.ones((64, 32), np.float32), name="w")
    k = gg.permute(gg.reshape(gg.mul_mat(w, x), ne=(16, 4, 61)), axes=(0, 2, 1, 3))
    return gg.flash_attn_ext(gg.input("q", "f32", ne=(16, 9, 4)), k, k, scale=0.2)


def router() -> Node:
    """A softmax that chooses experts goes into no product."""
    x = gg.input("x", "f32", ne=(32, 9))
    gate = gg.constant(np.ones((8, 32), np.float32), name="gate")
    experts = gg.constant(np.ones((8, 16, 32), np.float32), name="experts")
    p = gg.soft_max(gg.mul_mat(gate, x))
    ids = gg.top_k(p, k=2)
    w = gg.get_rows(gg.reshape(p, ne=(1, 8, 9)), ids)
    return gg.mul_multi_add(gg.mul_mat_id(experts, gg.reshape(x, ne=(32, 1, 9)), ids), w)


@pytest.mark.parametrize("build", [plain_flash, flash_on_a_cache, fresh_keys, router])
def test_what_is_no_score_and_no_expansion_is_left_alone(build: object) -> None:
    y = build()  # type: ignore[operator]
    plain = gg.compile({"y": y})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = gg.compile({"y": y}, amb=1e-9)
    assert str(plan.graph) == str(plain.graph)
    assert plan.memory.score_peak == 0 == plain.memory.score_peak


def test_queries_whose_positions_are_a_state_are_no_keys() -> None:
    """In a recorded decode loop positions are a state: what they rotate is no expansion of it."""
    at = Leaves()
    pos = at.state("pos", 9, dtype="i32", values=np.arange(9, dtype=np.int32))
    q = gg.rope_ext(gg.permute(at.input("q", 8, 9, 6), axes=(0, 2, 1, 3)), pos, n_dims=8)
    kq = counted(gg.mul_mat(at.input("k", 8, 61, 6), gg.permute(q, axes=(0, 2, 1, 3))))
    y = {"y": gg.mul_mat(at.input("v", 61, 8, 6), counted(gg.soft_max_ext(kq)))}
    check_together(y, at)


def test_a_softmax_on_the_left_of_the_product_is_cut_too() -> None:
    q, k = gg.input("q", "f32", ne=(64, 300, 6)), gg.input("k", "f32", ne=(64, 1000, 2))
    v = gg.input("v", "f32", ne=(1000, 32, 6))
    y = gg.mul_mat(gg.soft_max_ext(gg.mul_mat(k, q), scale=0.1), v)  # [300, 32, 6]
    whole = gg.compile({"y": y})
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(x.shape, np.float32) for name, x in whole.inputs.items()}
    wanted = whole.run(values)["y"]
    for share, fills in ((2, 1), (9, 2)):
        amb = whole.memory.score_peak / share / 2**20
        plan = gg.compile({"y": y}, amb=amb)
        (loop,) = (step.loop for step in plan.steps if step.loop is not None)
        assert len(loop.fill) == fills and plan.memory.score_peak <= amb * 2**20
        difference = plan.run(values)["y"] - wanted
        assert np.linalg.norm(difference) <= 1e-6 * np.linalg.norm(wanted)

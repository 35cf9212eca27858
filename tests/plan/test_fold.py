"""Constants that are computed from constants: once, on the host, shared by the plans of a store."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from threading import enumerate as enumerate_threads
from time import sleep
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml.errors import GraphError, IdError
from pyggml.node import Node, label_of, labels
from pyggml.ops import leaf
from pyggml.ops.leaf import constant_op, data_of, source_of
from pyggml.passes.evaluate import value_of
from pyggml.passes.fold import GROWTH
from pyggml.runtime import derivations
from pyggml.runtime.plan import Plan

RNG = np.random.default_rng(0)
BIG = RNG.standard_normal((2048, 1024)).astype(np.float32)  # makes the others small next to it
SMALL = RNG.standard_normal((64, 64)).astype(np.float32)


def weights() -> tuple[Node, Node]:
    return gg.constant(BIG, name="big"), gg.constant(SMALL, dtype="q8_0", name="w")


def model(tokens: int, w: Node | None = None, **options: Any) -> Plan:
    """transpose(cast(w)) x, and a product with a large weight. `w` goes nowhere else."""
    big, small = weights()
    x, z = gg.input("x", ne=(64, tokens)), gg.input("z", ne=(1024, 1))
    y = gg.mul_mat(gg.transpose(gg.cast(small if w is None else w, dtype="f16")), x)
    return gg.compile({"y": y, "b": gg.mul_mat(big, z)}, **options)


def inputs(tokens: int) -> dict[str, Any]:
    return {"x": np.ones((tokens, 64), np.float32), "z": np.ones((1, 1024), np.float32)}


def ops(plan: Plan) -> list[str]:
    return [step.node.op.name for step in plan.steps]


def derived(plan: Plan) -> list[Node]:
    constants = (n for n in plan.graph.nodes if n.op is constant_op)
    return [n for n in constants if n.attrs["name"] is None]


@pytest.mark.parametrize("place", ["numpy", "null:0"])
def test_the_cast_of_a_weight_is_a_weight(place: str) -> None:
    plan, plain = model(3, backends=[place]), model(3, fuse=False)
    assert ops(plan) == ["mul_mat", "mul_mat"]
    assert sorted(ops(plain)) == ["cast", "mul_mat", "mul_mat"]
    f16, q8 = 64 * 64 * 2, 64 * 64 // 32 * 34
    if place == "numpy":  # a null device adds a header to each weight
        assert plan.memory.weights == BIG.nbytes + f16
        assert plain.memory.weights == BIG.nbytes + q8
    given, want = plan.run(inputs(3)), plain.run(inputs(3))
    for key in want:
        np.testing.assert_array_equal(given[key], want[key])


def test_planning_reads_nothing_and_binding_reads_once(monkeypatch: Any) -> None:
    count = 0

    def counted(node: Node, run: Any) -> Any:
        nonlocal count
        count += 1
        return value_of(node, run)

    monkeypatch.setattr(sys.modules["pyggml.passes.fold"], "value_of", counted)
    store = gg.Store()
    prompt, decode = model(8, store=store), model(1, store=store)
    assert prompt.memory_with(decode).weights == prompt.memory.weights
    assert count == 0
    prompt.run(inputs(8))
    decode.run(inputs(1))
    session = gg.Store(like=store)
    model(2, store=session).run(inputs(2))
    assert count == 1
    assert len(store.shared.weights) == 2  # `w` itself was never uploaded


def test_the_host_keeps_the_array_only_while_it_is_in_use() -> None:
    null, host = model(1, backends=["null:0"]), model(1)
    (uploaded,), (node,) = derived(null), derived(host)
    null.run(inputs(1))
    assert leaf._computed.get(source_of(uploaded)) is None
    host.run(inputs(1))
    assert np.shares_memory(data_of(node), host.addresses[node].buffer)


def test_what_has_the_same_name_must_be_the_same() -> None:
    store = gg.Store()
    model(1, store=store).run(inputs(1))
    model(1, gg.constant(SMALL, dtype="q8_0", name="w"), store=store)
    with pytest.raises(GraphError, match=r"a weight 'cast\(w\)' with other values"):
        model(1, gg.constant(-SMALL, dtype="q8_0", name="w"), store=store)
    other = model(1, gg.constant(-SMALL, dtype="q8_0", name="w"))
    same = model(1, gg.constant(SMALL, dtype="q8_0", name="w"))
    np.testing.assert_array_equal(other.run(inputs(1))["y"], -same.run(inputs(1))["y"])


def test_expressions_that_differ_are_not_shared() -> None:
    store = gg.Store()
    big, _ = weights()
    w = gg.constant(SMALL, name="w")
    z, x = gg.input("z", ne=(1024, 1)), gg.input("x", ne=(64, 1))
    values = {}
    for s in (2.0, -0.0, 0.0):
        y = gg.mul_mat(gg.scale(w, s=s), x)
        plan = gg.compile({"y": y, "b": gg.mul_mat(big, z)}, store=store)
        assert len(derived(plan)) == 1
        values[str(s)] = plan.run(inputs(1))["y"]
    assert len(store.shared.weights) == 4
    np.testing.assert_allclose(values["2.0"][0], 2 * SMALL.sum(1), rtol=1e-5)
    assert not values["0.0"].any()


# -- what is folded -----------------------------------------------------------------------------


def test_the_largest_constant_part_is_folded_as_one() -> None:
    w, v = gg.constant(SMALL, name="w"), gg.constant(SMALL[0], name="v")
    x = gg.input("x", ne=(64, 2))
    sum_ = gg.add(gg.mul(w, v), gg.repeat(v, ne=(64, 64)))
    plan = gg.compile({"y": gg.mul_mat(gg.silu(sum_), x)})
    (node,) = derived(plan)
    assert ops(plan) == ["mul_mat"]
    assert label_of(node) == "silu(add)"
    assert plan.memory.weights == SMALL.nbytes
    plain = gg.compile({"y": gg.mul_mat(gg.silu(sum_), x)}, fuse=False)
    a, b = (p.run(x=np.ones((2, 64)))["y"] for p in (plan, plain))
    np.testing.assert_array_equal(a, b)


def test_outputs_and_views_stay() -> None:
    w = gg.constant(SMALL, name="w")
    x = gg.input("x", ne=(64, 2))
    cast = gg.label(gg.cast(w, dtype="f16"), "half")
    y = gg.mul_mat(gg.transpose(cast), x)
    assert derived(gg.compile({"y": y})) != []
    observed = gg.compile({"y": y}, observe=["half"])
    assert ops(observed) == ["cast", "mul_mat"]
    assert ops(gg.compile({"y": gg.relu(cast)})) == ["cast", "relu"]
    view = gg.compile({"y": gg.mul_mat(gg.transpose(w), x)})
    assert derived(view) == [] and ops(view) == ["mul_mat"]


def test_what_a_state_or_an_input_changes_is_not_constant() -> None:
    state, x = gg.state("s", ne=(64,)), gg.input("x", ne=(64,))
    w = gg.constant(SMALL[0], name="w")
    half = gg.scale(w, s=0.5)
    plan = gg.compile({"y": gg.add(x, half)}, updates=[gg.cpy(half, state)])
    assert ops(plan) in (["add", "cpy"], ["cpy", "add"])
    plan.run(x=np.zeros(64))
    np.testing.assert_array_equal(plan.store.read("s"), SMALL[0] * np.float32(0.5))
    assert ops(gg.compile({"y": gg.add(x, gg.relu(state))})) == ["relu", "add"]


@pytest.mark.parametrize("count", [4, 8])
def test_weights_do_not_grow_by_more_than_the_bound(count: int) -> None:
    """A cast of a 4-bit weight to f16 is 3.6 times the weight: not for most of a model. Equal
    layers are treated alike."""
    x, z = gg.input("x", ne=(64, 1)), gg.input("z", ne=(1024, 1))
    big = gg.constant(BIG[:512], name="big")
    outputs = {"b": gg.mul_mat(big, z)}
    for i in range(count):
        w = gg.constant(SMALL * i, dtype="q4_0", name=f"w{i}")
        outputs[f"y{i}"] = gg.mul_mat(gg.transpose(gg.cast(w, dtype="f16")), x)
    bias = gg.scale(gg.constant(SMALL[0], name="bias"), s=2.0)  # adds nothing
    outputs["y0"] = gg.add(outputs["y0"], bias)
    plan, plain = gg.compile(outputs), gg.compile(outputs, fuse=False)
    before = plain.memory.weights
    growth = count * (64 * 64 * 2 - 64 * 64 // 32 * 18)
    fits = growth <= GROWTH * before
    assert fits == (count == 4)
    assert plan.memory.weights == before + (growth if fits else 0)
    assert len(derived(plan)) == 1 + (count if fits else 0)
    run = {"x": np.ones((1, 64)), "z": np.ones((1, 1024))}
    want = plain.run(run)
    for key, value in plan.run(run).items():
        np.testing.assert_array_equal(value, want[key])


def test_a_weight_that_others_read_still_counts() -> None:
    w = gg.constant(SMALL, name="w")
    x = gg.input("x", ne=(64, 1))
    y = gg.mul_mat(gg.transpose(gg.cast(w, dtype="f16")), x)
    assert derived(gg.compile({"y": y})) != []
    assert derived(gg.compile({"y": y, "z": gg.mul_mat(w, x)})) == []  # 50 % more


# -- where it is, how it is called ---------------------------------------------------------------


def test_labels_lines_and_names() -> None:
    big, w = weights()
    x, z = gg.input("x", ne=(64, 1)), gg.input("z", ne=(1024, 1))
    half = gg.label(gg.cast(w, dtype="f16"), "half")
    plan = gg.compile({"y": gg.mul_mat(gg.transpose(half), x), "b": gg.mul_mat(big, z)})
    (node,) = derived(plan)
    assert labels(node) == ("w", "cast(w)", "half")
    assert "half" not in labels(w) and "cast(w)" not in labels(half)
    assert "half" in str(plan.graph) and "mul_mat(half, x)" in str(plan)


@pytest.mark.parametrize("pin", ["^w$", "^half$"])
def test_a_pinned_label_keeps_its_place(pin: str) -> None:
    _, w = weights()
    host = gg.constant(BIG, name="host")
    x, z = gg.input("x", ne=(64, 1)), gg.input("z", ne=(1024, 1))
    half = gg.label(gg.cast(w, dtype="f16"), "half")
    outputs = {"y": gg.mul_mat(gg.transpose(half), x), "b": gg.mul_mat(host, z)}
    pins = {pin: "numpy", "^host$": "numpy"}
    plain = gg.compile(outputs, backends=["null:0"], pins=pins, fuse=False)
    plan = gg.compile(outputs, backends=["null:0"], pins=pins)
    (node,) = derived(plan)
    assert plan.place_of(node) == "numpy"
    for other in (plain, plan):
        readers = [step for step in other.steps if "mul_mat" in step.node.op.name]
        assert [other.place_of(step.node) for step in readers] == [
            plain.place_of(step.node) for step in plain.steps if step.node.op.name == "mul_mat"
        ]
    null = [row for row in plan.memory.devices if row.device == "null:0"]
    assert all(row.weights == 0 for row in null)  # borrowed, as the cast's result was
    a, b = plan.run(inputs(1)), plain.run(inputs(1))
    np.testing.assert_array_equal(a["y"], b["y"])


def test_two_devices_each_have_it() -> None:
    big, w = weights()
    x, z = gg.input("x", ne=(64, 1)), gg.input("z", ne=(1024, 1))
    half = gg.cast(w, dtype="f16")
    a = gg.label(gg.mul_mat(gg.transpose(half), x), "a")
    b = gg.label(gg.mul_mat(gg.transpose(half), gg.relu(a)), "b")
    outputs = {"a": a, "b": b, "c": gg.mul_mat(big, z)}
    plan = gg.compile(outputs, backends=["null:0"], pins={"^b$": "null:1"})
    rows = {row.device: row for row in plan.memory.devices}
    assert rows["null:1"].weights == 64 * 64 * 2
    plain = gg.compile(outputs, fuse=False)
    given, want = plan.run(inputs(1)), plain.run(inputs(1))
    for key in want:
        np.testing.assert_array_equal(given[key], want[key])


# -- threads --------------------------------------------------------------------------------------


def several(count: int, fail: int | None = None) -> dict[str, Node]:
    """Outputs with a derived constant each; that of number `fail` cannot be computed."""
    x, z = gg.input("x", ne=(64, 1)), gg.input("z", ne=(1024, 1))
    outputs = {"b": gg.mul_mat(weights()[0], z)}
    for i in range(count):
        w = gg.constant(SMALL + i, dtype="q8_0", name=f"w{i}")
        w = gg.transpose(gg.cast(w, dtype="f16"))
        if i == fail:
            w = gg.get_rows(gg.cast(w, dtype="f32"), gg.constant(np.array([99] * 64, np.int32)))
        outputs[f"y{i}"] = gg.mul_mat(w, x)
    return outputs


def test_threads_compute_several_at_once(monkeypatch: Any) -> None:
    both = Barrier(2)

    def met(node: Node, run: Any) -> Any:
        both.wait(timeout=30)
        return value_of(node, run)

    monkeypatch.setenv("PYGGML_THREADS", "2")
    monkeypatch.setattr(sys.modules["pyggml.passes.fold"], "value_of", met)
    outputs = several(6)
    given = gg.compile(outputs, backends=["null:0"]).run(inputs(1))
    want = gg.compile(outputs, fuse=False).run(inputs(1))
    for key in want:
        np.testing.assert_array_equal(given[key], want[key])


def test_only_a_few_are_computed_ahead(monkeypatch: Any) -> None:
    begun, uploaded = 0, 0

    def counted(node: Node, run: Any) -> Any:
        nonlocal begun
        begun += 1
        return value_of(node, run)

    def show(done: int, total: int) -> None:
        nonlocal uploaded
        uploaded += 1
        if uploaded == 1:
            sleep(0.2)  # long enough to compute all of them
        assert begun <= uploaded + 3  # one that is uploaded, and two that wait

    monkeypatch.setenv("PYGGML_THREADS", "2")
    monkeypatch.setattr(sys.modules["pyggml.passes.fold"], "value_of", counted)
    gg.compile(several(8), backends=["null:0"]).bind({}, show)
    assert begun == 8


def test_an_error_in_a_thread_leaves_nothing_running() -> None:
    plan = gg.compile(several(8, fail=4), backends=["null:0"])
    for _ in range(2):
        with pytest.raises(IdError, match=r"get_rows.*99.*test_fold"):
            plan.bind()
        assert not [each for each in enumerate_threads() if "pyggml-derive" in each.name]
        assert not plan.store.shared.weights


def test_an_interrupt_leaves_nothing_running(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            super().submit(*args, **kwargs)
            raise KeyboardInterrupt

    plan = gg.compile(several(3), backends=["null:0"])
    with monkeypatch.context() as patch:
        patch.setenv("PYGGML_THREADS", "2")
        patch.setattr(derivations, "ThreadPoolExecutor", Pool)
        with pytest.raises(KeyboardInterrupt):
            plan.bind()
    assert not [each for each in enumerate_threads() if "pyggml-derive" in each.name]
    want = gg.compile(several(3), fuse=False).run(inputs(1))
    for key, values in plan.run(inputs(1)).items():
        np.testing.assert_array_equal(values, want[key])


# -- errors, budgets, comparisons ---------------------------------------------------------------


def test_an_error_in_the_computation_is_that_of_the_run() -> None:
    big, _ = weights()
    table, ids = gg.constant(SMALL, name="table"), gg.constant(np.array([1, 99]), name="ids")
    x, z = gg.input("x", ne=(64, 2)), gg.input("z", ne=(1024, 1))
    rows = gg.get_rows(table, gg.cast(ids, dtype="i32") if ids.dtype.name != "i32" else ids)
    outputs = {"y": gg.add(x, rows), "b": gg.mul_mat(big, z)}
    plan, plain = gg.compile(outputs), gg.compile(outputs, fuse=False)
    run = {"x": np.ones((2, 64)), "z": np.ones((1, 1024))}
    with pytest.raises(IdError) as want:
        plain.run(run)
    with pytest.raises(IdError, match=r"get_rows.*99.*test_fold") as given:
        plan.run(run)
    assert str(given.value) == str(want.value)
    assert not plan.store.shared.weights  # nothing half done


def test_budget_sees_a_weight() -> None:
    """V of an attention that is a constant in a block type: its f16 copy is no tensor of a run."""
    values = RNG.standard_normal((2, 256, 64)).astype(np.float32)
    k = gg.constant(values, dtype="f16", name="k")
    v = gg.constant(values, name="v")
    q = gg.input("q", ne=(64, 32, 2))
    p = gg.soft_max_ext(gg.mul_mat(k, q), scale=0.125)
    out = gg.mul_mat(gg.transpose(gg.cast(v, dtype="f16")), p)
    whole, plain = gg.compile({"y": out}), gg.compile({"y": out}, fuse=False)
    plan = gg.compile({"y": out}, amb=0.99 * whole.memory.score_peak / 2**20)
    assert len(derived(plan)) == 1
    assert any(step.loop is not None for step in plan.steps)
    run = {"q": RNG.standard_normal((2, 32, 64)).astype(np.float32)}
    np.testing.assert_allclose(plan.run(run)["y"], plain.run(run)["y"], rtol=1e-5, atol=1e-6)


def test_compare_sees_every_node() -> None:
    big, w = weights()
    x, z = gg.input("x", ne=(64, 1)), gg.input("z", ne=(1024, 1))
    half = gg.label(gg.cast(w, dtype="f16"), "half")
    outputs = {"y": gg.mul_mat(gg.transpose(half), x), "b": gg.mul_mat(big, z)}
    report = gg.compare(outputs, "null:0", "numpy", inputs(1))
    assert "half" in [row.label for row in report.nodes]


def test_a_plan_s_graph_compiles_again() -> None:
    plan = model(2)
    again = gg.compile(plan.graph.outputs)
    a, b = plan.run(inputs(2)), again.run(inputs(2))
    np.testing.assert_array_equal(a["y"], b["y"])


def test_thousands_of_nodes_deep() -> None:
    big, _ = weights()
    node = gg.constant(SMALL[0], name="w")
    for _ in range(3000):
        node = gg.scale(node, s=1.0)
    x, z = gg.input("x", ne=(64,)), gg.input("z", ne=(1024, 1))
    store = gg.Store()
    for _ in range(2):
        plan = gg.compile({"y": gg.add(x, node), "b": gg.mul_mat(big, z)}, store=store)
        assert sorted(ops(plan)) == ["add", "mul_mat"]
    y = plan.run(x=np.zeros(64), z=np.ones((1, 1024)))["y"]
    np.testing.assert_array_equal(y, SMALL[0])

"""gg.compare finds a wrong kernel in the middle of a graph, and only that one fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from two_places import B, Host, Model, at, bad, run_here, scaled, values

import pyggml as gg
from pyggml import backends
from pyggml.backends.numpy.table import KERNELS
from pyggml.parity.nodes import walk

# -- differences --------------------------------------------------------------------------------


def test_equal_places_are_equal(model: Model) -> None:
    report = model.on()
    assert report and report.first is None
    labels = [row.label for row in report.nodes]
    assert set(labels) > {"h", "old", "rows", "kq", "p", "v", "y"} and len(labels) == 9
    assert labels.index("old") < labels.index("rows")  # it reads the rows before the write
    assert [row.label for row in report.outputs] == ["output y", "output old", "state cache"]
    assert all(row.error == 0.0 for row in report.rows)
    assert "9/9 nodes within their bounds; whole graph: 3/3 results" in str(report)
    assert {row.label: row.bound for row in report.nodes}["p"] == 2e-10
    assert {row.label: row.bound for row in report.nodes}["v"] == 0.0


@pytest.mark.parametrize(
    ("op", "label"),
    [("silu", "silu%"), ("soft_max_ext", "p"), ("set_rows", "rows"), ("cont", "v"), ("add", "y")],
)
def test_only_the_wrong_kernel_fails(model: Model, host: Host, op: str, label: str) -> None:
    host.wrong[op] = scaled(2.0)
    report = model.on()
    failing = [row.label for row in report.nodes if row.status == "fail"]
    assert not report and len(failing) == 1 and failing[0].startswith(label)
    assert report.first is report.worst is report.row(failing[0])
    assert "two_places.py:" in report.first.line and report.first.line in str(report)
    assert report.first.error == pytest.approx(1.0)
    assert "output y" in bad(report)  # the whole graph is wrong too


def test_first_and_worst(model: Model, host: Host) -> None:
    def one(out: Any) -> None:
        out[0, 0, 2, 7] += 1.0

    host.wrong.update(silu=scaled(1.0001), soft_max_ext=one)
    report = model.on()
    assert report.first and report.first.op == "silu"
    assert report.worst and report.worst.label == "p"
    assert at(report.worst) == (2, 7)
    text = str(report)
    assert "(2, 7)" in text and f"first: {report.first.label} = silu" in text
    assert "worst: p = soft_max_ext" in text and "report.script('silu" in text


def test_a_fault_of_the_whole_graph_only(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    device = backends.get("null", 7)
    bind = device.bind

    def wrong(steps: Any, *args: Any) -> Any:  # like a wrong fusion: right for one node alone
        runner = bind(steps, *args)
        return runner if len(steps) == 1 else type(runner)(device, steps[:-1], *args)

    monkeypatch.setattr(device, "bind", wrong)
    report = model.on()
    assert not report and all(row.status == "ok" for row in report.nodes)
    assert report.first is not None and report.first in report.outputs
    assert report.first is report.worst and "report.script" not in str(report)


def test_nan_and_infinity(model: Model, host: Host) -> None:
    def spoil(out: Any) -> None:
        out[0, 0, 1, 3] = np.nan

    host.wrong["silu"] = spoil
    report = model.on()
    assert report.first and report.first.op == "silu" and report.first is report.worst
    assert report.first.why == "NaN at 1 wrong places" and report.first.error == np.inf
    assert at(report.first) == (1, 3)
    # Equal NaN on both places are no difference.
    model.inputs["x"][2, 2] = np.inf
    host.wrong.clear()
    assert model.on()


def test_writes(model: Model, host: Host) -> None:
    def other_row(out: Any) -> None:  # the ids do not name it
        out[0, 0, 2, 5] += 0.001

    host.wrong["set_rows"] = other_row
    report = model.on()
    assert [row.label for row in report.nodes if row.status == "fail"] == ["rows"]
    assert report.first and at(report.first) == (2, 5)


def test_untouched_rows_do_not_count(host: Host) -> None:
    cache = gg.state("cache", "f32", ne=(4, 1000))
    part = gg.view(cache, ne=(4, 2), start=(0, 3))
    written = gg.cpy(gg.input("x", ne=(4, 2)), part)
    read = gg.relu(gg.state_of(written))
    host.wrong["cpy"] = scaled(1.001)
    states = {"cache": 100 * values((1000, 4))}
    report = gg.compare({"y": read}, "numpy", B, {"x": values((2, 4))}, states=states)
    first, relu = report.nodes
    assert first.status == "fail" and first.error == pytest.approx(1e-6, rel=0.01)
    assert at(first)[0] in (3, 4)
    assert relu.status == "ok"
    assert {row.label: row.status for row in report.outputs}["state cache"] == "fail"
    nothing_read = gg.compare({}, "numpy", B, {"x": values((2, 4))}, updates=[written])
    assert [row.label for row in nothing_read.outputs] == ["state cache"]
    assert [row.status for row in nothing_read.rows] == ["fail", "fail"]


def test_strides_are_those_of_the_graph(host: Host) -> None:
    seen = []

    def look(out: Any, a: Any) -> None:
        seen.append((a.shape, a.strides))
        np.maximum(a, 0, out=out)

    before = KERNELS[gg.relu]
    x = gg.input("x", ne=(6, 4, 3))
    h = gg.sqr(x)
    y = gg.relu(gg.permute(gg.view(h, ne=(3, 4, 2), start=(1, 0, 1)), axes=(1, 0, 2)))
    try:
        KERNELS[gg.relu] = replace(before, run=look, inplace=())
        assert gg.compare({"y": y}, "numpy", "numpy", {"x": values((3, 4, 6))})
    finally:
        KERNELS[gg.relu] = before
    assert len(set(seen)) == 1 and seen[0] == ((1, 2, 3, 4), (seen[0][1][0], 96, 4, 24))


def test_bounds_follow_the_classes_of_both_places(model: Model, host: Host) -> None:
    host.classes["mul_mat"] = "quantized"
    host.wrong["mul_mat"] = scaled(1.01)
    report = model.on()
    assert report.row("kq").bound == pytest.approx(5e-4 + 1e-10)
    assert all(row.status == "ok" for row in report.nodes)
    host.wrong["mul_mat"] = scaled(1.03)
    assert report.row("kq").error == pytest.approx(1e-4, rel=0.01)
    assert [row.op for row in model.on().nodes if row.status == "fail"] == ["mul_mat"] * 4


def test_large_positions_have_the_same_bound() -> None:
    x, pos = gg.input("x", ne=(8, 1, 2)), gg.input("pos", "i32", ne=(2,))
    y = gg.rope_ext(x, pos, n_dims=8)
    bounds = [
        gg.compare({"y": y}, "numpy", B, {"x": values((2, 1, 8)), "pos": [0, last]}).nodes[0].bound
        for last in (5, 100_000)
    ]
    assert bounds == [2e-10, 2e-10]


def test_leaves_views_and_equal_labels(tmp_path: Path) -> None:
    x = gg.input("x", ne=(4, 3))
    report = gg.compare({"x": x, "t": gg.transpose(x)}, "numpy", B, {"x": values((3, 4))})
    assert report and not report.nodes and len(report.outputs) == 2 and report.worst is None
    y = gg.add(gg.label(gg.sqr(x), "x"), x)
    report = gg.compare({"y": y}, "numpy", B, {"x": values((3, 4))})
    assert report and [row.label for row in report.nodes] == ["x%1", "add%2"]
    assert run_here(report.script("add%2", tmp_path / "add.py"))[0] == 0


# -- what cannot run ----------------------------------------------------------------------------


def test_unsupported(model: Model, tmp_path: Path) -> None:
    with backends.get("null", 7).denying("silu"):
        report = model.on()
        assert not report and report.first is None
        (row,) = [row for row in report.nodes if row.status != "ok"]
        assert row.op == "silu" and row.status == "unsupported" and row.error is None
        assert "silu is on the deny list" in row.why and row.why in str(report)
        assert {row.status for row in report.outputs} == {"unsupported"}
        # The other way round, NumPy's values are used.
        other = model.on("numpy", B)
        assert [r.status for r in other.nodes if r.op == "silu"] == ["unsupported"]
        assert other.row("kq").status == "ok"
        neither = model.on(B, B)
        with pytest.raises(gg.GraphError, match="no script for kq: it reads silu"):
            neither.script("kq", tmp_path / "kq.py")
    assert neither.row("p").status == neither.row("kq").status == "skipped"
    assert "reads silu%" in neither.row("kq").why
    assert neither.row("rows").status == neither.row("v").status == "ok"


def test_a_node_without_a_kernel_runs_as_its_meaning(host: Host) -> None:
    up, gate = (gg.constant(values((8, 32), seed), dtype="f16") for seed in (1, 2))
    y = gg.fused_up_gate(up, gate, gg.input("x", ne=(32, 3)))
    host.classes["mul_mat"] = "quantized"
    with backends.get("null", 7).denying("fused_up_gate"):
        report = gg.compare({"y": y}, "numpy", B, {"x": values((3, 32))})
    assert report and [row.op for row in report.nodes] == ["fused_up_gate"]
    assert report.nodes[0].bound == pytest.approx(5e-4 + 1e-10)  # of its products on B
    assert gg.compare({"y": y}, "numpy", B, {"x": values((3, 32))}).nodes[0].bound == 2e-10


def test_kernels_that_raise(model: Model, host: Host) -> None:
    def broken(out: Any) -> None:
        raise ZeroDivisionError("oh")

    host.wrong["silu"] = broken
    report = model.on()
    assert [row.op for row in report.nodes if row.status == "fail"] == ["silu"]
    assert report.first and report.first is report.worst
    assert report.first.why.startswith(f"{B} raised ZeroDivisionError: oh")
    assert {row.status for row in report.outputs} == {"fail"}


def test_a_state_whose_write_failed_is_unknown(model: Model, host: Host) -> None:
    with backends.get("null", 7).denying("set_rows"):
        report = model.on(B, B)
    assert report.row("rows").status == "unsupported" and report.row("old").status == "ok"
    assert report.row("kq").status == report.row("v").status == "skipped"


# -- errors -------------------------------------------------------------------------------------


def test_wrong_arguments(model: Model) -> None:
    inputs = dict(model.inputs)
    for error, changed, why in (
        (gg.GraphError, {"ids": None}, r"parity needs inputs: ids \(i32 \[5\]\)"),
        (gg.UnknownNameError, {"z": [1]}, "no input 'z'; its inputs: "),
        (gg.ShapeError, {"x": values((64, 5))}, r"input 'x': expected f32 \[64, 5\], NumPy shape"),
        (gg.DTypeError, {"ids": values((5,))}, "input 'ids': expected i32"),
    ):
        model.inputs = {k: v for k, v in {**inputs, **changed}.items() if v is not None}
        with pytest.raises(error, match=why):
            model.on()
    model.inputs = inputs
    for error, states, why in (
        (gg.UnknownNameError, {"kache": [1]}, "no state 'kache'; its states: cache"),
        (gg.ShapeError, {"cache": [1]}, "state 'cache': expected f16"),
        (gg.DTypeError, 3, "states must be a dict"),
    ):
        model.states = states  # type: ignore[assignment]
        with pytest.raises(error, match=why):
            model.on()
    model.states = {}
    assert model.on()  # states are zero by default
    with pytest.raises(gg.UnknownNameError, match="no backend 'abacus'"):
        model.on("abacus")
    with pytest.raises(gg.DeviceError, match="for planning only"):
        model.on("numpy:1GiB")


def test_values_are_freed_after_their_last_reader() -> None:
    x = gg.input("x", ne=(4,))
    nodes = [x]
    for _ in range(20):
        nodes.append(gg.add(gg.sqr(nodes[-1]), x))
    counts = []
    leaves = {x: values((4,))}

    def visit(single: Any, live: Any) -> Any:
        counts.append(len(live))
        return single.run("numpy", live)[0]

    remaining = walk(gg.Graph({"y": nodes[-1]}).nodes, leaves, visit)
    assert max(counts) == 2 and len(counts) == 40 and set(remaining) == {x}


def test_the_first_wrong_step_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a wrong fusion: with fusions, the device leaves out the step of one node."""
    device = backends.get("null", 7)
    lower, bind = device.lower, device.bind
    fused = False

    def lower_noting_fuse(*args: Any, fuse: bool) -> Any:
        nonlocal fused
        fused = fuse
        return lower(*args, fuse=fuse)

    def wrong_if_fused(steps: Any, *args: Any) -> Any:
        right = [s for s in steps if len(steps) == 1 or not fused or s.node is not second]
        return bind(right, *args)

    monkeypatch.setattr(device, "lower", lower_noting_fuse)
    monkeypatch.setattr(device, "bind", wrong_if_fused)
    x = gg.input("x", ne=(64, 4))
    first = gg.label(gg.silu(x), "first")
    second = gg.label(gg.mul(first, x), "second")
    y = gg.relu(gg.label(gg.scale(second, s=0.5), "third"))
    array = np.random.default_rng(0).standard_normal((4, 64))
    arguments: Any = ({"y": y}, "null:7", "null:7", {"x": array})
    report = gg.compare(*arguments, by="step")
    assert [row.label for row in report.outputs[:3]] == ["step first", "step second", "step third"]
    assert all(row.status == "ok" for row in (*report.nodes, report.outputs[0]))
    assert not report and report.first is not None and report.first.label == "step second"
    assert "the same place twice" not in str(report)
    assert not any(row.label.startswith("step") for row in gg.compare(*arguments).outputs)
    with pytest.raises(gg.DTypeError, match="by= must be 'node' or 'step', not 'steps'"):
        gg.compare(*arguments, by="steps")

"""Kernels that leave out the norm in front of them, run on the host."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import pyggml as gg
from pyggml.dtypes import TYPES
from tests.cuda.compared import Graph, compare_all, constant, random
from tests.cuda.emulated import run_all


def normed(x: gg.Node, eps: float = 1e-5) -> gg.Node:
    return gg.mul(gg.rms_norm(x, eps=eps), gg.constant(random(x.ne[0]), name="norm"))


def products(
    k: int, dtype: str, rows: tuple[int, ...],
    plus: bool = False, kept: bool = False, eps: float = 1e-5,
) -> Graph:  # fmt: skip
    """plus: of the sum of two rows. kept: it is read again."""
    x, inputs = gg.input("x", ne=(k, 1)), {"x": random(1, k)}
    if plus:
        x, inputs["o"] = gg.add(x, gg.input("o", ne=(k, 1))), random(1, k)
    y = normed(x, eps)
    outputs = {f"y{n}": gg.mul_mat(constant(f"w{n}", dtype, n, k), y) for n in rows}
    return outputs | ({"h": gg.scale(x, s=2.0)} if kept else {}), inputs


def experts(k: int, dtype: str, shared: str | None, kept: bool = False, eps: float = 1e-5) -> Graph:
    """A feed-forward layer of experts. What its norm normalizes is added, or, if kept, read by
    other ops."""
    n, used, n_ff = 12, 4, 64
    h = gg.add(gg.input("x", ne=(k, 1)), gg.input("o", ne=(k, 1)))
    x = normed(h, eps)
    probs = gg.soft_max(gg.mul_mat(gg.constant(random(n, k), name="router"), x, prec="f32"))
    ids = gg.top_k(probs, k=used)
    shares = gg.get_rows(gg.reshape(probs, ne=(1, n, 1)), ids)
    up, gate = (constant(name, dtype, n, n_ff, k) for name in ("up", "gate"))
    hidden = gg.moe_up_gate(up, gate, gg.reshape(x, ne=(k, 1, 1)), ids)
    y = gg.mul_multi_add(gg.mul_mat_id(constant("down", "q8_0", n, k, n_ff), hidden, ids), shares)
    if shared is not None:
        up, gate = (constant(f"{name}_s", shared, 2 * n_ff, k) for name in ("up", "gate"))
        hidden = gg.fused_up_gate(up, gate, x)
        y = gg.add(y, gg.mul_mat(constant("down_s", "q8_0", k, 2 * n_ff), hidden))
    outputs = {"y": gg.relu(y), "h": gg.scale(h, s=2.0)} if kept else {"y": gg.add(y, h)}
    return outputs, {"x": random(1, k), "o": random(1, k)}


def norm_in(graph: Graph) -> gg.Node:
    """The result of the norm."""
    nodes = gg.Graph(graph[0]).nodes
    return next(n for n in nodes if n.op is gg.mul and n["a"].op is gg.rms_norm)


def one_step(graph: Graph) -> bool:
    """Whether a step computes the norm with what is behind it."""
    steps = gg.compile(graph[0], backends=["cuda:0:24GiB"]).steps
    return any({gg.rms_norm, gg.mul_mat} <= {node.op for node in step.nodes} for step in steps)


def test_products_behind_a_norm(tmp_path: Path) -> None:
    """Groups of a row that leave lanes and warps without one, a last tile that is not full, blocks
    with one tile. The last two are not one step: a row is too long, or there are too many."""
    types = ("iq4_nl", "q8_0", "q2_K", "q3_K", "q4_K", "q6_K", "iq3_xxs", "iq2_xxs", "q1_0")
    graphs = {
        f"{t} {k}": products(-(-k // TYPES[t].block) * TYPES[t].block, t, (21, 30))
        for t in types for k in (160, 2048)
    }  # fmt: skip
    graphs["many"] = products(96, "iq4_nl", (2049, 1900), plus=True)
    graphs["kept"] = products(1056, "q8_0", (40, 9, 16), plus=True, kept=True)
    graphs["long"] = products(2080, "iq4_nl", (40, 9), plus=True, kept=True)
    graphs["more"] = products(32, "iq4_nl", (2049, 2300), plus=True)
    assert [name for name, graph in graphs.items() if not one_step(graph)] == ["long", "more"]
    compare_all(graphs, tmp_path, 1e-7)


def test_experts_behind_a_norm(tmp_path: Path) -> None:
    """A pack a thread and several; shared experts of the same type, of another one, and none."""
    graphs = {
        "same": experts(1056, "iq4_nl", "iq4_nl"),
        "other": experts(256, "q6_K", "q8_0"),
        "alone": experts(512, "q4_K", None),
        "long": experts(2304, "q8_0", "q8_0"),
        "kept": experts(1056, "q8_0", "q8_0", kept=True),
    }
    assert all(map(one_step, graphs.values()))
    compare_all(graphs, tmp_path, 1e-6)


def test_norms_that_others_read_are_computed(tmp_path: Path) -> None:
    graphs = {}
    for name, graph in (
        ("products", products(256, "q8_0", (24, 16), plus=True)),
        ("experts", experts(256, "q8_0", "q8_0")),
    ):
        (outputs, inputs), y = graph, norm_in(graph)
        graphs[name] = {**outputs, "more": gg.scale(y, s=2.0)}, inputs
        assert one_step(graph) and not one_step(({**outputs, "norm": y}, inputs))
        assert not one_step(graphs[name])
    compare_all(graphs, tmp_path, 1e-6)


def test_rows_that_are_not_usual(tmp_path: Path) -> None:
    """All or one of a row's elements: they give what they give behind a norm of its own. Squares
    overflow, also where products of the row would, or are 0."""
    graphs, others = [], []
    for eps in (1e-5, 0.0):
        for graph in (
            products(160, "q8_0", (24, 16), eps=eps),
            experts(160, "q8_0", "q8_0", eps=eps),
        ):
            for value in (0.0, np.nan, np.inf, 1e-22, 2e19, 3e38):
                for which in (slice(None), slice(7, 8)):
                    inputs = {name: np.zeros_like(row) for name, row in graph[1].items()}
                    inputs["x"] = graph[1]["x"].copy()
                    inputs["x"][0, which] = value
                    graphs.append((graph[0], inputs))
                    others.append(({**graph[0], "norm": norm_in(graph)}, inputs))
    results = run_all([*graphs, *others], tmp_path)
    for result, other in zip(results, results[len(graphs) :]):
        for name, values in result.items():
            most = np.abs(other[name][np.isfinite(other[name])]).max(initial=0)
            np.testing.assert_allclose(values, other[name], rtol=1e-3, atol=1e-3 * most)

"""DOT: every node and edge once, names quoted, loops shown."""

from __future__ import annotations

import re

import pyggml as gg
from pyggml import viz


def plan(amb: float | None = None) -> gg.Plan:
    k = gg.state('cache "k"', "f32", ne=(64, 128, 4))
    q = gg.input("q", "f32", ne=(64, 32, 4))
    p = gg.label(gg.soft_max_ext(gg.mul_mat(k, q), scale=0.125), "kq_soft_max-0")
    v = gg.constant([[0.5] * 128] * 64, name="v")
    return gg.compile({"out": gg.mul_mat(v, p)}, amb=amb)


def test_dot_names_every_node_and_edge_once() -> None:
    graph = plan().graph
    text = viz.dot(graph)
    assert text.startswith("digraph graph {") and text.endswith("}")
    drawn = re.findall(r"^  (n\d+) \[label=", text, re.MULTILINE)
    assert len(drawn) == len(set(drawn)) == len(graph.nodes)
    edges = re.findall(r"^  n\d+ -> n\d+ ", text, re.MULTILINE)
    assert len(edges) == sum(s is not None for node in graph.nodes for s in node.src)
    assert r"cache \"k\"" in text and "kq_soft_max-0" in text and "f32 [64, 128, 4]" in text


def test_dot_shows_loops() -> None:
    whole = plan()
    cut = plan(amb=whole.memory.score_peak / 2 / 2**20)
    assert "folder" not in viz.dot(whole.graph)
    assert "folder" in viz.dot(cut.graph) and "loop <ne2:" in viz.dot(cut.graph)

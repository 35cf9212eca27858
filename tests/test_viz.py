"""Drawings: valid DOT, every node and edge once, quoted names, loops, splits as boxes."""

from __future__ import annotations

import pytest

import pyggml as gg
from pyggml import viz
from tests import dot_syntax


def plan(amb: float | None = None) -> gg.Plan:
    k = gg.state('cache "k"', "f32", ne=(64, 128, 4))
    q = gg.input("q", "f32", ne=(64, 32, 4))
    p = gg.label(gg.soft_max_ext(gg.mul_mat(k, q), scale=0.125), "kq_soft_max-0")
    v = gg.constant([[0.5] * 128] * 64, name="v")
    return gg.compile({"out": gg.mul_mat(v, p)}, amb=amb)


def two_places() -> gg.Plan:
    """Splits on null, numpy, null, with a view of a result, views of weights, and a weight on the
    other device.
    """
    w = gg.constant([[0.5] * 8] * 16, name="w")
    far = gg.constant([[0.25] * 16] * 4, name="far")
    x = gg.mul_mat(gg.view(w, ne=(8, 8), offset=0), gg.input("x", "f32", ne=(8, 3)))
    half = gg.reshape(gg.cont(gg.permute(x, axes=(1, 0))), ne=(8, 3))
    y = gg.mul_mat(gg.view(far, ne=(8, 4), offset=0), half)
    return gg.compile(
        {"y": gg.relu(gg.mul_mat(gg.constant([[1.0] * 4] * 2, name="last"), y))},
        backends=["null", "numpy"],
        pins={"far": "numpy"},
    )


PLANS = {
    "whole": plan,
    "cut": lambda: plan(amb=plan().memory.score_peak / 2 / 2**20),
    "two places": two_places,
}


def test_dot_names_every_node_and_edge_once() -> None:
    graph = plan().graph
    drawing = dot_syntax.read(viz.dot(graph))
    assert drawing.name == '"pyggml"' and not drawing.boxes
    assert len([n for n in drawing.nodes if n[0] == "n"]) == len(graph.nodes)
    edges = [edge for edge in drawing.edges if edge[1][0] == "n"]
    assert len(edges) == sum(s is not None for node in graph.nodes for s in node.src)
    text = viz.dot(graph)
    assert r"cache \"k\"" in text and "kq_soft_max-0" in text and "f32 [64, 128, 4]" in text


@pytest.mark.parametrize("name", ["graph", "Node", 'two "words"', "", "7up\n\\"])
def test_any_name_is_a_name(name: str) -> None:
    dot_syntax.read(viz.dot(plan(), name))
    dot_syntax.drawn_by_dot(viz.dot(plan(), name))


@pytest.mark.parametrize("name", PLANS)
def test_graphviz_draws_every_kind_of_plan(name: str) -> None:
    example = PLANS[name]()
    for what in (example, example.graph):
        svg = dot_syntax.drawn_by_dot(viz.dot(what))
        assert svg.count('class="edge"') == len(dot_syntax.read(viz.dot(what)).edges)


@pytest.mark.parametrize("name", PLANS)
def test_everything_but_outputs_is_in_a_box(name: str) -> None:
    drawing = dot_syntax.read(viz.dot(PLANS[name]()))
    assert all(node.startswith("out") for node in drawing.loose)


def test_weights_and_views_are_in_the_box_of_their_device() -> None:
    example = two_places()
    drawing = dot_syntax.read(viz.dot(example))
    place = {
        drawing.nodes[name]["label"].strip('"').split("\\n")[0]: title.strip('"').split()[-1]
        for title, names in drawing.boxes.items()
        for name in names
    }
    assert place["w"] == place["last"] == place["x"] == "null:0" and place["far"] == "numpy"
    assert len(drawing.boxes) == len(example.splits) == 3
    boxes = [{drawing.nodes[n]["label"].split("\\n")[0].strip('"') for n in names}
             for names in drawing.boxes.values()]  # fmt: skip
    assert {"w", "view", "permute"} <= boxes[0] and {"far", "view", "reshape"} <= boxes[1]
    assert "last" in boxes[2]


def test_the_dot_reader_finds_mistakes() -> None:
    for wrong in ("digraph graph { }", "digraph a { b [label=c] }", "digraph { }",
                  "digraph a { b -> c; }", 'digraph a { b [label="c"d"]; }'):  # fmt: skip
        with pytest.raises(AssertionError):
            dot_syntax.read(wrong)


def test_dot_shows_loops() -> None:
    whole = plan()
    cut = plan(amb=whole.memory.score_peak / 2 / 2**20)
    assert "folder" not in viz.dot(whole.graph)
    assert "folder" in viz.dot(cut.graph) and "loop <ne2:" in viz.dot(cut.graph)

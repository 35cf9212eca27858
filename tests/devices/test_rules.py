"""The rules that choose a device: docs and code agree, and each rule beats the ones after it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from stacks import weight, where

import pyggml as gg
from pyggml import backends
from pyggml.graph import Graph
from pyggml.node import Node
from pyggml.passes.rules import RULES, Choice, Homes
from pyggml.passes.work import Work

DOCS = Path(__file__).parents[2] / "docs" / "scheduling.md"
PINS = {"^one$": "null:1", "^host$": "numpy"}


def words(text: str | None) -> str:
    return " ".join((text or "").split())


def test_docs_list_the_rules_in_the_words_of_their_docstrings() -> None:
    section = DOCS.read_text().partition("## Which device runs a node")[2]
    items = re.findall(r"^\d\. (.*(?:\n   .*)*)", section.partition("\nA pin is")[0], re.MULTILINE)
    assert [words(item) for item in items] == [words(rule.__doc__) for rule in RULES]


def on_one() -> Node:
    """A computed node on null:1."""
    return gg.label(gg.relu(gg.input("x", "f32", ne=(4, 4))), "one")


def pinned_node() -> Node:
    leaf = gg.label(gg.input("b", "f32", ne=(4, 4)), "one")
    return gg.label(gg.add(on_one(), leaf), "host")


def state_write() -> Node:
    state = gg.label(gg.state("s", "f32", ne=(4, 8)), "one")
    rows = gg.label(gg.input("rows", "f32", ne=(4, 2)), "host")
    return gg.set_rows(state, rows, gg.input("ids", "i32", ne=(2,)))


def pinned_leaf() -> Node:
    leaf = gg.label(gg.input("b", "f32", ne=(4, 4)), "host")
    return gg.add(leaf, gg.label(gg.state("s", "f32", ne=(4, 4)), "first"))


def weight_read() -> Node:
    return gg.mul_mat(weight("w", 4, 4), on_one())


def row_of_weight_read() -> Node:
    return gg.mul(on_one(), weight("w", 4))


def no_source() -> Node:
    return gg.relu(gg.input("x", "f32", ne=(4, 4)))


@pytest.mark.parametrize(
    ("build", "place"),
    [
        (pinned_node, "numpy"),
        (state_write, "null:1"),
        (pinned_leaf, "numpy"),
        (weight_read, "null:0"),
        (row_of_weight_read, "null:1"),
        (no_source, "null:0"),
    ],
)
@pytest.mark.filterwarnings("ignore:the pin")
def test_the_first_rule_that_applies_decides(build: Callable[[], Node], place: str) -> None:
    node = gg.label(build(), "chosen")
    keep = {"updates": [node]} if node.op.writes is not None else {}
    plan = gg.compile({"y": gg.cont(node)}, backends=["null:0", "null:1"], pins=PINS, **keep)
    assert where(plan, "chosen") == place


def test_a_state_beats_a_weight() -> None:
    state = gg.state("s", "f32", ne=(4, 4))
    store = gg.Store()
    gg.compile({"y": gg.tanh(state)}, backends=["null:1"], store=store).bind()
    product = gg.label(gg.mul_mat(weight("w", 4, 4), state), "product")
    plan = gg.compile({"y": product}, backends=["null:0", "null:1"], store=store)
    assert where(plan, "product") == "null:1"


def test_the_last_rule_follows_the_choice_even_if_the_device_refused_the_source() -> None:
    source = gg.relu(gg.input("x", "f32", ne=(4,)))
    reader = gg.tanh(source)
    null = [backends.get("null", i) for i in range(2)]
    homes = Homes(Work(Graph({"y": reader}), tuple(null)))
    homes.put(source, null[0], Choice(null[1], fixed=False, free=False))
    assert homes.of[source] is null[0]
    assert homes.choose(reader) == Choice(null[1], fixed=False, free=True)

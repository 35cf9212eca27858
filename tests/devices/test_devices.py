"""Random graphs on several devices give the bits of one device."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyggml as gg
from pyggml import backends, passes
from pyggml.graph import Graph
from pyggml.node import Node
from pyggml.passes.work import Work
from pyggml.transfer import origin, transfer

sys.path.append(str(Path(__file__).parent.parent / "plan"))
from graphs import Grower, inputs_of

# Random graphs read and write states in every order.
pytestmark = pytest.mark.filterwarnings("ignore::pyggml.errors.StateWarning")

PLACES = ("null:0", "null:1", "numpy")
#: Ops that a null device may refuse; NumPy runs them, or the op's meaning replaces them.
REFUSED = ("relu", "add", "mul_mat", "soft_max_ext", "cont", "concat", "fused_up_gate", "multi_add")


class Fused(Grower):
    """A grower that also draws ops with a meaning, and labels its nodes."""

    def __init__(self, draw: Any, states: bool) -> None:
        super().__init__(draw, states)
        self.count = count()

    def step(self) -> None:
        before = len(self.nodes)
        choice = self.draw(st.integers(0, 5))
        if choice == 1 and self.handles:
            first, rows = self.draw(st.integers(0, 2)), self.draw(st.integers(1, 3))
            part = gg.view(self.handles["s"], ne=(4, rows), start=(0, first))
            self.nodes.append(gg.scale(part, s=0.5))  # a few rows, perhaps on another device
        elif choice == 0:
            a = self.pick()
            weights = [
                gg.constant(np.linspace(s, 1, 3 * a.ne[0]).reshape(3, -1), dtype="f32")
                for s in (-1, -0.5)
            ]
            hidden = gg.fused_up_gate(*weights, a)
            sums = hidden.ne[3] == 1 and self.draw(st.booleans())
            self.nodes.append(gg.multi_add(hidden) if sums else hidden)
        else:
            super().step()
        for node in self.nodes[before:]:
            gg.label(node, f"n{next(self.count)}")


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    """A graph, places in any order, pins, ops that null devices refuse, and the pace of queues."""
    grower = Fused(draw, states=draw(st.booleans()))
    for _ in range(draw(st.integers(8, 25))):
        grower.step()
    candidates = grower.nodes + grower.old
    chosen = draw(st.lists(st.sampled_from(candidates), min_size=1, max_size=4))
    chosen.append(grower.nodes[-1])
    places = draw(st.permutations(PLACES))
    patterns = [rf"^n\d*{digit}$" for digit in range(10)] + ["^x0$", "^c$", "^s$"]
    where = [draw(st.sampled_from((*PLACES, None))) for _ in patterns]
    pins = {pattern: to for pattern, to in zip(patterns, where) if to is not None}
    return {
        "outputs": {f"y{i}": node for i, node in enumerate(chosen)},
        "updates": grower.updates,
        "places": places,
        "pins": pins,
        "denied": [draw(st.sets(st.sampled_from(REFUSED), max_size=3)) for _ in range(2)],
        "pace": draw(st.none() | st.integers(0, 9)),
    }


def devices(case: dict[str, Any], stack: ExitStack) -> None:
    """Set up the null devices for a case, until the stack closes."""
    for i, denied in enumerate(case["denied"]):
        device: Any = backends.get("null", i)
        stack.enter_context(device.denying(*denied))
        device.queue.pace = None if case["pace"] is None else Random(case["pace"])
        stack.callback(setattr, device.queue, "pace", None)


def check_splits(plan: gg.Plan) -> None:
    """Each tensor is copied to a device once, and steps read earlier results of their device."""
    copied: set[tuple[Node, str]] = set()
    known = {node for node in plan.graph.nodes if node.op.leaf}
    known |= {n for n in plan.graph.nodes if n.op is transfer and n.attrs["resident"]}
    for split in plan.splits:
        for step in (*split.copies, *split.steps):
            for read in step.reads:
                assert read.base in known
            if step.node.op is transfer:
                key = origin(step.node).base, split.backend.place
                assert key not in copied
                copied.add(key)
            known.update(step.nodes)
    for before, after in zip(plan.splits, plan.splits[1:]):
        assert before.backend is not after.backend


@pytest.mark.filterwarnings("ignore:the pin")
@settings(max_examples=250)
@given(cases())
def test_several_devices_give_the_bits_of_one(case: dict[str, Any]) -> None:
    outputs, updates = case["outputs"], case["updates"]
    with ExitStack() as stack:
        devices(case, stack)
        try:
            plan = gg.compile(outputs, updates=updates, backends=case["places"], pins=case["pins"])
        except (gg.GraphError, gg.UnsupportedOpError) as error:
            assert "pinned" in str(error)  # no plan can obey the pin
            return
        check_splits(plan)
        work = Work(
            Graph(outputs, updates),
            tuple(backends.get(*place(p)) for p in case["places"]),
            tuple(plan._work.pins),
        )
        expanded = passes.assign(passes.protect(work)).graph
        feed = inputs_of(Graph(outputs, updates).nodes)
        runs = [plan.run(feed) for _ in range(2)]
        states = {n.attrs["name"] for n in plan.graph.nodes if n.op.name == "state"}
        kept = {name: plan.store.read(name) for name in states}
        # Another plan of the store, in which only the places of states are fixed.
        again = gg.compile(
            outputs, updates=updates, backends=case["places"][::-1], store=plan.store
        )
        check_splits(again)
        runs.append(again.run(feed))
    alone = gg.compile(expanded.outputs, updates=expanded.updates)
    expected = [alone.run(feed) for _ in range(2)]
    for got, want in zip(runs, expected):
        for key in want:
            np.testing.assert_array_equal(got[key].view(np.uint8), want[key].view(np.uint8), key)
    for name, array in kept.items():
        np.testing.assert_array_equal(array, alone.store.read(name))
    plain = gg.compile(outputs, updates=updates)
    for got in runs:
        for key, want in plain.run(feed).items():
            np.testing.assert_allclose(got[key], want, rtol=1e-4, atol=1e-5)


def place(text: str) -> tuple[str, int]:
    name, _, index = text.partition(":")
    return name, int(index or 0)

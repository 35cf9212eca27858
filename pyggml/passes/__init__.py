"""From a graph to steps with places: plain functions from Work to Work, in this order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pyggml.dag import toposort
from pyggml.passes.assign import expand
from pyggml.passes.budget import apply_budget, score_tensors
from pyggml.passes.lowering import lower
from pyggml.passes.placement import place
from pyggml.passes.states import keep_outputs, state_edges
from pyggml.passes.work import Work
from pyggml.verify import verify, verifying


def protect_outputs(work: Work) -> Work:
    """Outputs that look at states which the run overwrites become copies."""
    return replace(work, graph=keep_outputs(work.graph))


def assign_ops(work: Work) -> Work:
    """Nodes that the backend lacks are said in simpler ops."""
    return replace(work, graph=expand(work.graph, work.backend))


def split_attention(work: Work) -> Work:
    """Computations whose attention memory exceeds the budget become loops."""
    if work.amb is None:
        return replace(work, scores=frozenset(score_tensors(work.graph)))
    return apply_budget(work, finish)


def order_nodes(work: Work) -> Work:
    """One order for all nodes: sources first, readers of a state before its writers."""
    edges = state_edges(work.graph.nodes)
    return replace(work, order=toposort(work.graph.roots, edges))


def lower_nodes(work: Work) -> Work:
    """Steps of the backend, loop bodies lowered and placed inside theirs."""
    keep = frozenset(work.graph.roots)
    return replace(work, steps=tuple(lower(work.order, work.backend, keep, work.scores)))


def place_tensors(work: Work) -> Work:
    """Every tensor's place in the arena or in a leaf."""
    placed = place(
        work.order,
        work.steps,
        frozenset(work.graph.roots),
        frozenset(work.leaves),
        work.scores,
        work.backend.alignment,
    )
    return replace(work, placement=placed)


PIPELINE: tuple[Callable[[Work], Work], ...] = (
    protect_outputs,
    assign_ops,
    split_attention,
    order_nodes,
    lower_nodes,
    place_tensors,
)


def finish(work: Work) -> Work:
    """Order, steps and places of a graph whose ops are settled."""
    return place_tensors(lower_nodes(order_nodes(work)))


def run(work: Work) -> Work:
    """Every pass in turn; with PYGGML_VERIFY=1 the invariants are checked after each."""
    for step in PIPELINE:
        work = step(work)
        if verifying():
            verify(work, after=step.__name__)
    return work

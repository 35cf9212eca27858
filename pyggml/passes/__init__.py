"""From a graph to steps with places: plain functions from Work to Work, in this order."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from dataclasses import replace

from pyggml.node import rewriting
from pyggml.passes.assign import assign
from pyggml.passes.borders import cross_borders
from pyggml.passes.budget import apply_budget
from pyggml.passes.placement import place
from pyggml.passes.regions import score_tensors
from pyggml.passes.schedule import lower_nodes, order_nodes
from pyggml.passes.states import keep_outputs
from pyggml.passes.verify import verify, verifying
from pyggml.passes.work import Work


def protect_outputs(work: Work) -> Work:
    """Outputs that look at states which the run overwrites become copies."""
    return replace(work, graph=keep_outputs(work.graph))


def assign_ops(work: Work) -> Work:
    """Every node gets a device; ops that it lacks are said in simpler ones."""
    return assign(work)


def split_attention(work: Work) -> Work:
    """Computations whose attention memory exceeds the budget become loops."""
    if work.amb is None:
        return replace(work, scores=frozenset(score_tensors(work.graph)))
    return apply_budget(work, finish)


def place_tensors(work: Work) -> Work:
    """Every tensor's place in an arena or in a leaf."""
    alignments: dict[str, int] = {}
    for backend in work.backends:
        alignments[backend.device] = max(backend.alignment, alignments.get(backend.device, 1))
    placed = place(
        work.order,
        work.steps,
        frozenset(work.graph.roots),
        frozenset(work.leaves),
        work.scores,
        alignments,
        lambda node: work.home(node).device,
    )
    return replace(work, placement=placed)


PIPELINE: tuple[Callable[[Work], Work], ...] = (
    protect_outputs,
    assign_ops,
    split_attention,
    cross_borders,
    order_nodes,
    lower_nodes,
    place_tensors,
)


def finish(work: Work) -> Work:
    """Borders, order, steps and places of a graph whose ops are settled."""
    return place_tensors(lower_nodes(order_nodes(cross_borders(work))))


def run(work: Work) -> Work:
    """Every pass in turn; with PYGGML_VERIFY=1 the invariants are checked after each."""
    # In a context of its own, so that an interrupt leaves nobody's nodes in the rewriting.
    return copy_context().run(_run, work)


def _run(work: Work) -> Work:
    with rewriting(work.graph.nodes):
        for step in PIPELINE:
            work = step(work)
            if verifying():
                verify(work, after=step.__name__)
    return work

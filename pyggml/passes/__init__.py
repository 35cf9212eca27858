"""From a graph to steps with places in memory: functions from Work to Work, in this order."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from functools import reduce

from pyggml.interning import rewriting
from pyggml.passes.assign import assign
from pyggml.passes.budget import within_budget
from pyggml.passes.cross import cross
from pyggml.passes.fold import folded
from pyggml.passes.lower import lower
from pyggml.passes.order import order
from pyggml.passes.place import place
from pyggml.passes.protect import protect
from pyggml.passes.shard import shard
from pyggml.passes.verify import verify, verifying
from pyggml.passes.work import Work

Pass = Callable[[Work], Work]

#: The passes after the budget.
FINISH: tuple[Pass, ...] = (cross, order, lower, place)


def finish(work: Work) -> Work:
    """The work after FINISH. The budget measures with it what a way to cut needs."""
    return reduce(lambda work, step: step(work), FINISH, work)


def fold(work: Work) -> Work:
    """The graph in which constants replace what every run would compute from constants alone."""
    return folded(work, run)


def budget(work: Work) -> Work:
    """The graph in which attentions that need more memory than the budget are loops."""
    return within_budget(work, finish)


PIPELINE: tuple[Pass, ...] = (protect, assign, shard, fold, budget, *FINISH)


def run(work: Work) -> Work:
    """The work after every pass; with PYGGML_VERIFY=1 each one's result is checked."""
    # In its own context: if an interrupt ends it, no other graph's nodes are built as this one's.
    return copy_context().run(_run, work)


def _run(work: Work) -> Work:
    with rewriting(work.graph.nodes):
        for step in PIPELINE:
            work = step(work)
            if verifying():
                verify(work, after=step.__name__)
    return work

"""Outputs that look at states which the run overwrites become copies taken in time."""

from __future__ import annotations

from dataclasses import replace

from pyggml.graph import Graph
from pyggml.ops.copy import cont
from pyggml.passes.order import state_writes, versions
from pyggml.passes.work import Work


def protect(work: Work) -> Work:
    """The graph in which every output shows what it does where its node stands."""
    graph = work.graph
    seen = versions(graph.nodes)
    writes = state_writes(graph.nodes, seen)
    stale = {key: cont(node) for key, node in graph.outputs.items() if seen.get(node) in writes}
    if not stale:
        return work
    return replace(work, graph=Graph({**graph.outputs, **stale}, graph.updates))

"""Copies outputs that show a state before the run overwrites the state."""

from __future__ import annotations

from dataclasses import replace

from pyggml.graph import Graph
from pyggml.ops.copy import cont
from pyggml.passes.order import state_writes, versions
from pyggml.passes.work import Work


def protect(work: Work) -> Work:
    """The graph in which each output keeps the values that it has at its node."""
    graph = work.graph
    handles = versions(graph.nodes)
    writes = state_writes(graph.nodes, handles)
    stale = {key: cont(node) for key, node in graph.outputs.items() if handles.get(node) in writes}
    if not stale:
        return work
    return replace(work, graph=Graph({**graph.outputs, **stale}, graph.updates))

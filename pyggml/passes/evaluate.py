"""Computes a node whose leaves are all constants, on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from pyggml.backends import get
from pyggml.backends.host_memory import allocated
from pyggml.backends.step import Address
from pyggml.graph import Graph
from pyggml.node import Node
from pyggml.ops.leaf import data_of
from pyggml.passes.work import Work


def value_of(node: Node, run: Callable[[Work], Work]) -> NDArray[Any]:
    """The values of `node` in the form that a constant stores, as a new array.

    It takes memory for itself and for the largest of its parts; nothing of it stays.

    run  all passes
    Errors: those of NumPy's kernels, with the op and the user's line.
    """
    host = get("numpy")
    work = run(Work(Graph({"value": node}), (host,), fuse=False))
    arena = allocated(work.placed.arenas[host.device].nbytes)
    memory = {leaf: host.weight(leaf, work.layouts[leaf], data_of(leaf)) for leaf in work.leaves}
    at = {
        tensor: Address(arena if spot.base is None else memory[spot.base], spot.offset, spot.nb)
        for tensor, spot in work.placed.spots.items()
    }
    host.bind(work.steps, at, arena, work.placed.scratch_at).run()
    return host.download(at[work.graph.outputs["value"]], node.spec)

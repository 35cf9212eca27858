"""What travels through the passes."""

from __future__ import annotations

from dataclasses import dataclass

from pyggml.backends.base import Backend, Step
from pyggml.dag import Graph
from pyggml.graph import Node
from pyggml.passes.placement import Placement


@dataclass(frozen=True, slots=True)
class Work:
    """A graph on its way to a plan. Every pass returns a new one with its part filled in.

    amb        the attention memory budget in bytes, None for no budget
    scores     tensors that the budget counts (those inside loops too)
    order      all nodes in the order in which they run
    warnings   what the user should hear
    """

    graph: Graph
    backend: Backend
    amb: int | None = None
    scores: frozenset[Node] = frozenset()
    order: tuple[Node, ...] = ()
    steps: tuple[Step, ...] = ()
    placement: Placement | None = None
    warnings: tuple[str, ...] = ()

    @property
    def placed(self) -> Placement:
        assert self.placement is not None
        return self.placement

    @property
    def leaves(self) -> tuple[Node, ...]:
        return tuple(node for node in self.order if node.op.leaf)

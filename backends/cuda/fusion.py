"""Steps that cover several nodes: patterns that `lower` looks for before each node gets its own.

A family registers a pattern by the op that ends it:

    @fuses(ops.mul)
    def norm_times_row(node: Node, alone: Alone) -> Fused | None: ...
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pyggml.backends.base import Step
from pyggml.backends.cuda.launch import Call
from pyggml.graph import Node, Op
from pyggml.ops.leaf import state_op
from pyggml.ops.views import root_of

#: Whether nothing but the pattern reads a node, so that it needs no memory.
Alone = Callable[[Node], bool]


@dataclass(frozen=True, slots=True)
class Fused:
    """One step for `nodes`, the last of which is its result; only its attributes may be shifted by
    a loop.

    reads    what the kernel takes: `call.src`, in this order
    record   as in the kernel table; `call.node` and `call.attrs` are the last node's
    inplace  sources whose memory the result may take over
    """

    nodes: tuple[Node, ...]
    reads: tuple[Node, ...]
    record: Callable[[Call], None]
    inplace: tuple[Node, ...] = ()
    scratch: int = 0


Fuser = Callable[[Node, Alone], Fused | None]

FUSERS: dict[Op[Any], list[Fuser]] = {}


def fuses(last: Op[Any]) -> Callable[[Fuser], Fuser]:
    """Register a pattern that ends in that op; the first that matches counts."""

    def register(fuser: Fuser) -> Fuser:
        FUSERS.setdefault(last, []).append(fuser)
        return fuser

    return register


def _match(node: Node, alone: Alone) -> Fused | None:
    return next((f for fuser in FUSERS.get(node.op, ()) if (f := fuser(node, alone))), None)


def fused_of(step: Step) -> Fused | None:
    """The pattern of a step that `fused` made; None of a step for one node."""
    return _match(step.node, lambda node: node in step.nodes) if len(step.nodes) > 1 else None


def fused(nodes: Sequence[Node], keep: Collection[Node]) -> Iterator[Node | Fused]:
    """`nodes` in order, those that a pattern covers as one where its last node stands."""
    readers = Counter(_seen(s) for node in nodes for s in node.src if s is not None)
    found: dict[Node, Fused] = {}
    covered: set[Node] = set()
    for node in reversed(nodes):
        if node in covered:
            continue
        match = _match(node, lambda n: n not in keep and readers[n] == 1)
        if match is not None and not _reads_states(match):
            found[node] = match
            covered.update(match.nodes[:-1])
    for node in nodes:
        if node not in covered:
            yield found.get(node, node)


def _seen(node: Node) -> Node:
    """What a view looks at."""
    while node.op.view is not None:
        assert node.src[0] is not None
        node = node.src[0]
    return node


def _reads_states(match: Fused) -> bool:
    """Whether an earlier node reads a state: read later, it could be overwritten already."""
    return any(
        root_of(s).op is state_op for node in match.nodes[:-1] for s in node.src if s is not None
    )

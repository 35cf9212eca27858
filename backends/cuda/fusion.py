"""Steps, and how patterns cover several nodes by one of them.

A family writes a pattern, a function of the last node that it would cover:

    def norm_times_row(node: Node, run: Run) -> Fused | None: ...

and patterns.py lists it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from pyggml.backends.base import Step
from pyggml.backends.cuda.launch import Call
from pyggml.node import Node, Op
from pyggml.ops.leaf import state_op


class CudaStep(Step):
    """A step of kernels for `nodes`, the last of which is its result.

    operands  what the kernels read, by the names that `record` uses: call["b"]
    results   what they write besides the last node's tensor, by name as well
    record    records the launches when a plan is bound
    """

    __slots__ = ("operands", "record", "results")

    def __init__(
        self,
        nodes: tuple[Node, ...],
        operands: Mapping[str, Node],
        record: Callable[[Call], None],
        *,
        results: Mapping[str, Node] | None = None,
        inplace: tuple[Node, ...] = (),
        scratch: int = 0,
        workspace: int = 0,
    ) -> None:
        super().__init__(
            nodes[-1],
            nodes,
            tuple(operands.values()),
            scratch=scratch,
            inplace=inplace,
            workspace=workspace,
        )
        self.operands, self.results, self.record = operands, results or {}, record


class Fused(CudaStep):
    """A step that covers the `nodes` of a pattern. A loop may shift only the last one's attributes.

    reads      the operands by name; none of them is one of `nodes`
    record     as in the kernel table; `call.node` and `call.attrs` are the last node's
    results    those of `nodes`, besides the last, that stay in memory because others read them
    inplace    operands whose memory the result may take over
    at         the node in whose place the step runs, if not the last: one of `nodes` before it
    recompute  those of `nodes` that every step reading them computes for itself. Where one reader
               cannot, they are computed once and kept, for all
    """

    __slots__ = ("at", "recompute")

    def __init__(
        self,
        nodes: tuple[Node, ...],
        reads: Mapping[str, Node],
        record: Callable[[Call], None],
        *,
        results: Mapping[str, Node] | None = None,
        inplace: tuple[Node, ...] = (),
        scratch: int = 0,
        at: Node | None = None,
        recompute: tuple[Node, ...] = (),
    ) -> None:
        super().__init__(nodes, reads, record, results=results, inplace=inplace, scratch=scratch)
        self.at, self.recompute = at or nodes[-1], recompute


class Run:
    """The nodes that are lowered together, in order, and who reads what of them."""

    def __init__(self, nodes: Sequence[Node], keep: Collection[Node]) -> None:
        self.nodes, self.keep = nodes, keep
        self.number = {node: i for i, node in enumerate(nodes)}
        self.readers: dict[Node, list[Node]] = {}  # through views
        for node in nodes:
            for source in node.src:
                if source is not None:
                    self.readers.setdefault(source.base, []).append(node)

    def only(self, node: Node, *readers: Node) -> bool:
        """Whether a node of the run is read by nothing but these, so that it needs no memory."""
        alone = node in self.number and node not in self.keep
        return alone and set(self.readers.get(node, ())) <= set(readers)

    def allows(self, step: Fused) -> bool:
        """Whether what the step reads is computed before it, and still the same where it runs."""
        place = self.number[step.at]
        inside, read = set(step.nodes), {node.base for node in step.reads}
        if read & inside or any(self.number.get(node, -1) >= place for node in read):
            return False
        results = step.results.values()
        outside = (r for node in results for r in self.readers.get(node, ()) if r not in inside)
        if any(self.number[reader] <= place for reader in outside):
            return False
        return not any(self._changed(node, place, inside) for node in step.nodes)

    def _changed(self, node: Node, place: int, inside: Collection[Node]) -> bool:
        """Whether a state that `node` reads would be another at `place`."""
        states = {s.root for s in node.src if s is not None and s.root.op is state_op}
        first, last = sorted((self.number.get(node, place), place))
        return bool(states) and any(
            other.op.writes is not None and other not in inside and other.root in states
            for other in self.nodes[first : last + 1]
        )


Match = Callable[[Node, Run], Fused | None]
#: A pattern, and the ops that may end it.
Pattern = tuple[Match, tuple[Op[Any], ...]]


def covered(
    nodes: Sequence[Node], keep: Collection[Node], patterns: Sequence[Pattern]
) -> Iterator[Node | Fused]:
    """`nodes` in order, those that a pattern covers as one step where it runs.

    From the last node to the first; of each the first pattern that matches.
    """
    run = Run(nodes, keep)
    by_last: dict[Op[Any], list[Match]] = {}
    for match, last in patterns:
        for op in last:
            by_last.setdefault(op, []).append(match)
    steps: list[Fused] = []
    taken: set[Node] = set()
    for node in reversed(nodes):
        for match in by_last.get(node.op, ()) if node not in taken else ():
            step = match(node, run)
            if step is None:
                continue
            own = set(step.nodes) - set(step.recompute)
            if not taken & own and run.allows(step):
                steps.append(step)
                taken.update(own)
                break
    return _in_order(nodes, run, steps)


def _in_order(nodes: Sequence[Node], run: Run, steps: Sequence[Fused]) -> Iterator[Node | Fused]:
    """A step that would recompute a node which another reader needs in memory is dropped."""
    recomputed = {(node, step.node) for step in steps for node in step.recompute}
    kept = {n for n, _ in recomputed if any((n, r) not in recomputed for r in run.readers[n])}
    steps = [step for step in steps if not kept & set(step.recompute)]
    places = {step.at: step for step in steps}
    inside = {node for step in steps for node in step.nodes}
    for node in nodes:
        if node in places:
            yield places[node]
        elif node not in inside:
            yield node

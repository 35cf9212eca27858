"""Steps, and patterns that cover several nodes by one step.

A pattern is a function of the last node that it would cover:

    def norm_times_row(node: Node, run: Run) -> Fused | None: ...

patterns.py lists all patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pyggml.backends.cuda.launch import Call
from pyggml.backends.step import Layouts, Step
from pyggml.node import Node
from pyggml.operation import Op
from pyggml.ops.leaf import state_op
from pyggml.ops.views import reshape


class CudaStep(Step):
    """A step that computes `nodes` with kernels; the last node is its result.

    operands  the nodes that the kernels read, by the names that `record` uses: call["b"]
    results   the nodes they write besides the last one, also by name
    record    records the launches when a plan is bound
    late      whether the step right before may compute the ids of a product by expert
    before    the nodes that the launch right before computes; None: unknown
    unread    whether others read the result only as f16, which the step also writes
    """

    __slots__ = ("before", "late", "operands", "record", "results", "unread")

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
        self.late, self.unread = True, False
        self.before: tuple[Node, ...] | None = None

    def awaited(self) -> frozenset[str]:
        """The names of operands that the launch right before may write: a kernel reads them only
        after it has waited for that launch."""
        if self.before is None:
            return frozenset(self.operands)
        written = {node.root for node in self.before if node.op.writes is not None}
        return frozenset(
            name
            for name, node in self.operands.items()
            if node.base in self.before or node.root in written
        )


class Fused(CudaStep):
    """A step that covers the `nodes` of a pattern. In a loop, only the last node's attributes may
    shift.

    reads      the operands by name; must not contain any of `nodes`
    record     as in the kernel table; `call.node` and `call.attrs` are those of the last node
    results    nodes besides the last one that stay in memory because others read them
    inplace    operands whose memory the result may take over
    workspace  as in Step
    at         the node whose place in the order the step takes, if not the last one
    fixed      whether `record` can also write the result in fixed point, to call["fixed"]
    halves     0, or how many dimensions of the result are a row that it can also write as f16 for
               `tile`, to call["halves"], or call["left_halves"] if there is a `product`
    quantized  a node that `record` reads in fixed point, as call["fixed"]
    product    one of the nodes whose launches `record` uses, so other steps may prepare what it
               reads
    rows       a node that `record` may read as f16 for `tile`, as call["rows"], if another step
               prepares that
    recompute  nodes that each fused reader computes for itself. If any reader cannot, they are
               computed once and stored, for all readers
    """

    __slots__ = ("at", "fixed", "halves", "product", "quantized", "recompute", "rows")

    def __init__(
        self,
        nodes: tuple[Node, ...],
        reads: Mapping[str, Node],
        record: Callable[[Call], None],
        *,
        results: Mapping[str, Node] | None = None,
        inplace: tuple[Node, ...] = (),
        scratch: int = 0,
        workspace: int = 0,
        at: Node | None = None,
        fixed: bool = False,
        halves: int = 0,
        quantized: Node | None = None,
        product: Node | None = None,
        rows: Node | None = None,
        recompute: tuple[Node, ...] = (),
    ) -> None:
        super().__init__(
            nodes, reads, record,
            results=results, inplace=inplace, scratch=scratch, workspace=workspace,
        )  # fmt: skip
        self.at, self.fixed, self.recompute = at or nodes[-1], fixed, recompute
        self.halves, self.quantized, self.product, self.rows = halves, quantized, product, rows


#: All weights are plain.
NO_LAYOUTS: Layouts = MappingProxyType({})


class Run:
    """The nodes that are lowered together, in order, the readers of each, and the layouts of
    weights."""

    def __init__(
        self, nodes: Sequence[Node], keep: Collection[Node], layouts: Layouts = NO_LAYOUTS
    ) -> None:
        self.nodes, self.keep, self.layouts = nodes, keep, layouts
        self.number = {node: i for i, node in enumerate(nodes)}
        self.readers: dict[Node, list[Node]] = {}  # also those through views
        for node in nodes:
            for source in node.src:
                if source is not None:
                    self.readers.setdefault(source.base, []).append(node)

    def only(self, node: Node, *readers: Node) -> bool:
        """Whether only `readers` read the node (which must be in the run), so it needs no
        memory."""
        alone = node in self.number and node not in self.keep
        return alone and set(self.readers.get(node, ())) <= set(readers)

    def layout(self, weight: Node) -> str:
        """The name of the layout in which the weight is stored."""
        layout = self.layouts.get(weight.base)
        return "plain" if layout is None else layout.name

    def allows(self, step: Fused) -> bool:
        """Whether all that the step reads is computed before the step runs and not overwritten
        until then, and all readers of its results come later."""
        place = self.number[step.at]
        inside, read = set(step.nodes), {node.base for node in step.reads}
        if read & inside or any(self.number.get(node, -1) >= place for node in read):
            return False
        results = step.results.values()
        outside = (r for node in results for r in self.readers.get(node, ()) if r not in inside)
        if any(self.number[reader] <= place for reader in outside):
            return False
        return not any(self.changed(node, place, inside) for node in step.nodes)

    def changed(self, node: Node, place: int, inside: Collection[Node] = ()) -> bool:
        """Whether a state that `node` reads is written between `node` and `place`."""
        states = {s.root for s in node.src if s is not None and s.root.op is state_op}
        first, last = sorted((self.number.get(node, place), place))
        return bool(states) and any(
            other.op.writes is not None and other not in inside and other.root in states
            for other in self.nodes[first : last + 1]
        )


def paired(
    steps: Sequence[CudaStep], pair: Callable[[CudaStep, CudaStep], CudaStep | None]
) -> Iterator[CudaStep]:
    """The steps, with a step and the one right behind it as one where `pair` makes one of them."""
    before: CudaStep | None = None
    for step in steps:
        both = None if before is None else pair(before, step)
        if both is None and before is not None:
            yield before
        before = both or step
    if before is not None:
        yield before


def behind_reshapes(node: Node) -> Node:
    """What a node is a reshape of, however often."""
    while node.op is reshape:
        node = node["a"]
    return node


Match = Callable[[Node, Run], Fused | None]
#: A pattern, and the ops that may come last in it.
Pattern = tuple[Match, tuple[Op[Any], ...]]


def covered(
    nodes: Sequence[Node],
    keep: Collection[Node],
    patterns: Sequence[Pattern],
    layouts: Layouts = NO_LAYOUTS,
) -> Iterator[Node | Fused]:
    """`nodes` in order, with those that a pattern covers replaced by one step.

    Searches from the last node to the first; for each node the first pattern that matches wins.
    """
    run = Run(nodes, keep, layouts)
    by_last: dict[Op[Any], list[Match]] = {}
    for match, last in patterns:
        for op in last:
            by_last.setdefault(op, []).append(match)
    steps: list[Fused] = []
    members: set[Node] = set()
    for node in reversed(nodes):
        for match in by_last.get(node.op, ()) if node not in members else ():
            step = match(node, run)
            if step is None:
                continue
            own = set(step.nodes) - set(step.recompute)
            if not members & own and run.allows(step):
                steps.append(step)
                members.update(own)
                break
    return _in_order(nodes, run, steps)


def _in_order(nodes: Sequence[Node], run: Run, steps: Sequence[Fused]) -> Iterator[Node | Fused]:
    """The nodes and steps in order. Drops steps that would recompute a node which another reader
    needs in memory."""
    recomputed = {(n, reader) for step in steps for n in step.recompute for reader in step.nodes}
    stored = {n for n, _ in recomputed if any((n, r) not in recomputed for r in run.readers[n])}
    steps = [step for step in steps if not stored & set(step.recompute)]
    places = {step.at: step for step in steps}
    inside = {node for step in steps for node in step.nodes}
    for node in nodes:
        if node in places:
            yield places[node]
        elif node not in inside:
            yield node

"""Run one node in memory of the test's own: NaN around every source shows wrong reads, guards
around every tensor show wrong writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml import passes
from pyggml.backends.base import Backend, Runner
from pyggml.backends.step import Address, Buffer, own_nodes
from pyggml.dtypes import dtype
from pyggml.errors import PyggmlError
from pyggml.graph import Graph
from pyggml.node import Node
from pyggml.ops.leaf import constant_op, data_of
from pyggml.passes.work import Work
from pyggml.spec import Ne, Spec

Array = NDArray[Any]

#: Bytes before and after every tensor; a multiple of every backend's alignment.
GUARD = 1024
#: Blocks by which rows of a strided result are longer than contiguous ones.
PADDING = 4
#: Words in results and scratch before a run: NaN in every float type and an invalid id; for the
#: second run an ordinary number. A result that depends on them differs.
POISON, NUMBER = 0x7FFFFFFF, 0x3F803F80

_BYTE = dtype("i8")


class Violation(PyggmlError):
    """A kernel wrote outside its memory, or its result depends on data that it may not read."""


@dataclass(frozen=True, slots=True)
class _Block:
    """Memory of one tensor; `nbytes` includes its guards."""

    buffer: Buffer
    nbytes: int

    def at(self) -> tuple[Address, Spec]:
        return Address(self.buffer, 0, (1, *(self.nbytes,) * 3)), Spec.of(_BYTE, [self.nbytes])


class Bed:
    """The steps of a node, and its leaves with their values.

    arrays  of inputs and states by name, four-dimensional, in their types' storage; the rows of an
            array that is smaller than its leaf are spread over the whole leaf
    at      address of each leaf
    blocks  guarded memory of each leaf, except for constants (the backend allocates them) and
            leaves that are larger than their array; only a second run checks those for changes
    """

    def __init__(self, backend: Backend, node: Node, arrays: Mapping[str, Array]) -> None:
        self.backend = backend
        self.work = passes.run(Work(Graph({"y": node}), (backend,)))
        self.result = self.work.graph.outputs["y"]
        self.arrays = arrays
        self.blocks: dict[Node, _Block] = {}
        self.at = {leaf: self._address(leaf) for leaf in self.work.leaves}

    def _address(self, leaf: Node) -> Address:
        if leaf.op is constant_op:
            layout = self.work.layouts[leaf]
            buffer = self.backend.weight(leaf, layout, data_of(leaf))
            return Address(buffer, 0, leaf.spec.nb, layout.name)
        if self._part(leaf).ne != leaf.ne:
            return Address(self.backend.alloc(leaf.spec.nbytes), 0, leaf.spec.nb)
        self.blocks[leaf] = self._block(leaf.spec.nbytes)
        return Address(self.blocks[leaf].buffer, GUARD, leaf.spec.nb)

    def _part(self, leaf: Node) -> Spec:
        """The spec of a leaf's array: the whole leaf, or a few of its rows."""
        rows = self.arrays[leaf.attrs["name"]].shape[2::-1]
        return Spec.of(leaf.dtype, (leaf.ne[0], *rows))

    def place(self, nb: Ne | None = None, onto: Node | None = None) -> Placed:
        """Bind the steps, with strides `nb` for the result, or with the result in leaf `onto`."""
        at: dict[Node, Address] = {}
        blocks: dict[Node | None, _Block] = {}
        order = self.work.order
        for node in (*order, *own_nodes(order, self.work.steps)):
            if node.op.leaf:
                at[node] = self.at[node]
            elif node.op.view is not None or node.op.writes is not None:
                at[node] = _address_of_view(node, at)
            elif node is self.result and onto is not None:
                at[node] = at[onto]
            else:
                strides = nb if nb is not None and node is self.result else node.spec.nb
                blocks[node] = self._block(strides[3] * node.ne[3])
                at[node] = Address(blocks[node].buffer, GUARD, strides)
        scratch = max((step.scratch for step in self.work.steps), default=0)
        blocks[None] = self._block(scratch)
        starts = [GUARD] * len(self.work.steps)
        runner = self.backend.bind(self.work.steps, at, blocks[None].buffer, starts)
        return Placed(self, runner, at, blocks, onto)

    def give(self, leaf: Node) -> None:
        """Write an input or a state, with NaN around it."""
        if leaf in self.blocks:
            self.fill(self.blocks[leaf], POISON)
        at, part = self.at[leaf], self._part(leaf)
        b0, b1, b2, b3 = (b * (rows // n) for b, rows, n in zip(at.nb, leaf.ne, part.ne))
        spread = replace(at, nb=(b0, b1, b2, b3))
        self.backend.upload(spread, part, self.arrays[leaf.attrs["name"]])

    def fill(self, block: _Block, word: int) -> None:
        """Fill a block and its guards with copies of a 32-bit word."""
        at, spec = block.at()
        image = np.full(-(-block.nbytes // 4), word, np.uint32).view(np.int8)
        self.backend.upload(at, spec, image[: block.nbytes])

    def image(self, block: _Block) -> Array:
        """All bytes of a block, guards included."""
        return self.backend.download(*block.at())

    def _block(self, nbytes: int) -> _Block:
        total = GUARD + -(-nbytes // 64) * 64 + GUARD
        return _Block(self.backend.alloc(total), total)


@dataclass(slots=True)
class Placed:
    """A bed with an address for every result.

    blocks  memory of each computed node; under None the scratch
    onto    the leaf that the result replaces, if any
    """

    bed: Bed
    runner: Runner
    at: Mapping[Node, Address]
    blocks: Mapping[Node | None, _Block]
    onto: Node | None

    def run(self, word: int) -> Array:
        """The result of a run with results and scratch full of `word`; then check all memory.

        Errors: Violation.
        """
        bed = self.bed
        written = {n.root for n in bed.work.order if n.op.writes is not None} | {self.onto}
        for leaf in bed.at:
            if leaf.op is not constant_op:
                bed.give(leaf)
        for block in self.blocks.values():
            bed.fill(block, word)
        before = {leaf: bed.image(block) for leaf, block in bed.blocks.items()}
        self.runner.run()
        bed.backend.synchronize()
        values = self._read()
        for leaf, block in bed.blocks.items():
            own = slice(GUARD, GUARD + leaf.spec.nbytes) if leaf in written else slice(0, 0)
            after = bed.image(block)
            after[own] = before[leaf][own]
            name = leaf.attrs["name"]
            _same(after, before[leaf], f"it changed its source {name}, or memory next to it")
        for node, block in self.blocks.items():
            self._check_guards(node, block, word)
        return values

    def _read(self) -> Array:
        result = self.bed.result
        return self.bed.backend.download(self.at[result], result.spec)

    def _check_guards(self, node: Node | None, block: _Block, word: int) -> None:
        """Compare the block with one that is filled again and holds the result."""
        bed = self.bed
        left = bed.image(block)
        if node is None:
            inner = slice(GUARD, block.nbytes - GUARD)
            left[inner] = 0
            bed.fill(block, word)
            want = bed.image(block)
            want[inner] = 0
            _same(left, want, "it wrote past its scratch")
        else:
            values = bed.backend.download(self.at[node], node.spec)
            bed.fill(block, word)
            bed.backend.upload(self.at[node], node.spec, values)
            _same(left, bed.image(block), "it wrote next to its result")


def _same(got: Array, want: Array, what: str) -> None:
    differ = np.flatnonzero(got != want)
    if len(differ):
        raise Violation(f"{what}: {len(differ)} bytes, the first {int(differ[0]) - GUARD} from it")


def _address_of_view(node: Node, at: Mapping[Node, Address]) -> Address:
    source = node.src[node.op.writes or 0]
    assert source is not None
    seen = at[source]
    if node.op.view is None:
        return seen
    view = node.op.view(node, seen.nb)
    assert view is not None
    return replace(seen, offset=seen.offset + view[0], nb=view[1])


def results(
    backend: Backend, node: Node, arrays: Mapping[str, Array]
) -> Iterator[tuple[str, Array]]:
    """(how, result) of every way to run a node.

    A second run over other memory must give the same bits. Then the result goes into strided
    memory, and into the memory of each source that the step declares as `inplace`. A write runs
    again over a state with other bytes.

    Errors: Violation.
    """
    bed = Bed(backend, node, arrays)
    placed = bed.place()
    first = placed.run(POISON)
    yield "", first
    again = placed.run(NUMBER).view(np.uint8)
    if not np.array_equal(first.view(np.uint8), again):
        raise Violation("a second run over other memory gave other bits")
    if bed.result.root.op.leaf:
        if bed.work.steps:
            _check_unwritten(bed, placed, first)
        return
    nb, step = bed.result.spec.nb, bed.work.steps[-1]
    if step.strided:
        row = nb[1] + PADDING * nb[0]
        strides = (nb[0], row, row * (node.ne[1] + 1), row * (node.ne[1] + 1) * (node.ne[2] + 1))
        yield "into a strided result", bed.place(strides).run(POISON)
    for source in step.inplace if len(bed.work.steps) == 1 else ():
        alone = step.reads.count(source) == 1 and source in bed.blocks
        if alone and source.spec.nbytes == step.node.spec.nbytes and source.nb == nb:
            yield f"in place of {source.attrs['name']}", bed.place(onto=source).run(POISON)


def _check_unwritten(bed: Bed, placed: Placed, first: Array) -> None:
    """A write must leave all other elements of the state, and not depend on the old ones."""
    state = bed.result.root
    name, arrays = state.attrs["name"], bed.arrays
    before = np.ascontiguousarray(arrays[name])
    inverted = (~before.view(np.uint8)).view(before.dtype)
    bed.arrays = {**arrays, name: inverted}
    second = placed.run(POISON)
    start = Bed(bed.backend, bed.result.src[bed.result.op.writes or 0] or state, arrays)
    old = start.place().run(POISON).view(np.uint8)
    one, two = first.view(np.uint8), second.view(np.uint8)
    if not ((one == two) | ((one == old) & (two == ~old))).all():
        raise Violation("it changed elements of the state that it does not write")

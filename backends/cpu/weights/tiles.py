"""Which weights are stored in tiles, and storing them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.cpu.native.pool import pool
from pyggml.backends.cpu.native.program import packed
from pyggml.backends.cpu.rows import READABLE
from pyggml.backends.cpu.weights.repack import repack
from pyggml.backends.host_memory import address_of, allocated
from pyggml.backends.host_tiles import FORMS, LAYOUT, ROWS, tiles_of
from pyggml.backends.step import Layouts, WeightLayout
from pyggml.node import Node
from pyggml.ops import get_rows
from pyggml.ops.leaf import constant_op
from pyggml.transfer import origin, transfer


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of a weight, or of a view of it, in its tiles: where they begin, and byte strides of
    tiles and matrices."""

    offset: int
    tile: int
    nb2: int
    nb3: int


def part_of(node: Node) -> Part | None:
    """Where a weight or a view of one is in the weight's tiles; None if its rows or matrices do not
    begin and end with tiles."""
    weight = node.root
    k, m = weight.ne[:2]
    row, tiles = weight.dtype.row_bytes(k), tiles_of(weight.dtype, weight.ne)
    if node.ne[0] != k or node.offset % row or (node.ne[1] > 1 and node.nb[1] != row):
        return None
    first = node.offset // row
    steps = [0 if n == 1 else nb // row for n, nb in zip(node.ne[2:], node.nb[2:])]
    if m % ROWS == 0:  # all rows of the weight follow one another, matrix after matrix
        m = ROWS
    elif first % m + node.ne[1] > m:
        return None
    if first % m % ROWS or any(step % m for step in steps):
        return None
    per_matrix = -(-m // ROWS) * tiles.tile
    offset = first // m * per_matrix + first % m // ROWS * tiles.tile
    return Part(offset, tiles.tile, *(step // m * per_matrix for step in steps))


def read(constant: Node, uses: Collection[Node]) -> bool:
    """Whether the nodes that read the constant, or views of it that begin and end with tiles, read
    it only as a weight of a type that has tiles. A transfer stands for the constant: the GPU that
    reads it packs its copy from tiles too."""
    if constant.dtype.name not in FORMS:
        return False
    shown = {constant: False}  # the constant and views of it -> whether something reads them
    for use in uses:
        names = {name for name in use.op.operands if use.get(name) in shown}
        for name in names:
            shown[use[name]] = True
        if use.op is transfer:
            shown[use] = False
        elif use.op.view is not None:
            if part_of(use) is None:
                return False
            shown[use] = False
        elif use.op is get_rows:
            if names != {"a"} or use["a"] is not constant:
                return False
        elif not names or not names <= set(use.op.weights):
            return False
    return all(shown.values())  # what nothing reads is an output


def layout_of(constant: Node) -> WeightLayout:
    return WeightLayout(tiles_of(constant.dtype, constant.ne).nbytes, LAYOUT)


def may_be_tiled(node: Node, *names: str) -> bool:
    """Whether these operands are constants of types that have tiles, or views of such. All readers
    decide; see `ready`."""
    return all(
        node[name].dtype.name in FORMS
        and origin(node[name].root).op is constant_op
        and part_of(node[name]) is not None
        for name in names
    )


def ready(node: Node, layouts: Layouts) -> bool:
    """Whether the weights that the node's kernel needs in tiles are stored so. Caches have rows of
    blocks, and get_rows reads those too."""
    if node.op is get_rows and node["a"].dtype.name in READABLE:
        return True
    names = {"a"} if node.op is get_rows else set(node.op.weights)
    return all(
        source.root in layouts and layouts[source.root].name == LAYOUT
        for source in (node[name] for name in names)
        if source.dtype.name in FORMS
    )


def repacked(constant: Node, layout: WeightLayout, data: NDArray[Any]) -> NDArray[np.uint8]:
    """The weight in tiles, from rows as in a file."""
    dtype, ne = constant.dtype, constant.ne
    tiles = tiles_of(dtype, ne)
    rows = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    out = allocated(layout.nbytes)
    program = packed(
        [(repack(dtype.name), (
            address_of(rows), dtype.row_bytes(ne[0]), address_of(out), tiles.tile,
            ne[1], tiles.tiles, tiles.matrices, tiles.groups,
        ))]
    )  # fmt: skip
    pool().run(program)
    return out

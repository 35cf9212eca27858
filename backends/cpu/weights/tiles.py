"""Which weights are stored in tiles, and storing them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.cpu.native.pool import pool
from pyggml.backends.cpu.native.program import packed
from pyggml.backends.cpu.rows import READABLE
from pyggml.backends.cpu.weights.forms import FORMS, tiles_of
from pyggml.backends.cpu.weights.repack import repack
from pyggml.backends.host_memory import address_of, allocated
from pyggml.backends.step import Layouts, WeightLayout
from pyggml.node import Node
from pyggml.ops import get_rows
from pyggml.ops.leaf import constant_op
from pyggml.transfer import origin

#: The layout of `forms.py`.
LAYOUT = "tiles16"


def reads(use: Node, constant: Node) -> bool:
    """Whether the node reads the constant only as a weight of a type that has tiles."""
    names = {name for name in use.op.operands if use.get(name) is constant}
    known = {"a"} if use.op is get_rows else set(use.op.weights)
    return constant.dtype.name in FORMS and bool(names) and names <= known


def layout_of(constant: Node) -> WeightLayout:
    return WeightLayout(tiles_of(constant.dtype, constant.ne).nbytes, LAYOUT)


def may_be_tiled(node: Node, *names: str) -> bool:
    """Whether these operands are constants of types that have tiles. All readers decide; see
    `ready`."""
    return all(
        node[name].dtype.name in FORMS and origin(node[name]).op is constant_op for name in names
    )


def ready(node: Node, layouts: Layouts) -> bool:
    """Whether the weights that the node's kernel needs in tiles are stored so. Caches have rows of
    blocks, and get_rows reads those too."""
    if node.op is get_rows and node["a"].dtype.name in READABLE:
        return True
    names = {"a"} if node.op is get_rows else set(node.op.weights)
    return all(
        source in layouts and layouts[source].name == LAYOUT
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

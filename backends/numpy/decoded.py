"""Weights that are decoded once, when a plan is bound, and kept as f32 (`decode_weights=True`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.host_memory import DECODED, allocated
from pyggml.backends.step import WeightLayout
from pyggml.dtypes import F32
from pyggml.node import Node
from pyggml.ops import get_rows
from pyggml.quants import DECODABLE, decode
from pyggml.transfer import origin


def layout_of(constant: Node, uses: Collection[Node]) -> WeightLayout:
    """f32 if a product reads the constant and all its readers are products or `get_rows`.

    Others, such as `cont` or a loop, get it as in the file.
    """
    plain = WeightLayout(constant.spec.nbytes)
    if constant.dtype is F32 or constant.dtype.name not in DECODABLE:
        return plain
    read = {source for use in uses for source in use.src}
    if any(use.op.view is not None and use not in read for use in uses):
        return plain  # the view is an output
    operands = [
        (use, name) for use in uses if use.op.view is None for name in _names(use, constant)
    ]
    products = [use for use, name in operands if name in use.op.weights]
    others = [use for use, name in operands if name not in use.op.weights and use.op != get_rows]
    if not products or others:
        return plain
    return WeightLayout(F32.nbytes * constant.spec.elements, DECODED)


def _names(use: Node, constant: Node) -> Iterator[str]:
    """The operands that are the constant or a view of it."""
    for name in use.op.operands:
        operand = use.get(name)
        if operand is not None and origin(operand.base) is origin(constant):
            yield name


def decoded(constant: Node, layout: WeightLayout, data: NDArray[Any]) -> NDArray[np.uint8]:
    """The weight as f32, from its rows as in a file."""
    dtype = constant.dtype
    out = allocated(layout.nbytes)
    rows = np.ascontiguousarray(data).reshape(-1)
    blocks = rows if dtype.block == 1 else rows.reshape(-1, dtype.nbytes)
    decode(dtype, blocks, out.view(np.float32))
    return out

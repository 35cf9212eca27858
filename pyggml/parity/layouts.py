"""Layouts of a case's source in memory: padded, strided, permuted, or far apart."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml import ops
from pyggml.dtypes import DType
from pyggml.node import Node
from pyggml.spec import Spec

Array = NDArray[Any]
Ne = tuple[int, ...]

#: The layouts with a name, spelled out.
LAYOUTS = {
    "": "", "wide": "b1000a1000", "inner": "b1211a2110", "step": "s1211", "apart": "b1000s2111",
}  # fmt: skip
_SPELLED = re.compile(r"(?:p([0-3]{4}))?(?:b(\d{4}))?(?:a(\d{4}))?(?:s([1-9]{4}))?")
#: Values around a tensor, which nothing may read.
_POISON = {"float": np.nan, "int": 2**31 - 1, "block": 0xFF}
#: Bytes from the first row of a @far source to its last: offsets overflow 32 bits.
FAR = 1 << 31


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor in a larger memory; every field is by dimension of the memory.

    axes           the tensor is ggml's permute(memory, axes)
    before, after  elements (on dimension 0: blocks) in front of it and behind it
    step           distance of its elements
    """

    axes: Ne = (0, 1, 2, 3)
    before: Ne = (0, 0, 0, 0)
    after: Ne = (0, 0, 0, 0)
    step: Ne = (1, 1, 1, 1)

    @staticmethod
    @cache
    def parse(text: str) -> Layout | None:
        """`wide`, `p0213`, `p1032b1000a0100s2111`; None if the text is not a layout."""
        match = _SPELLED.fullmatch(LAYOUTS.get(text, text))
        if match is None:
            return None
        parts = [tuple(map(int, part)) if part else None for part in match.groups()]
        axes, before, after, step = parts
        if axes is not None and sorted(axes) != [0, 1, 2, 3]:
            return None
        zero = (0, 0, 0, 0)
        return Layout(axes or (0, 1, 2, 3), before or zero, after or zero, step or (1, 1, 1, 1))

    def __str__(self) -> str:
        """The layout spelled out; empty if the tensor is all of its memory, in order."""
        plain = Layout()
        return "".join(
            letter + "".join(map(str, sizes))
            for letter, sizes, usual in (
                ("p", self.axes, plain.axes),
                ("b", self.before, plain.before),
                ("a", self.after, plain.after),
                ("s", self.step, plain.step),
            )
            if sizes != usual
        )

    def inner(self, ne: Ne) -> Ne:
        """The sizes `ne` of a tensor, in the memory's order of dimensions."""
        return tuple(ne[axis] for axis in self.axes)

    def around(self, dtype: DType, ne: Ne) -> Ne:
        """The sizes of the memory."""
        edges = [b + a for b, a in zip(self.before, self.after)]
        edges[0] *= dtype.block
        return tuple(n * s + more for n, s, more in zip(self.inner(ne), self.step, edges))


def _far_step(dtype: DType, ne: Ne) -> Ne:
    """Steps that put the last row (or matrix) FAR bytes behind the first."""
    axis = max(axis for axis, n in enumerate(ne) if n > 1)
    apart = FAR // ((ne[axis] - 1) * Spec.of(dtype, ne).nb[axis]) + 1
    return tuple(apart if i == axis else 1 for i in range(4))


def _layout(text: str) -> Layout:
    layout = Layout.parse(text)
    assert layout is not None
    return layout


def seen(dtype: DType, ne: Ne, text: str, leaf: Callable[[Ne], Node]) -> Node:
    """A source in its layout: a view of `leaf(sizes of its memory)`."""
    if text == "far":
        step = _far_step(dtype, ne)
        memory = leaf(tuple(n * s for n, s in zip(ne, step)))
        return ops.view(memory, ne=ne, start=(0, 0, 0, 0), step=step)
    layout = _layout(text)
    inner, outer = layout.inner(ne), layout.around(dtype, ne)
    node = leaf(outer)
    if outer != inner:
        start = (layout.before[0] * dtype.block, *layout.before[1:])
        node = ops.view(node, ne=inner, start=start, step=layout.step)
    return node if layout.axes == (0, 1, 2, 3) else ops.permute(node, axes=layout.axes)


def in_memory(dtype: DType, ne: Ne, text: str, array: Array) -> Array:
    """The contents of that leaf: the array in its place, poison around it. For `far` only the
    array: the leaf is too large.
    """
    if text == "far":
        return array
    layout = _layout(text)
    if layout.axes != (0, 1, 2, 3):
        array = np.ascontiguousarray(array.transpose([3 - layout.axes[3 - i] for i in range(4)]))
    inner, outer = layout.inner(ne), layout.around(dtype, ne)
    if outer == inner:
        return array
    block = array.shape[-1] // (inner[0] // dtype.block)  # stored elements per block
    poison = _POISON[dtype.kind] if dtype.name != "bf16" else 0xFFFF
    memory = np.full((*outer[:0:-1], outer[0] // dtype.block * block), poison, array.dtype)
    sizes = array.shape[::-1]
    slices = [slice(b, b + n * s, s) for b, n, s in zip(layout.before, sizes, layout.step)]
    if layout.step[0] == 1:
        first = layout.before[0] * block
        slices[0] = slice(first, first + sizes[0])
    memory[tuple(slices[::-1])] = array
    return memory

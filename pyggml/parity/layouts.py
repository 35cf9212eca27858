"""How a case's source lies in memory: padded, stepped, permuted, or far apart."""

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
from pyggml.node import Node, Spec

Array = NDArray[Any]
Ne = tuple[int, ...]

#: Layouts with a name, spelled out.
LAYOUTS = {
    "": "", "wide": "b1000a1000", "inner": "b1211a2110", "step": "s1211", "apart": "b1000s2111",
}  # fmt: skip
_SPELLED = re.compile(r"(?:p([0-3]{4}))?(?:b(\d{4}))?(?:a(\d{4}))?(?:s([1-9]{4}))?")
#: What lies around a tensor: nothing may read it.
_POISON = {"float": np.nan, "int": 2**31 - 1, "block": 0xFF}
#: Bytes after which the last rows of a source that lies far begin: more than 32 bits can count.
FAR = 1 << 31


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor in memory, dimension by dimension of that memory.

    axes           the tensor is ggml's permute(memory, axes)
    before, after  elements (on dimension 0: blocks) of the memory around it
    step           how far apart its elements are
    """

    axes: Ne = (0, 1, 2, 3)
    before: Ne = (0, 0, 0, 0)
    after: Ne = (0, 0, 0, 0)
    step: Ne = (1, 1, 1, 1)

    @staticmethod
    @cache
    def parse(text: str) -> Layout | None:
        """`wide`, `p0213`, `p1032b1000a0100s2111`; None where it is no layout."""
        spelled = _SPELLED.fullmatch(LAYOUTS.get(text, text))
        if spelled is None:
            return None
        parts = [tuple(map(int, part)) if part else None for part in spelled.groups()]
        axes, before, after, step = parts
        if axes is not None and sorted(axes) != [0, 1, 2, 3]:
            return None
        zero = (0, 0, 0, 0)
        return Layout(axes or (0, 1, 2, 3), before or zero, after or zero, step or (1, 1, 1, 1))

    def __str__(self) -> str:
        """Spelled out; empty where the tensor is all of its memory, in order."""
        plain = Layout()
        return "".join(
            letter + "".join(map(str, mine))
            for letter, mine, usual in (
                ("p", self.axes, plain.axes),
                ("b", self.before, plain.before),
                ("a", self.after, plain.after),
                ("s", self.step, plain.step),
            )
            if mine != usual
        )

    def inner(self, ne: Ne) -> Ne:
        """The sizes of a tensor of `ne` in the order of the memory."""
        return tuple(ne[axis] for axis in self.axes)

    def around(self, kind: DType, ne: Ne) -> Ne:
        """The size of the memory."""
        edges = [b + a for b, a in zip(self.before, self.after)]
        edges[0] *= kind.block
        return tuple(n * s + more for n, s, more in zip(self.inner(ne), self.step, edges))


def _far_step(kind: DType, ne: Ne) -> Ne:
    """Steps that put the last of the outermost rows, matrices.. FAR bytes behind the first."""
    axis = max(axis for axis, n in enumerate(ne) if n > 1)
    apart = FAR // ((ne[axis] - 1) * Spec.of(kind, ne).nb[axis]) + 1
    return tuple(apart if i == axis else 1 for i in range(4))


def _layout(text: str) -> Layout:
    layout = Layout.parse(text)
    assert layout is not None
    return layout


def seen(kind: DType, ne: Ne, text: str, leaf: Callable[[Ne], Node]) -> Node:
    """A source in its layout: `leaf(size of its memory)`, looked at."""
    if text == "far":
        step = _far_step(kind, ne)
        memory = leaf(tuple(n * s for n, s in zip(ne, step)))
        return ops.view(memory, ne=ne, start=(0, 0, 0, 0), step=step)
    layout = _layout(text)
    inner, whole = layout.inner(ne), layout.around(kind, ne)
    node = leaf(whole)
    if whole != inner:
        start = (layout.before[0] * kind.block, *layout.before[1:])
        node = ops.view(node, ne=inner, start=start, step=layout.step)
    return node if layout.axes == (0, 1, 2, 3) else ops.permute(node, axes=layout.axes)


def in_memory(kind: DType, ne: Ne, text: str, array: Array) -> Array:
    """What that leaf holds: the array in its place, poison around it; of one far apart the array
    alone.
    """
    if text == "far":
        return array
    layout = _layout(text)
    if layout.axes != (0, 1, 2, 3):
        array = np.ascontiguousarray(array.transpose([3 - layout.axes[3 - i] for i in range(4)]))
    inner, whole = layout.inner(ne), layout.around(kind, ne)
    if whole == inner:
        return array
    block = array.shape[-1] // (inner[0] // kind.block)  # stored elements of a block
    poison = _POISON[kind.kind] if kind.name != "bf16" else 0xFFFF
    memory = np.full((*whole[:0:-1], whole[0] // kind.block * block), poison, array.dtype)
    sizes = array.shape[::-1]
    place = [slice(b, b + n * s, s) for b, n, s in zip(layout.before, sizes, layout.step)]
    if layout.step[0] == 1:
        first = layout.before[0] * block
        place[0] = slice(first, first + sizes[0])
    memory[tuple(place[::-1])] = array
    return memory

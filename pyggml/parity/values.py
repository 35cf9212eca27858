"""What a case's sources hold, and how that lies in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml import ops
from pyggml.dtypes import DType
from pyggml.node import Node, Spec
from pyggml.quants import ENCODABLE, decode_rows, encode_rows

Array = NDArray[Any]
Ne = tuple[int, ...]

#: Layouts: elements (on dimension 0: blocks) before and after the tensor, and its steps.
LAYOUTS = {
    "wide": ((1, 0, 0, 0), (1, 0, 0, 0), (1, 1, 1, 1)),
    "inner": ((1, 2, 1, 1), (2, 1, 1, 0), (1, 1, 1, 1)),
    "step": ((0, 0, 0, 0), (0, 0, 0, 0), (1, 2, 1, 1)),
    "apart": ((1, 0, 0, 0), (0, 0, 0, 0), (2, 1, 1, 1)),
}
#: Keys that hold NaN or infinity in ~holed and that ~holes hides from most queries.
_HOLES = slice(3, None, 5)
#: What lies around a tensor: nothing may read it.
_POISON = {"float": np.nan, "int": 2**31 - 1, "block": 0xFF}
#: Bytes after which the last rows of a source that lies far begin: more than 32 bits can count.
FAR = 1 << 31


def numbers(rng: np.random.Generator, shape: tuple[int, ...], fill: str) -> Array:
    """Values in NumPy shape, by the words of `Source.fill`."""
    if fill[:1] in ("<", "!"):
        count = int(fill[1:].rstrip("-"))
        if fill[0] == "<":
            return rng.integers(-2 if fill.endswith("-") else 0, count, shape)
        lines = [rng.permutation(count)[: shape[-1]] for _ in range(int(np.prod(shape[:-1])))]
        return np.array(lines).reshape(shape)
    if fill.startswith("#"):
        return np.full(shape, int(fill[1:]))
    values = rng.standard_normal(shape)
    if fill == "~mask":
        hidden = rng.random(shape) < 0.3
        hidden[..., 1:2, :] = True
        return np.where(hidden, -np.inf, values)
    if fill == "~holes":
        hidden = rng.random(shape) < 0.2
        hidden[..., _HOLES] = True
        hidden[..., 5::6, _HOLES] = False
        return np.where(hidden, -np.inf, np.where(rng.random(shape) < 0.5, 0, values))
    if fill in ("~holed", "~ended"):
        spoilt = values[..., _HOLES if fill == "~holed" else slice(shape[-2] // 2, None), :]
        for start, special in enumerate((np.nan, np.inf, -np.inf)):
            spoilt[..., start::3, start::2] = special
        return values
    if fill == "~causal":
        rows, keys = shape[-2:]
        return np.where(np.tri(rows, keys, keys - rows, dtype=bool), 0.0, -np.inf) + 0 * values
    if fill == "~blocks":
        rows, keys = (-(-n // size) for n, size in zip(shape[-2:], (8, 16)))
        hidden = (rng.random((*shape[:-2], rows, keys)) < 0.3).repeat(8, -2).repeat(16, -1)
        return np.where(hidden[..., : shape[-2], : shape[-1]], -np.inf, values)
    if fill == "~above":
        return np.abs(values) + 0.01
    if fill == "~one":
        return rng.uniform(0.9, 1.1, shape)
    if fill == "~large":
        return 1e4 * values
    if fill == "~ties":
        return np.rint(2 * values)
    if fill == "~wild":
        odd = rng.choice([np.inf, -np.inf, np.nan, -np.nan, 1e-40, 0.0], shape)
        return np.where(rng.random(shape) < 0.2, odd, values)
    return values


def stored(kind: DType, values: Array, rng: np.random.Generator, fill: str = "") -> Array:
    """Values as the type is stored: [.., bytes of a row] for block types.

    A block type that nothing here encodes gets blocks of its own; ~wild blocks are any bytes.
    """
    if kind.numpy is not None:
        return values.astype(kind.numpy)
    shape = (*values.shape[:-1], kind.row_bytes(values.shape[-1]))
    if kind.block > 1 and fill == "~wild":
        return rng.integers(0, 256, shape, np.uint8)
    if kind.name in ENCODABLE:
        return encode_rows(kind, np.ascontiguousarray(values, dtype=np.float32))
    known = _blocks(kind)
    chosen = rng.integers(0, len(known), (*shape[:-1], shape[-1] // kind.nbytes))
    return known[chosen].reshape(shape)


@cache
def _blocks(kind: DType) -> Array:
    """Random blocks of which the largest value is about 1.

    Any bytes are blocks, but sums over blocks of 1e9 and of 1e-9 tell nothing of a kernel.
    """
    drawn = np.random.default_rng(0).integers(0, 256, (1 << 11, kind.nbytes), np.uint8)
    with np.errstate(all="ignore"):
        largest = np.abs(decode_rows(kind, drawn)).max(axis=1)
    return np.asarray(drawn[(largest > 0.1) & (largest < 10)])


def decoded(kind: DType, array: Array) -> Array:
    """What an array, as the type is stored, says: float64 or int64."""
    if kind.kind == "int":
        return array.astype(np.int64)
    return (array if kind.numpy is not None else decode_rows(kind, array)).astype(np.float64)


def blank(kind: DType, ne: Ne) -> Array:
    """Zeros as the type is stored."""
    if kind.block == 1:
        return np.zeros(ne[::-1], kind.numpy or np.uint16)
    return np.zeros((*ne[:0:-1], kind.row_bytes(ne[0])), np.uint8)


# -- memory -----------------------------------------------------------------------------------


def _axes(layout: str) -> tuple[int, ...]:
    """Of the layout p0213: (0, 2, 1, 3); of others nothing."""
    return tuple(int(axis) for axis in layout[1:]) if layout[:1] == "p" else ()


def _around(kind: DType, ne: Ne, layout: str) -> Ne:
    """The size of the memory in which a tensor of `ne` lies."""
    before, after, step = LAYOUTS[layout]
    edge = [
        (b + a) * (kind.block if axis == 0 else 1) for axis, (b, a) in enumerate(zip(before, after))
    ]
    return tuple(n * s + more for n, s, more in zip(ne, step, edge))


def _far_step(kind: DType, ne: Ne) -> Ne:
    """Steps that put the last of the outermost rows, matrices.. FAR bytes behind the first."""
    axis = max(axis for axis, n in enumerate(ne) if n > 1)
    apart = FAR // ((ne[axis] - 1) * Spec.of(kind, ne).nb[axis]) + 1
    return tuple(apart if i == axis else 1 for i in range(4))


def seen(kind: DType, ne: Ne, layout: str, leaf: Callable[[Ne], Node]) -> Node:
    """A source in its layout: `leaf(size of its memory)`, looked at."""
    if layout == "far":
        step = _far_step(kind, ne)
        memory = leaf(tuple(n * s for n, s in zip(ne, step)))
        return ops.view(memory, ne=ne, start=(0, 0, 0, 0), step=step)
    axes = _axes(layout)
    if axes:
        return ops.permute(leaf(tuple(ne[axis] for axis in axes)), axes=axes)
    if not layout:
        return leaf(ne)
    before, _, step = LAYOUTS[layout]
    start = (before[0] * kind.block, *before[1:])
    return ops.view(leaf(_around(kind, ne, layout)), ne=ne, start=start, step=step)


def in_memory(kind: DType, ne: Ne, layout: str, array: Array) -> Array:
    """What that leaf holds: the array in its place, poison around it; of one far apart the array
    alone.
    """
    axes = _axes(layout)
    if axes:
        return np.ascontiguousarray(array.transpose([3 - axes[3 - i] for i in range(4)]))
    if layout in ("", "far"):
        return array
    before, _, step = LAYOUTS[layout]
    whole = _around(kind, ne, layout)
    block = array.shape[-1] // (ne[0] // kind.block)  # stored elements of a block
    poison = _POISON[kind.kind] if kind.name != "bf16" else 0xFFFF
    memory = np.full((*whole[:0:-1], whole[0] // kind.block * block), poison, array.dtype)
    place = [slice(b, b + n * s, s) for b, n, s in zip(before, array.shape[::-1], step)]
    place[0] = slice(before[0] * block, before[0] * block + array.shape[-1] * step[0], step[0])
    memory[tuple(place[::-1])] = array
    return memory

"""What the kernels share: operands as f32, pieces of work, sizes of scratch.

A kernel sees 4-D arrays; `raw_of` gives one array that its first three axes index, whatever the
type, and `load` and `store` convert parts of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from pyggml.backends.host_memory import Array, Packed, Scratch, aligned
from pyggml.dtypes import F32, TYPES, DType
from pyggml.errors import IdError
from pyggml.node import Node
from pyggml.quants import decode, encode, work_bytes
from pyggml.quants.common import pieces as pieces

Raw = NDArray[Any]
Floats = NDArray[np.float32]
#: Memory for a codec, where one is needed.
Work = NDArray[np.uint8] | None

#: Elements in a piece of elementwise work: it and its intermediates stay in the L2 cache.
PIECE = 1 << 16
#: f32 elements of a decoded tile or a product: small against the L3 cache, large for BLAS.
TILE = 1 << 20
#: Bytes that a gather makes NumPy allocate.
GATHERED = 24 * 1024
#: Most ids to compute with at once: arrays of ids are small too.
IDS = 512

_PLAIN = {np.dtype(t.numpy): t for t in TYPES.values() if t.numpy}


def raw_of(x: Array) -> tuple[DType, Raw]:
    """The type of an operand, and the array whose first three axes are rows."""
    return (x.dtype, x.raw) if isinstance(x, Packed) else (_PLAIN[x.dtype], x)


def shape_of(x: Array) -> tuple[int, ...]:
    """Four sizes in NumPy's order."""
    return x.ne[::-1] if isinstance(x, Packed) else x.shape


def load(kind: DType, part: Raw, out: Raw, work: Work) -> Raw:
    """`out` filled with the values of `part`, which is a part of a raw array of that type."""
    if kind is F32 or kind.kind == "int":
        np.copyto(out, part, casting="unsafe")
    else:
        decode(kind, part, out, work=work)
    return out


def store(kind: DType, values: Raw, part: Raw, work: Work) -> None:
    """`part` of a raw array of that type filled with `values`."""
    if kind.numpy is not None:
        np.copyto(part, values, casting="unsafe")
    else:
        encode(kind, values, part, work=work)


def floats(*counts: int) -> int:
    """Bytes of scratch for arrays of so many 4-byte elements."""
    return sum(aligned(4 * n) for n in counts)


def codec_bytes(*tensors: Node | None) -> int:
    """Bytes of scratch that `work_of` takes for the operands of these nodes."""
    found = [t for t in tensors if t is not None]
    return _codec_bytes([(t.dtype, t.spec.elements) for t in found])


def work_of(scratch: Scratch, *operands: Array | None) -> Work:
    """Memory for a codec that converts these operands; None where none needs one."""
    found = [x for x in operands if x is not None]
    size = _codec_bytes([(raw_of(x)[0], prod(shape_of(x))) for x in found])
    return scratch.array(size, np.uint8) if size else None


def _codec_bytes(sizes: list[tuple[DType, int]]) -> int:
    weights = sum(n for kind, n in sizes if kind is not F32 and kind.kind != "int")
    return aligned(work_bytes(weights)) if weights else 0


def is_ready(node: Node) -> bool:
    """Whether `ready` will find the tensor's matrices fit for BLAS; when in doubt, no."""
    (n0, n1, *_), (nb0, nb1, *_) = node.ne, node.nb
    if node.dtype is not F32:
        return False
    # A tensor may be placed inside a wider one: then only elements of one row are side by side.
    sure = node.root.ne[0] > 1
    fits = (nb0 == 4 and nb1 >= 4 * n0) or (nb1 == 4 and nb0 >= 4 * n1)
    return 1 in (n0, n1) or (sure and fits)


def ready(x: Array) -> Floats | None:
    """x where BLAS can read its matrices (the last two axes) in place, else None.

    NumPy would copy others, which takes memory that no plan knows of.
    """
    if isinstance(x, Packed) or x.dtype != np.float32:
        return None
    rows, columns = x.shape[-2:]
    *outer, step, one = x.strides
    # The stride of an extent of one is arbitrary; BLAS wants it in order all the same.
    if columns == 1:
        one = 4
    if rows == 1:
        step = 4 * columns if one == 4 else 4
    if not (one == 4 and step >= 4 * columns) and not (step == 4 and one >= 4 * rows):
        return None
    strides = (*outer, step, one)
    return x if strides == x.strides else as_strided(x, strides=strides)


def split(length: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most `step` that cover `length`."""
    return (slice(i, min(i + step, length)) for i in range(0, length, step))


def shaped(memory: Raw, *shape: int) -> Raw:
    """The start of a flat array, as a contiguous array of this shape."""
    count = 1
    for extent in shape:
        count *= extent
    return memory[:count].reshape(shape)


def decoded(kind: DType, part: Raw, memory: Raw, work: Work) -> Raw:
    """The values of a part of a raw array as f32, contiguous at the start of `memory`."""
    shape = part.shape
    if kind.block > 1:
        shape = (*shape[:-2], shape[-2] * kind.block)
    return load(kind, part, shaped(memory, *shape), work)


def check_ids(what: str, ids: Raw, count: int) -> None:
    """IdError where an id is past the end; a negative one means none."""
    largest = int(ids.max())
    if largest >= count:
        raise IdError(
            f"{what} id {largest} is past the end: there are {count}, counted from 0; "
            "a negative id means none"
        )


def ids_in(index: Any, s: slice) -> Any:
    """The part `s` of an array or a range of ids as an array; a number is itself."""
    if isinstance(index, range):
        return np.arange(index[s].start, index[s].stop)
    return index[s] if isinstance(index, np.ndarray) else index


def gather(
    kind: DType,
    raw: Raw,
    index: tuple[Any, ...],
    out: Raw,
    work: Work,
    spare: NDArray[np.uint8] | None = None,
) -> None:
    """out[i] = raw[index][i] in out's type, 0 where the last index is negative.

    The last index is a one-dimensional array of ids; others are alike, ranges, or numbers.
    Rows of one contiguous matrix go straight to `out`, or to `spare` and from there. Others NumPy
    gathers into a new array: a few rows at a time, and long ones in parts.
    """
    *numbers, ids = index
    if all(isinstance(i, int) for i in numbers):
        table = raw[tuple(numbers)]
        if table.flags.c_contiguous and _take(kind, table, ids, out, work, spare):
            return
    row = raw[(0,) * len(index)]
    units = len(row)
    unit = row.nbytes // units
    whole = max(1, min(IDS, GATHERED // row.nbytes))
    columns = units if row.nbytes <= GATHERED else GATHERED // unit
    for s in split(len(out), whole):
        some = [ids_in(i, s) for i in index]
        missing = some[-1] < 0
        some[-1] = np.maximum(some[-1], 0)
        for part in split(units, columns):
            filled = out[s, part.start * kind.block : part.stop * kind.block]
            load(kind, raw[(*some, part)], filled, work)
        out[s][missing] = 0


def _take(
    kind: DType,
    table: Raw,
    ids: Raw,
    out: Raw,
    work: Work,
    spare: NDArray[np.uint8] | None,
) -> bool:
    """Whether the rows could be taken without memory of NumPy's own; then they are in `out`."""
    direct = kind.numpy is not None and table.dtype == out.dtype and out.flags.c_contiguous
    rows = IDS
    if not direct:
        rows = 0 if spare is None else min(IDS, spare.nbytes // table[0].nbytes)
    for s in split(len(out), rows) if rows else ():
        filled = out[s]
        if spare is not None and not direct:
            filled = shaped(spare.view(table.dtype), len(filled), *table.shape[1:])
        # Without mode="clip" NumPy makes a copy of the result first.
        np.take(table, ids[s], axis=0, out=filled, mode="clip")
        if not direct:
            load(kind, filled, out[s], work)
        out[s][ids[s] < 0] = 0
    return rows > 0

"""Copies, conversions, gathers and scatters."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np

from pyggml import ops
from pyggml.backends.host_memory import Array, Raw, Scratch, raw_of, shape_of
from pyggml.backends.numpy.arrays import Work, codec_bytes, decoded, load, store, work_of
from pyggml.backends.numpy.elementwise import tiles
from pyggml.backends.numpy.gather import GATHERED, IDS, gather, ids_in
from pyggml.backends.numpy.table import kernel
from pyggml.backends.numpy.tiling import PIECE, pieces, scratch_bytes, shaped, split
from pyggml.dtypes import F16, F32, DType
from pyggml.node import Node


def _spare(elements: int, *rows: int) -> int:
    """f32 elements of a piece that holds at least one row of each of these lengths."""
    return min(elements, max(PIECE, *rows))


def _conversion_scratch(node: Node) -> int:
    a = node["a"]
    return scratch_bytes(_spare(a.spec.elements, a.ne[0], node.ne[0])) + codec_bytes(a, node)


def _convert(
    source_type: DType, source: Raw, target_type: DType, target: Raw, spare: Raw, work: Work
) -> None:
    """Copy values from one raw array to another whose first three axes are the same."""
    plain = source_type.numpy and target_type.numpy and source_type is not F16
    if source_type == target_type or plain:
        np.copyto(target, source, casting="unsafe")
        return
    row = source.shape[3] * source_type.block
    for index in pieces(source.shape[:3], max(1, PIECE // row)):
        if target_type is F32:
            load(source_type, source[index], target[index], work)
        else:
            values = source[index]
            if source_type is not F32:
                values = decoded(source_type, values, spare, work)
            store(target_type, values, target[index], work)


@kernel(ops.cont, types=None)
def cont(out: Array, a: Array) -> None:
    np.copyto(raw_of(out)[1], raw_of(a)[1])


@kernel(ops.cast, types=None, scratch=_conversion_scratch)
def cast(out: Array, a: Array, *, scratch: Scratch, dtype: str) -> None:
    _copy(out, a, scratch)


@kernel(ops.cpy, types=None, scratch=_conversion_scratch)
def cpy(out: Array, a: Array, b: Array, *, scratch: Scratch) -> None:
    """Write a into out, which is b. Their sizes may differ; their numbers of elements may not."""
    _copy(out, a, scratch)


def _copy(out: Array, a: Array, scratch: Scratch) -> None:
    (a_type, source), (out_type, target) = raw_of(a), raw_of(out)
    row_lengths = shape_of(a)[3], shape_of(out)[3]
    spare = scratch.array(_spare(prod(shape_of(a)), *row_lengths))
    work = work_of(scratch, a, out)
    # Rows of blocks are copied whole, so only the axes before them can differ in size.
    lead = 4 if a_type.block == out_type.block == 1 else 3
    if source.shape[:lead] == target.shape[:lead]:
        pass
    elif source.flags.c_contiguous:
        source = source.reshape(*target.shape[:lead], *source.shape[lead:])
    elif target.flags.c_contiguous:
        target = target.reshape(*source.shape[:lead], *target.shape[lead:])
    else:
        _copy_scattered(a_type, source, out_type, target, spare, work)
        return
    _convert(a_type, source, out_type, target, spare, work)


def _copy_scattered(
    source_type: DType, source: Raw, target_type: DType, target: Raw, spare: Raw, work: Work
) -> None:
    """Copy between strided arrays of different sizes, element by element (or block by block) in
    logical order."""
    unit = max(source_type.block, target_type.block)
    source = source.reshape(*source.shape[:3], -1, unit // source_type.block, *source.shape[4:])
    target = target.reshape(*target.shape[:3], -1, unit // target_type.block, *target.shape[4:])
    count = prod(source.shape[:4])
    for s in split(count, max(1, min(IDS, GATHERED // (4 * unit)))):
        numbers = np.arange(s.start, s.stop)
        part = source[np.unravel_index(numbers, source.shape[:4])]
        if source_type != target_type and not (source_type.numpy and target_type.numpy):
            values = decoded(source_type, part, spare, work)
            part = np.empty((len(values), *target.shape[4:]), target.dtype)
            store(target_type, values, part, work)
        target[np.unravel_index(numbers, target.shape[:4])] = part


@kernel(ops.concat, types=None)
def concat(out: Array, a: Array, b: Array, *, dim: int) -> None:
    axis = 3 - dim
    target, *parts = (raw_of(x)[1] for x in (out, a, b))
    start = 0
    for part in parts:
        stop = start + part.shape[axis]
        np.copyto(target[(slice(None),) * axis + (slice(start, stop),)], part)
        start = stop


@kernel(ops.repeat, types=None)
def repeat(out: Array, a: Array, *, ne: tuple[int, ...]) -> None:
    target, source = raw_of(out)[1], raw_of(a)[1]
    np.copyto(tiles(target, source.shape), tiles(source, source.shape))


def _lines(n3: int, n2: int, n1: int, along_rows: bool) -> Iterator[tuple[int, Any, Any]]:
    """Indices (i3, i2, i1) of lines of ids: all rows of one matrix, or one row of all matrices."""
    every = slice(None)
    for i3 in range(n3):
        if along_rows:
            yield from ((i3, i2, every) for i2 in range(n2))
        else:
            yield from ((i3, every, i1) for i1 in range(n1))


@kernel(
    ops.get_rows,
    types=None,
    scratch=lambda node: scratch_bytes(PIECE) + codec_bytes(node["a"]),
)
def get_rows(out: Raw, a: Array, ids: Raw, *, scratch: Scratch) -> None:
    """Decode only the chosen rows."""
    dtype, raw = raw_of(a)
    work, spare = work_of(scratch, a), scratch.array(4 * PIECE, np.uint8)
    n3, n2, rows, _ = out.shape
    for line in _lines(n3, n2, rows, along_rows=rows >= n2):
        matrix = range(n2) if isinstance(line[1], slice) else line[1]
        gather(dtype, raw[line[0]], (matrix, ids[0][line]), out[line], work, spare)


def _set_rows_scratch(node: Node) -> int:
    size = max(GATHERED // 4, node.ne[0])
    return scratch_bytes(size, size) + codec_bytes(node, node["b"])


@kernel(ops.set_rows, types=None, scratch=_set_rows_scratch)
def set_rows(out: Array, a: Array, b: Raw, ids: Raw, *, scratch: Scratch) -> None:
    """Encode rows of b into out, which is a. The other rows of out keep their values."""
    (b_type, source), (out_type, target) = raw_of(b), raw_of(out)
    n3, n2, rows, n = source.shape
    c3, c2 = ids.shape[1:3]
    size = max(GATHERED // 4, n)
    values, encoded, work = scratch.array(size), scratch.array(size), work_of(scratch, b, out)
    for i3, i2, i1 in _lines(n3, n2, rows, along_rows=rows >= n2 or c2 != n2):
        matrix = range(n2) if isinstance(i2, slice) else i2
        line_ids = ids[0, i3 % c3, i2 if c2 == n2 else i2 % c2, i1]
        for s in split(len(line_ids), max(1, min(IDS, GATHERED // (4 * n)))):
            rows_b = source[i3, i2, i1][s]
            if b_type != out_type:
                if b_type is not F32:
                    rows_b = decoded(b_type, rows_b, values, work)
                blocks = shaped(encoded.view(target.dtype), len(rows_b), *target.shape[3:])
                store(out_type, rows_b, blocks, work)
                rows_b = blocks
            index = (ids_in(matrix, s), line_ids[s])
            valid = line_ids[s] >= 0
            if not valid.all():
                rows_b = rows_b[valid]
                index = tuple(i[valid] if isinstance(i, np.ndarray) else i for i in index)
            target[i3][index] = rows_b

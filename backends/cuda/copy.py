"""Copies, conversions, gathers and scatters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.argument import Argument
from pyggml.backends.cuda.geometry import C_TYPES, blocks_for, counted, pack_width, part, rows
from pyggml.backends.cuda.launch import Call, Operand
from pyggml.backends.cuda.table import kernel
from pyggml.backends.cuda.weights.packing import TILE, packed, tiles_of
from pyggml.dtypes import DType

FILE = "copy.cu"

#: The C++ types of the words that a copy moves, by size in bytes.
_WORDS = {16: "uint4", 8: "uint2", 4: "unsigned", 2: "unsigned short", 1: "unsigned char"}


def reader(dtype: DType) -> str:
    """The type in blocks.cuh that reads one value of `dtype`."""
    return dtype.name if dtype.block > 1 else f"Plain<{C_TYPES[dtype.name]}>"


# -- copies -----------------------------------------------------------------------------------


def _as_words(operand: Operand, size: int) -> Operand:
    """The same bytes as words of `size`; rows must be contiguous."""
    n = operand.dtype.row_bytes(operand.ne[0]) // size
    return replace(operand, ne=(n, *operand.ne[1:]), nb=(size, *operand.nb[1:]))


def _word(operands: tuple[Operand, ...]) -> int:
    """Bytes of the widest word that divides all rows, or 0 if the rows are not contiguous."""
    for operand in operands:
        if operand.ne[0] > operand.dtype.block and operand.nb[0] != operand.dtype.nbytes:
            return 0
    return next(
        size
        for size in _WORDS
        if all(o.dtype.row_bytes(o.ne[0]) % size == 0 and o.aligned(size) for o in operands)
    )


def copy(call: Call, out: Operand, a: Operand) -> None:
    """Record a copy of `a`, repeated to the sizes of `out`; both have the same type.

    Nothing if `a` is `out`: a step may have written its result where a concat wants it.
    """
    if out.ptr == a.ptr and out.ne == a.ne and out.steps == a.steps:
        return
    if out.contiguous and a.contiguous and out.ne == a.ne:
        nbytes = out.dtype.row_bytes(out.ne[0]) * rows(out)
        if nbytes >= 1 << 16:
            call.memcpy(out.ptr, a.ptr, nbytes)
            return
    size = _word((out, a)) if out.ne[0] == a.ne[0] else 0
    if size:
        out, a = _as_words(out, size), _as_words(a, size)
    else:
        size = out.dtype.nbytes
    index, total = counted(out.ne[0] * rows(out))
    call.launch(
        FILE,
        f"copy<{_WORDS[size]}, {index}>",
        grid=blocks_for(int(total)),
        block=256,
        args=[out.tensor, a.tensor, total],
    )


@kernel(ops.cont, types=None)
def cont(call: Call) -> None:
    copy(call, call.out, call["a"])


@kernel(ops.concat, types=None)
def concat(call: Call) -> None:
    start, dim = 0, call.attrs["dim"]
    for a in (call["a"], call["b"]):
        copy(call, part(call.out, dim, start, a.ne[dim]), a)
        start += a.ne[dim]


@kernel(ops.repeat)
def repeat(call: Call) -> None:
    copy(call, call.out, call["a"])


# -- conversions ------------------------------------------------------------------------------


def convert(call: Call, out: Operand, a: Operand) -> None:
    """Record the conversion of `a` into `out`, element by element in order."""
    if a.dtype == out.dtype and a.ne == out.ne:
        copy(call, out, a)
    elif a.dtype == out.dtype and a.dtype.block > 1:  # rows in order, unchanged
        size = _word((out, a))
        _in_order(call, _as_words(out, size), _as_words(a, size), _WORDS[size], _WORDS[size])
    elif out.dtype.block > 1:
        _encode(call, out, a, None)
    elif a.layout == "tiles8":
        _decode_tiles(call, out, a)
    elif a.dtype.block > 1:
        width = min(pack_width(out), 4)
        call.launch(
            FILE,
            f"decode<{a.dtype.name}, {C_TYPES[out.dtype.name]}, {width}>",
            grid=(rows(out), blocks_for(out.ne[0] // width)),
            block=256,
            args=[out.tensor, a.tensor],
        )
    else:
        _in_order(call, out, a, C_TYPES[out.dtype.name], C_TYPES[a.dtype.name])


def _decode_tiles(call: Call, out: Operand, a: Operand) -> None:
    """Record the values of a weight in tiles; `out` has rows of the same length."""
    tiles = tiles_of(a.dtype, a.ne)
    total = tiles.matrices * tiles.tiles * tiles.groups * TILE
    width = pack_width(out)
    call.launch(
        FILE,
        f"decode_tiles<tiles::{a.dtype.name}, {C_TYPES[out.dtype.name]}, {width}>",
        grid=blocks_for(total),
        block=256,
        args=[out.tensor, packed(a), np.uint32(total)],
    )


def _in_order(call: Call, out: Operand, a: Operand, to: str, source: str) -> None:
    """Record the elements of `a` (C++ type `source`), converted in order into `out` (type `to`)."""
    width = pack_width(out, a) if to != source and out.ne[0] == a.ne[0] else 1
    index, total = counted(out.ne[0] * rows(out) // width)
    call.launch(
        FILE,
        f"convert<{source}, {to}, {width}, {index}>",
        grid=blocks_for(int(total)),
        block=256,
        args=[out.tensor, a.tensor, total],
    )


def _encode(call: Call, out: Operand, b: Operand, ids: Operand | None) -> None:
    """Record rows of `b` encoded as blocks, into the rows given by `ids`, or in order."""
    into = "void" if ids is None else C_TYPES[ids.dtype.name]
    call.launch(
        FILE,
        f"encode_rows<{reader(b.dtype)}, {out.dtype.name}, {into}>",
        grid=(rows(b), blocks_for(b.ne[0])),
        block=256,
        args=[out.tensor, b.tensor, (b if ids is None else ids).tensor],
    )


@kernel(ops.cast, types=None)
def cast(call: Call) -> None:
    convert(call, call.out, call["a"])


@kernel(ops.cpy, types=None)
def cpy(call: Call) -> None:
    convert(call, call.out, call["a"])


# -- by id ------------------------------------------------------------------------------------


@kernel(ops.get_rows, types=None)
def get_rows(call: Call) -> None:
    """Record the gather. It decodes only the selected rows; ids past the end give zero rows."""
    out, a, ids = call.out, call["a"], call["ids"]
    args: list[Argument] = [out.tensor, a.tensor, ids.tensor]
    name, grid = f"get_rows<{reader(a.dtype)}>", (rows(out), blocks_for(out.ne[0]))
    if a.dtype.kind == "int":
        total = rows(out) * out.ne[0]
        name, grid = "get_ids", (blocks_for(total), 1)
        args.append(np.uint32(total))
    call.launch(FILE, name, grid=grid, block=256, args=args)


@kernel(ops.set_rows, types=None)
def set_rows(call: Call) -> None:
    """Record rows of `b` converted into the rows of `out` (the memory of a) given by `ids`."""
    out, b, ids = call.out, call["b"], call["ids"]
    if out.dtype.block > 1:
        _encode(call, out, b, ids)
        return
    types = ", ".join(C_TYPES[o.dtype.name] for o in (b, out, ids))
    call.launch(
        FILE,
        f"set_rows<{types}>",
        grid=(rows(b), blocks_for(b.ne[0])),
        block=256,
        args=[out.tensor, b.tensor, ids.tensor],
    )

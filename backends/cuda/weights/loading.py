"""Loading weights: threads copy the file to pinned memory, and the GPU copies its bytes from there
or, for the layout "tiles8", packs them (kernels/pack.cu).

The packer in packing.py gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.cuda.argument import pack
from pyggml.backends.cuda.device.context import Context
from pyggml.backends.cuda.device.pinned import PART, Staging
from pyggml.backends.cuda.launch import Launch
from pyggml.backends.cuda.weights.bits import Bytes
from pyggml.backends.cuda.weights.packing import TILE, Packed, repack, tiles_of
from pyggml.backends.step import WeightLayout
from pyggml.dtypes import DType
from pyggml.errors import DeviceError
from pyggml.node import Node, label_of
from pyggml.spec import Ne

FILE = "pack.cu"
#: Bytes that a thread reads at a time. On an H100, loading is slower with half as many, because
#: each piece costs the host time, and no faster with twice as many.
PIECE = 1 << 21
#: Groups of a row that a block of threads packs, as in pack.cu.
GROUPS = 32


def load(
    context: Context,
    staging: Staging,
    ptr: int,
    constant: Node,
    layout: WeightLayout,
    data: NDArray[Any],
) -> None:
    """Queue a weight to memory that is zero. After it returns, `data` may change."""
    if layout.name != "plain" and can_pack(constant.dtype, constant.ne):
        upload_packed(context, staging, ptr, constant.dtype, constant.ne, flat(data))
    else:
        upload(context, staging, ptr, stored(constant, layout, data))


def stored(constant: Node, layout: WeightLayout, data: NDArray[Any]) -> Bytes:
    """The bytes of a weight in `layout`; for "plain", the host's bytes without a copy."""
    if layout.name != "plain":
        data = repack(constant, layout, data)
    rows = flat(data)
    if len(rows) > layout.nbytes:
        raise DeviceError(
            f"the weight {label_of(constant)} takes {len(rows)} bytes as {layout.name}, "
            f"but {layout.nbytes} were planned"
        )
    return rows


def flat(data: NDArray[Any]) -> Bytes:
    """The bytes of an array, without a copy if they are in C order."""
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def upload(context: Context, staging: Staging, ptr: int, data: Bytes) -> None:
    """Queue a copy of flat bytes to a device address. After it returns, `data` may change."""

    def copy(start: int, part: Bytes) -> None:
        context.driver.memcpy_htod_async(ptr + start, part, context.stream)

    starts = range(0, len(data), PIECE)
    staging.stream((data[i : i + PIECE], partial(copy, i)) for i in starts)


def can_pack(dtype: DType, ne: Ne) -> bool:
    """Whether a tile's rows fit in a part of the pinned memory."""
    return TILE * dtype.row_bytes(ne[0]) <= PART


def upload_packed(
    context: Context, staging: Staging, ptr: int, dtype: DType, ne: Ne, rows: Bytes
) -> None:
    """Queue the packing of a weight's rows, flat bytes as in a file, into tiles at `ptr`, whose
    memory is zero. After it returns, `rows` may change."""

    target = tiles_of(dtype, ne).at(ptr)

    def start(first: int, last: int, part: Bytes) -> None:
        context.start(launch(dtype, target, part.ctypes.data, first, last))

    context.load([launch(dtype, target, 0, 0, 1)])
    pieces = _pieces(dtype, ne)
    staging.stream((rows[at], partial(start, first, last)) for first, last, at in pieces)


def _pieces(dtype: DType, ne: Ne) -> Iterator[tuple[int, int, slice]]:
    """Pieces of about `PIECE` bytes: the first tile and the one after the last, counted over all
    matrices, and the bytes of their rows."""
    tiles, row = tiles_of(dtype, ne), dtype.row_bytes(ne[0])
    step = max(1, PIECE // (TILE * row))

    def start(tile: int) -> int:
        matrix, tile = divmod(tile, tiles.tiles)
        return (matrix * tiles.rows + tile * TILE) * row

    end = tiles.matrices * tiles.tiles
    for first in range(0, end, step):
        last = min(first + step, end)
        yield first, last, slice(start(first), start(last))


def launch(dtype: DType, target: Packed, source: int, first: int, last: int) -> Launch:
    """The launch that packs the rows at address `source` into the tiles from `first` to before
    `last`."""
    args = pack([np.uint64(source), target, np.int32(first)])
    grid = (last - first, -(-target.groups // GROUPS), 1)
    return Launch(FILE, f"pack<{dtype.name}>", grid, (256, 1, 1), args)

"""Loading weights: threads copy the file to pinned memory, and the GPU copies its bytes from there
or, for the layout "tiles8", packs them (kernels/pack.cu). A weight that the host keeps in tiles is
packed from those.

The packer in packing.py gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.cuda.argument import Tensor, pack
from pyggml.backends.cuda.device.context import Context
from pyggml.backends.cuda.device.pinned import PART, Staging
from pyggml.backends.cuda.launch import Launch
from pyggml.backends.cuda.weights.bits import Bytes
from pyggml.backends.cuda.weights.packing import TILE, Packed, repack, tiles_of
from pyggml.backends.host_tiles import LAYOUT
from pyggml.backends.host_tiles import tiles_of as host_tiles_of
from pyggml.backends.step import WeightLayout
from pyggml.dtypes import DType
from pyggml.errors import DeviceError
from pyggml.node import Node, label_of
from pyggml.spec import Ne

FILE = "pack.cu"
#: Bytes that a thread reads at a time. On an H100, loading is slower with half as many, because
#: each piece costs the host time, and no faster with twice as many.
PIECE = 1 << 21
#: Groups of a row that a part of a block packs, threads of a part, and parts of a block, as in
#: pack.cu.
GROUPS, THREADS, PARTS = 32, 256, {"pack": 4, "pack16": 2}
#: Bytes that a kernel has under way if it leaves most of the device to others.
UNDER_WAY = 384 << 10
#: Blocks for each multiprocessor of a kernel that skips matrices, and the most matrices.
SKIPPING, MOST_MATRICES = 2, 1024
ALL = Tensor(data=0, nb=(0,) * 4, ne=(0,) * 4)


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


@dataclass(frozen=True, slots=True)
class Source:
    """What a kernel packs: the rows of tiles as a file has them, or the host's own tiles.

    kernel  its name
    tiles   how many, in all matrices
    nbytes  of a tile with all rows
    start   the byte at which a tile begins; for the number of tiles, the end
    """

    kernel: str
    tiles: int
    nbytes: int
    start: Callable[[int], int]


def source_of(dtype: DType, ne: Ne, layout: str = "plain") -> Source:
    """A weight in a layout of the host: plain, or that of host_tiles.py."""
    if layout == LAYOUT:
        host = host_tiles_of(dtype, ne)
        return Source("pack16", host.matrices * host.tiles, host.tile, lambda n: n * host.tile)
    tiles, row = tiles_of(dtype, ne), dtype.row_bytes(ne[0])

    def start(tile: int) -> int:
        matrix, tile = divmod(tile, tiles.tiles)
        return (matrix * tiles.rows + tile * TILE) * row

    return Source("pack", tiles.matrices * tiles.tiles, TILE * row, start)


def can_pack(dtype: DType, ne: Ne, layout: str = "plain") -> bool:
    """Whether a tile of a weight fits in a part of the pinned memory."""
    return source_of(dtype, ne, layout).nbytes <= PART


def upload_packed(
    context: Context,
    staging: Staging,
    ptr: int,
    dtype: DType,
    ne: Ne,
    data: Bytes,
    layout: str = "plain",
) -> None:
    """Queue the packing of a weight, flat bytes in a layout of the host, into tiles at `ptr`, whose
    memory is zero. After it returns, `data` may change."""

    target, source = tiles_of(dtype, ne).at(ptr), source_of(dtype, ne, layout)

    def start(first: int, last: int, part: Bytes) -> None:
        context.start(launch(dtype, target, source, part.ctypes.data, first, last))

    context.load([launch(dtype, target, source, 0, 0, 1)])
    pieces = _pieces(source)
    staging.stream((data[at], partial(start, first, last)) for first, last, at in pieces)


def _pieces(source: Source) -> Iterator[tuple[int, int, slice]]:
    """Pieces of about `PIECE` bytes: the first tile and the one after the last, counted over all
    matrices, and their bytes."""
    step = max(1, PIECE // source.nbytes)
    for first in range(0, source.tiles, step):
        last = min(first + step, source.tiles)
        yield first, last, slice(source.start(first), source.start(last))


def launch(
    dtype: DType,
    target: Packed,
    source: Source,
    ptr: int,
    first: int,
    last: int,
    *,
    ids: Tensor = ALL,
    most: int | None = None,
) -> Launch:
    """The launch that packs the tiles of a source from `first`, which is at address `ptr`, to
    before `last`.

    ids   of the matrices to pack
    most  blocks
    """
    args = pack([np.uint64(ptr), target, np.int32(first), np.int32(last - first), ids])
    parts, chunks = PARTS[source.kernel], -(-target.groups // GROUPS)
    blocks = -(-(last - first) * chunks // parts)
    grid = (blocks if most is None else min(blocks, most), 1, 1)
    return Launch(FILE, f"{source.kernel}<{dtype.name}>", grid, (parts * THREADS, 1, 1), args)


def few_blocks(source: Source, target: Packed) -> int:
    """The blocks of a launch that has `UNDER_WAY` bytes under way."""
    groups: int = target.groups
    chunk = source.nbytes * GROUPS // max(groups, GROUPS)
    return -(-UNDER_WAY // (PARTS[source.kernel] * chunk))

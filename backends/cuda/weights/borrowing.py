"""Weights that stay on the host and are read by a GPU in every run.

If their file's pages can be registered, a kernel packs them from there (kernels/pack.cu), and this
is part of the run's graph. Otherwise threads copy the file to pinned memory in every run, as when a
weight is loaded. The lost design kept packed copies on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from pyggml.backends.cuda.device.context import Context
from pyggml.backends.cuda.device.pinned import Staging
from pyggml.backends.cuda.device.registered import Pages, Registry
from pyggml.backends.cuda.weights import loading
from pyggml.backends.cuda.weights.bits import Bytes
from pyggml.backends.cuda.weights.packing import TILE, tiles_of
from pyggml.backends.step import WeightLayout
from pyggml.node import Node
from pyggml.ops.leaf import data_of

Action = Callable[[], None]


class Borrowing(NamedTuple):
    """How a weight gets to the GPU in every run.

    actions    queue it
    in_graphs  whether they can be part of a graph
    pages      pages that must stay registered as long as the actions are used
    """

    actions: Sequence[Action]
    in_graphs: bool
    pages: Sequence[Pages] = ()


def borrow(
    context: Context,
    staging: Staging,
    registry: Registry,
    ptr: int,
    constant: Node,
    layout: WeightLayout,
) -> Borrowing:
    """How a weight gets to `ptr`, whose memory has other uses between runs."""
    data, dtype, ne = loading.flat(data_of(constant)), constant.dtype, constant.ne
    pages = registry.cover(data)
    if layout.name == "plain":
        if pages is None:
            return Borrowing([partial(staging.upload, ptr, data)], False)
        return Borrowing(list(_copies(context, ptr, data, pages)), True, pages)
    tiles = tiles_of(dtype, ne)
    clear: list[Action] = []
    if ne[1] % TILE:  # packing does not write rows past the end
        driver = context.driver
        clear = [partial(driver.memset_d8_async, ptr, 0, tiles.nbytes, context.stream)]
    if pages is not None:
        launch = loading.launch(
            dtype, tiles.at(ptr), data.ctypes.data, 0, tiles.matrices * tiles.tiles
        )
        context.load([launch])
        return Borrowing([*clear, partial(context.start, launch)], True, pages)
    if loading.can_pack(dtype, ne):
        packing = partial(loading.upload_packed, context, staging, ptr, dtype, ne, data)
        return Borrowing([*clear, packing], False)
    packed = loading.stored(constant, layout, data)
    return Borrowing([partial(staging.upload, ptr, packed)], False)


def _copies(context: Context, ptr: int, data: Bytes, pages: Sequence[Pages]) -> Iterator[Action]:
    """Copies of the data, each within pages that were registered together."""
    begin = data.ctypes.data
    for page in sorted(pages, key=lambda page: page.start):
        part = data[max(page.start - begin, 0) : page.end - begin]
        target = ptr + max(page.start - begin, 0)
        yield partial(context.driver.memcpy_htod_async, target, part, context.stream)

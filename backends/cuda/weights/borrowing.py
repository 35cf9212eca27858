"""Weights that stay on the host and are read by a GPU in every run.

If their pages can be registered, a kernel packs them from there (kernels/pack.cu), and this is part
of the run's graph: on a stream of its own and few multiprocessors, if the plan reads the weight
ahead. It leaves out experts that no token has, if the plan knows them by then. Otherwise threads
copy them to pinned memory in every run, as when a weight is loaded. The pages are those of the
file, or of the tiles in which the cpu backend keeps a weight that it computes with in other plans,
so the host has one copy of it.

Three designs lost: packed copies on the host take as much memory again; a host that restores the
file's rows from its tiles, at 0.2 to 1 GB/s a core, is slower than the bus; a cpu backend that
computes with the file's rows needs a second kernel for each product and block type, and reads
iq4_nl at 12 GB/s a thread (AVX2) where tiles are read at 36.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from pyggml.backends.cuda.device.context import Context
from pyggml.backends.cuda.device.pinned import Staging
from pyggml.backends.cuda.device.registered import Pages, Registry
from pyggml.backends.cuda.launch import Operand
from pyggml.backends.cuda.weights import loading
from pyggml.backends.cuda.weights.bits import Bytes
from pyggml.backends.cuda.weights.packing import TILE, tiles_of
from pyggml.backends.host_tiles import LAYOUT
from pyggml.backends.host_tiles import tiles_of as host_tiles_of
from pyggml.backends.step import Address, WeightLayout
from pyggml.node import Node
from pyggml.ops.leaf import data_of

#: Queues something in a stream.
Action = Callable[[Any], None]


class Borrowing(NamedTuple):
    """How a weight gets to the GPU in every run.

    actions    queue it in a stream
    in_graphs  whether they can be part of a graph; if not, they queue it in the device's own stream
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
    lent: Address | None = None,
    *,
    ids: Operand | None = None,
    ahead: bool = False,
) -> Borrowing:
    """How a weight gets to `ptr`, whose memory has other uses between runs.

    lent   where the plan has it on the host
    ids    of the experts that are needed; None: all are
    ahead  whether the device computes meanwhile
    """
    dtype, ne, form = constant.dtype, constant.ne, "plain"
    if lent is not None and lent.layout == LAYOUT:
        form, nbytes = lent.layout, host_tiles_of(dtype, ne).nbytes
        data = lent.buffer[lent.offset : lent.offset + nbytes]
        pages = registry.cover(data, fixed=True)
    else:
        data = loading.flat(data_of(constant))
        pages = registry.cover(data)
    if layout.name == "plain":
        if pages is None:
            return Borrowing([_alone(partial(staging.upload, ptr, data))], False)
        return Borrowing(list(_copies(context, ptr, data, pages)), True, pages)
    tiles = tiles_of(dtype, ne)
    clear: list[Action] = []
    if ne[1] % TILE:  # packing does not write rows past the end
        driver = context.driver
        clear = [partial(driver.memset_d8_async, ptr, 0, tiles.nbytes)]
    if pages is not None:
        source, target = loading.source_of(dtype, ne, form), tiles.at(ptr)
        skips = ids is not None and tiles.matrices <= loading.MOST_MATRICES
        few = loading.few_blocks(source, target) if ahead else None
        launch = loading.launch(
            dtype, target, source, data.ctypes.data, 0, source.tiles,
            ids=ids.tensor if ids is not None and skips else loading.ALL,
            most=few or (loading.SKIPPING * context.about.sms if skips else None),
        )  # fmt: skip
        context.load([launch])
        return Borrowing([*clear, partial(context.start, launch)], True, pages)
    if loading.can_pack(dtype, ne, form):
        packing = partial(loading.upload_packed, context, staging, ptr, dtype, ne, data, form)
        own = [partial(action, context.stream) for action in clear]
        return Borrowing([_alone(action) for action in (*own, packing)], False)
    packed = loading.stored(constant, layout, data)
    return Borrowing([_alone(partial(staging.upload, ptr, packed))], False)


def _alone(action: Callable[[], None]) -> Action:
    """An action that has a stream already."""
    return lambda stream: action()


def _copies(context: Context, ptr: int, data: Bytes, pages: Sequence[Pages]) -> Iterator[Action]:
    """Copies of the data, each within pages that were registered together."""
    begin = data.ctypes.data
    for page in sorted(pages, key=lambda page: page.start):
        part = data[max(page.start - begin, 0) : page.end - begin]
        target = ptr + max(page.start - begin, 0)
        yield partial(context.driver.memcpy_htod_async, target, part)

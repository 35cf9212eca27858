"""Collectives over parts that transfers have brought here: sums in the order of the parts."""

from __future__ import annotations

import numpy as np

from pyggml import ops
from pyggml.backends.host_memory import Array, Raw, Scratch, raw_of
from pyggml.backends.numpy.merge import lse_finish, lse_sum, rows_of
from pyggml.backends.numpy.table import kernel
from pyggml.backends.numpy.tiling import scratch_bytes
from pyggml.node import Node


def _reduce_scratch(node: Node) -> int:
    """The running sum of an attention, and what its kernels need."""
    if node.attrs["op"] != "lse":
        return 0
    n = node.ne[0] + 2
    rows = rows_of(n)
    return scratch_bytes(node.spec.elements // node.ne[0] * n, 3 * rows, rows * n)


@kernel(ops.all_reduce, scratch=_reduce_scratch)
def all_reduce(out: Raw, part: Raw, *others: Raw, scratch: Scratch, op: str, rank: int) -> None:
    if op == "sum":
        _sum(out, part, *others)
        return
    running = scratch.array((*part.shape[:3], part.shape[3] + 1))
    used, before = scratch.used, None
    for each in (part, *others):
        scratch.used = used  # each call takes the same bytes
        lse_sum(running, each, before, scratch=scratch)
        before = running
    scratch.used = used
    lse_finish(out, running, scratch=scratch, lse=False)


def _sum(out: Raw, part: Raw, *others: Raw) -> None:
    """The sum in the order of the parts; `out` is none of them."""
    if not others:
        np.copyto(out, part)
        return
    np.add(part, others[0], out=out)
    for other in others[1:]:
        np.add(out, other, out=out)


@kernel(ops.all_gather, types=None)
def all_gather(out: Array, part: Array, *others: Array, dim: int, rank: int) -> None:
    axis, start, target = 3 - dim, 0, raw_of(out)[1]
    for each in (part, *others):
        source = raw_of(each)[1]
        stop = start + source.shape[axis]
        np.copyto(target[(slice(None),) * axis + (slice(start, stop),)], source)
        start = stop


@kernel(ops.reduce_scatter)
def reduce_scatter(
    out: Raw, part: Raw, *others: Raw, dim: int, sizes: tuple[int, ...], rank: int
) -> None:
    start = sum(sizes[:rank])
    index = (slice(None),) * (3 - dim) + (slice(start, start + sizes[rank]),)
    _sum(out, *(each[index] for each in (part, *others)))


@kernel(ops.broadcast, types=None, inplace=("a",))
def broadcast(out: Array, a: Array, *, rank: int) -> None:
    np.copyto(raw_of(out)[1], raw_of(a)[1])

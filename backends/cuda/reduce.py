"""Reductions along rows: sums, argmax, sorting."""

from __future__ import annotations

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.argument import Argument
from pyggml.backends.cuda.geometry import blocks_for, row_grid, rows, threads_for
from pyggml.backends.cuda.launch import Call
from pyggml.backends.cuda.table import kernel
from pyggml.node import Node
from pyggml.ops.reduce import row_length

FILE = "reduce.cu"
#: Keys that a block sorts in shared memory; PART in reduce.cu.
PART = 4096
_KEY = 8


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@kernel(ops.sum_rows)
def sum_rows(call: Call) -> None:
    a = call["a"]
    threads = threads_for(a.ne[0])
    call.launch(FILE, "sum_rows", grid=row_grid(a), block=threads, args=[call.out.tensor, a.tensor])


def _parts(n: int) -> int:
    """Blocks that share the argmax of a row of `n`; at most 32."""
    return min(32, blocks_for(n, 4096))


def _argmax_scratch(node: Node) -> int:
    parts = _parts(row_length(node))
    return 0 if parts == 1 else node.spec.elements * parts * _KEY


@kernel(ops.argmax, scratch=_argmax_scratch)
def argmax(call: Call) -> None:
    out, a = call.out, call["a"]
    parts = _parts(a.ne[0])
    keys = np.uint64(call.scratch(rows(a) * parts * _KEY) if parts > 1 else 0)
    grid, threads = (*row_grid(a), parts), threads_for(a.ne[0])
    args: list[Argument] = [out.tensor, a.tensor, keys]
    call.launch(FILE, "argmax", grid=grid, block=threads, args=args)
    if parts > 1:
        last: list[Argument] = [out.tensor, keys, np.int32(parts)]
        call.launch(FILE, "argmax_of", grid=row_grid(a), block=32, args=last)


def sort_scratch(node: Node) -> int:
    """Bytes for the keys of all rows, if a row is too long for shared memory."""
    n = row_length(node)
    return 0 if n <= PART else node.spec.elements // node.ne[0] * power_of_two(n) * _KEY


@kernel(ops.argsort, scratch=sort_scratch)
def argsort(call: Call) -> None:
    sort(call, descending=call.attrs["order"] == "desc")


def sort(call: Call, descending: bool) -> None:
    """Record a sort of rows; the result has as many ids of each as it has room for."""
    a, padded = call["a"], power_of_two(row_length(call.node))
    order = np.int32(descending)
    if padded <= PART:
        call.launch(
            FILE,
            "sort_rows",
            grid=row_grid(a),
            block=threads_for(padded // 2),
            args=[call.out.tensor, a.tensor, np.int32(padded), order],
            shared=padded * _KEY,
        )
        return
    count, keys = rows(a), padded // PART
    memory = np.uint64(call.scratch(count * padded * _KEY))
    size = np.int32(padded)
    grid = (count, keys)
    call.launch(FILE, "make_keys", grid=grid, block=1024, args=[memory, a.tensor, size, order])
    run = 2 * PART
    while run <= padded:
        stride = run // 2
        while stride >= PART:
            far: list[Argument] = [memory, size, np.int32(run), np.int32(stride)]
            call.launch(FILE, "merge_far", grid=(count, padded // 512), block=256, args=far)
            stride //= 2
        near: list[Argument] = [memory, size, np.int32(run)]
        call.launch(FILE, "merge_near", grid=grid, block=1024, args=near)
        run *= 2
    out = call.out
    ids_grid = (count, blocks_for(out.ne[0]))
    call.launch(FILE, "first_ids", grid=ids_grid, block=256, args=[out.tensor, memory, size])

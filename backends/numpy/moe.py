"""Mixture of experts: fused up and gate, routing, weighted sums."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from pyggml import ops
from pyggml.backends.host_memory import Array, Floats, Raw, Scratch, raw_of, shape_of
from pyggml.backends.numpy.arrays import codec_bytes, decoded, work_of
from pyggml.backends.numpy.blas import blas_view, has_blas_view
from pyggml.backends.numpy.elementwise import ACTIVATIONS, limit_gate
from pyggml.backends.numpy.linear import BATCH, by_expert, expert_scratch, tile_rows, weights_at
from pyggml.backends.numpy.products import row_products
from pyggml.backends.numpy.reduce import first_ids, ids_of, sort_keys
from pyggml.backends.numpy.table import kernel
from pyggml.backends.numpy.tiling import PIECE, pieces, scratch_bytes, shaped, split
from pyggml.node import Node
from pyggml.ops.reduce import row_length


@kernel(ops.moe_up_gate, types=None, scratch=expert_scratch(3))
def moe_up_gate(
    out: Raw,
    up: Array,
    gate: Array,
    b: Raw,
    ids: Raw,
    *,
    scratch: Scratch,
    act: str,
    prec: str,
    limit: float | None,
) -> None:
    def finish(products: Sequence[Floats]) -> Floats:
        up_part, gate_part, spare = products
        limit_gate(gate_part, up_part, limit)
        ACTIVATIONS[act](gate_part, gate_part, spare)
        gate_part *= up_part
        return gate_part

    by_expert(out, (up, gate), b, ids, scratch, 3, finish)


@kernel(ops.multi_add)
def multi_add(out: Raw, a: Raw) -> None:
    np.sum(a[0], axis=1, out=out[0, 0])


@kernel(ops.mul_multi_add, scratch=lambda node: scratch_bytes(max(PIECE, node.ne[0])))
def mul_multi_add(out: Raw, a: Raw, b: Raw, *, scratch: Scratch) -> None:
    n = out.shape[3]
    memory = scratch.array(max(PIECE, n))
    for t in split(out.shape[2], max(1, PIECE // n)):
        y = out[0, 0, t]
        weighted = shaped(memory, *y.shape)
        np.multiply(a[0, t, 0], b[0, t, 0], out=y)
        for slot in range(1, a.shape[2]):
            np.multiply(a[0, t, slot], b[0, t, slot], out=weighted)
            y += weighted


def _routing_tokens(n_experts: int) -> int:
    """Tokens to route at once."""
    return max(1, min(256, PIECE // n_experts))


def _routing_scratch(node: Node) -> int:
    n, groups = row_length(node), node.attrs["n_group"]
    tokens = _routing_tokens(n)
    return scratch_bytes(*(tokens * n,) * 3, *(tokens * groups,) * 4)


@kernel(ops.grouped_topk, scratch=_routing_scratch)
def grouped_topk(
    out: Raw, a: Raw, *, scratch: Scratch, n_group: int, n_group_used: int, n_top: int, k: int
) -> None:
    """Sort the groups by score, then the experts, with those of dropped groups at the end."""
    n = a.shape[3]
    tokens = _routing_tokens(n)
    best, scores = scratch.array(tokens * n), scratch.array(tokens * n_group)
    expert_keys = scratch.array(tokens * n, np.int64)
    group_keys = scratch.array(tokens * n_group, np.int64)
    flags = scratch.array(tokens * n_group, np.bool_)
    for index in pieces(a.shape[:3], tokens):
        part = a[index]
        *rows, _ = part.shape
        grouped = shaped(best, *rows, n_group, n // n_group)
        np.copyto(grouped.reshape(part.shape), part)
        grouped.partition(n // n_group - n_top)
        score = shaped(scores, *rows, n_group)
        np.sum(grouped[..., -n_top:], axis=-1, out=score)
        order = shaped(group_keys, *rows, n_group)
        sort_keys(score, order, descending=True)
        order.sort()
        dropped = shaped(flags, *rows, n_group)
        dropped.fill(False)
        np.put_along_axis(dropped, ids_of(order)[..., n_group_used:], True, axis=-1)
        keys = shaped(expert_keys, *rows, n)
        sort_keys(part, keys, descending=True)
        by_group = keys.reshape(grouped.shape)
        np.copyto(by_group, np.iinfo(np.int64).max, where=dropped[..., None])
        np.copyto(out[index], first_ids(keys, k))


def _fused_tile(m: int, k: int, n: int) -> tuple[int, int]:
    """Rows of weights and rows of b in a tile."""
    rows = tile_rows(m, k)
    return rows, min(n, max(1, BATCH // max(k, rows)))


def _fused_scratch(node: Node) -> int:
    up, b = node["up"], node["b"]
    k, m = up.ne[:2]
    rows, columns = _fused_tile(m, k, b.ne[1])
    converted = 0 if has_blas_view(b) else columns * k
    size = scratch_bytes(rows * k, converted, rows * columns, rows * columns)
    return size + codec_bytes(*node.src)


@kernel(ops.fused_up_gate, types=None, scratch=_fused_scratch)
def fused_up_gate(
    out: Raw,
    up: Array,
    gate: Array,
    b: Raw,
    *,
    scratch: Scratch,
    act: str,
    prec: str,
    limit: float | None,
) -> None:
    """For each tile: the gate goes to out, up to scratch, then the activation joins them."""
    *_, m, k = shape_of(up)
    n3, n2, n, _ = b.shape
    rows, columns = _fused_tile(m, k, n)
    b_type, direct = raw_of(b)[0], blas_view(b)
    weights = scratch.array(rows * k)
    converted = scratch.array(columns * k if direct is None else 0)
    up_memory, spare = (scratch.array(rows * columns) for _ in range(2))
    work = work_of(scratch, up, gate, b)
    for i3, i2, c in product(range(n3), range(n2), split(n, columns)):
        x = b[i3, i2, c] if direct is None else direct[i3, i2, c]
        if direct is None:
            x = decoded(b_type, x, converted, work)
        for r in split(m, rows):
            y = out[i3, i2, c, r]
            row_products(x, weights_at(gate, (0, 0, r), weights, work), y)
            up_part = shaped(up_memory, *y.shape)
            row_products(x, weights_at(up, (0, 0, r), weights, work), up_part)
            limit_gate(y, up_part, limit)
            ACTIVATIONS[act](y, y, shaped(spare, *y.shape))
            y *= up_part

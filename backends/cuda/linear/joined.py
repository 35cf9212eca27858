"""Several products that read the same columns as one launch: queries, keys and values, and more.

Products of a token, or of a few, are short: 2 MB of weights take less time than the way from one
launch to the next. Up to eight with weights of one type share a launch.

Those of a prompt have few tiles each, and the last round of blocks leaves multiprocessors without
one. Two share a launch of `ring`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Iterator, Sequence
from itertools import accumulate

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.argument import Struct
from pyggml.backends.cuda.fusion import CudaStep
from pyggml.backends.cuda.launch import Call, Operand
from pyggml.backends.cuda.linear import blocks, ring
from pyggml.backends.cuda.linear.common import FEW, VEC, shape_of
from pyggml.backends.cuda.weights.packing import Packed, packed
from pyggml.dtypes import F32
from pyggml.ops.leaf import constant_op

#: The most products of a launch, with few columns and with many.
MOST, MOST_WIDE = 8, 2


class Joined(Struct):
    """The struct `Joined` of linear_vec.cu."""

    _fields_ = (
        ("w", Packed * MOST),
        ("y", ctypes.c_uint64 * MOST),
        ("first", ctypes.c_int32 * MOST),
        ("step", ctypes.c_int32 * MOST),
        ("n", ctypes.c_int32),
    )


def join(steps: Sequence[CudaStep]) -> Iterator[CudaStep]:
    """The steps, with products joined where the first of them is. They read weights and what is
    prepared, so they may run as early as that one."""
    groups: dict[Hashable, list[CudaStep]] = {}
    for step in steps:
        form = _form_of(step)
        if form is not None:
            key = form, step.operands[form], step.node["a"].dtype
            groups.setdefault(key, []).append(step)
    joined: dict[CudaStep, CudaStep | None] = {}
    for own in groups.values():
        most = MOST if "fixed" in own[0].operands else MOST_WIDE
        for end in range(len(own), 0, -most):  # the last ones are smaller: queries, keys, values
            some = own[max(0, end - most) : end]
            if len(some) > 1:
                joined |= dict.fromkeys(some)
                joined[some[0]] = _joined(some)
    for step in steps:
        whole = joined.get(step, step)
        if whole is not None:
            yield whole


def _form_of(step: CudaStep) -> str | None:
    """The operand that a product which can be joined reads in place of b: few prepared columns, or
    many. Its one matrix of weights is constant."""
    node = step.node
    if len(step.nodes) > 1 or node.op is not ops.mul_mat:
        return None
    a, shape = node["a"], shape_of(node["a"].ne, node["b"].ne)
    alone = shape.batches == 1 and node.dtype is F32 and a.root.op is constant_op
    if not alone or node.attrs["prec"] == "f32":
        return None
    if "fixed" in step.operands and node.ne[1] == shape.columns <= FEW:
        return "fixed"
    wide = "halves" in step.operands and shape.columns > blocks.WIDEST_TILE
    return "halves" if wide and ring.can_take(a.dtype, a.ne) else None


def _joined(steps: Sequence[CudaStep]) -> CudaStep:
    nodes, form = tuple(step.node for step in steps), _form_of(steps[0])
    assert form is not None
    operands = {f"a{i}": node["a"] for i, node in enumerate(nodes)}
    operands |= {"b": nodes[0]["b"], form: steps[0].operands[form]}
    results = {f"y{i}": node for i, node in enumerate(nodes[:-1])}
    scratch = max(step.scratch for step in steps)
    record = record_few if form == "fixed" else _record_wide
    return CudaStep(nodes, operands, record, results=results, scratch=scratch)


def products_of(call: Call) -> tuple[list[Operand], list[Operand]]:
    """The weights and the results."""
    weights = [call[f"a{i}"] for i in range(MOST) if call.get(f"a{i}")]
    return weights, [*(call[f"y{i}"] for i in range(len(weights) - 1)), call.out]


def _record_wide(call: Call) -> None:
    weights, outs = products_of(call)
    first, second = zip(weights, outs)
    if not all(ring.can_ring(call, (w,), y) for w, y in (first, second)):
        for w, y in (first, second):
            blocks.tile(call, (w,), call["b"], y)
        return
    blocks.launch_ring(call, first[:1], call["b"], first[1], second)


def record_few(call: Call) -> None:
    weights, outs = products_of(call)
    columns = call.out.ne[1]
    chunk = next(n for n in (1, 2, 4, FEW) if n >= columns)
    tiles = [-(-w.ne[1] // 8) for w in weights]
    pair = 2 if sum(tiles) >= 1024 else 1  # as `blocks.vec` does
    alone = any(w.layout != "tiles8" for w in weights) or any(y.nb[0] != 4 for y in outs)
    if alone or (columns > 1 and pair > 1):
        for w, y in zip(weights, outs):
            blocks.vec(call, (w,), call["b"], y, 2)
        return
    counts = [-(-n // pair) for n in tiles]
    warps = blocks.warps_for(weights[0].ne[0] // 32, sum(counts))
    call.launch(
        VEC,
        f"vec_joined<{blocks.cpp_format(weights[0])}, {chunk}, {pair}>",
        grid=sum(counts),
        block=(32, max(warps, 8 * chunk * pair // 32)),
        args=[
            argument_of(weights, outs, counts),
            call["fixed"].pointer,
            np.int32(columns),
        ],
    )


def argument_of(
    weights: Sequence[Operand], outs: Sequence[Operand], counts: Sequence[int]
) -> Joined:
    """The kernel argument, of products with so many blocks."""
    spare = MOST - len(weights)
    return Joined(
        w=(*map(packed, weights), *[packed(weights[0])] * spare),
        y=(*(y.ptr for y in outs), *[0] * spare),
        first=(0, *accumulate(counts[:-1]), *[0] * spare),
        step=(*(y.nb[1] // 4 for y in outs), *[0] * spare),
        n=len(weights),
    )

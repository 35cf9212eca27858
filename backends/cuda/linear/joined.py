"""Several products with one column as one launch: queries, keys and values of a token, and more.

A token's products are short: 2 MB of weights take less time than the way from one launch to the
next. Those that read the same column and have weights of one type share a launch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Iterator, Sequence
from itertools import accumulate

from pyggml import ops
from pyggml.backends.cuda.argument import Struct
from pyggml.backends.cuda.fusion import CudaStep
from pyggml.backends.cuda.launch import Call
from pyggml.backends.cuda.linear import blocks
from pyggml.backends.cuda.linear.common import VEC, shape_of
from pyggml.backends.cuda.weights.packing import Packed, packed
from pyggml.dtypes import F32
from pyggml.ops.leaf import constant_op

#: The most products of a launch.
MOST = 8


class Joined(Struct):
    """The struct `Joined` of linear_vec.cu."""

    _fields_ = (
        ("w", Packed * MOST),
        ("y", ctypes.c_uint64 * MOST),
        ("first", ctypes.c_int32 * MOST),
        ("n", ctypes.c_int32),
    )


def join(steps: Sequence[CudaStep]) -> Iterator[CudaStep]:
    """The steps, with products joined where the first of them is. They read weights and what is
    prepared, so they may run as early as that one."""
    groups: dict[Hashable, list[CudaStep]] = {}
    for step in steps:
        if _can_join(step):
            own = groups.setdefault((step.operands["fixed"], step.node["a"].dtype), [])
            own.append(step)
    joined: dict[CudaStep, CudaStep | None] = {}
    for own in groups.values():
        for i in range(0, len(own), MOST):
            some = own[i : i + MOST]
            if len(some) > 1:
                joined |= dict.fromkeys(some)
                joined[some[0]] = _joined(some)
    for step in steps:
        whole = joined.get(step, step)
        if whole is not None:
            yield whole


def _can_join(step: CudaStep) -> bool:
    """Whether the step is a product of one prepared column and one matrix of constant weights."""
    node = step.node
    if len(step.nodes) > 1 or node.op is not ops.mul_mat or "fixed" not in step.operands:
        return False
    a, shape = node["a"], shape_of(node["a"].ne, node["b"].ne)
    alone = shape.batches == shape.columns == 1 and node.dtype is F32
    return alone and a.root.op is constant_op and node.attrs["prec"] != "f32"


def _joined(steps: Sequence[CudaStep]) -> CudaStep:
    nodes = tuple(step.node for step in steps)
    operands = {f"a{i}": node["a"] for i, node in enumerate(nodes)}
    operands |= {"b": nodes[0]["b"], "fixed": steps[0].operands["fixed"]}
    results = {f"y{i}": node for i, node in enumerate(nodes[:-1])}
    scratch = max(step.scratch for step in steps)
    return CudaStep(nodes, operands, _record, results=results, scratch=scratch)


def _record(call: Call) -> None:
    weights = [call[f"a{i}"] for i in range(MOST) if call.get(f"a{i}")]
    outs = [*(call[f"y{i}"] for i in range(len(weights) - 1)), call.out]
    if any(w.layout != "tiles8" for w in weights) or any(y.nb[0] != 4 for y in outs):
        for w, y in zip(weights, outs):
            blocks.vec(call, (w,), call["b"], y, 2)
        return
    tiles = [-(-w.ne[1] // 8) for w in weights]
    pair = 2 if sum(tiles) >= 1024 else 1  # as `blocks.vec` does
    counts = [-(-n // pair) for n in tiles]
    spare = MOST - len(weights)
    call.launch(
        VEC,
        f"vec_joined<{blocks.cpp_format(weights[0])}, {pair}>",
        grid=sum(counts),
        block=(32, blocks.warps_for(weights[0].ne[0] // 32, sum(counts))),
        args=[
            Joined(
                w=(*map(packed, weights), *[packed(weights[0])] * spare),
                y=(*(y.ptr for y in outs), *[0] * spare),
                first=(0, *accumulate(counts[:-1]), *[0] * spare),
                n=len(weights),
            ),
            call["fixed"].pointer,
        ],
    )

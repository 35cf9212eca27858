"""The choice of experts from their scores as one step: gate, the best of them, their weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.fusion import Fused, Run, fuses
from pyggml.backends.cuda.geometry import threads_for
from pyggml.backends.cuda.launch import ABSENT, Call
from pyggml.backends.cuda.reduce import power_of_two
from pyggml.dtypes import F32
from pyggml.node import Node

#: Experts up to which a block sorts their keys in the shared memory that every kernel has.
MOST = 2048


@dataclass(frozen=True, slots=True)
class _Routing:
    """What a match is made of.

        p = soft_max(s_in scores) or sigmoid(scores)
        ids = the best of p (+ bias), within the best groups where there are some     [k, T]
        weights = s (p[ids] / clamp(sum of p[ids])) + b                               [k, T]

    limits  of the clamp; None: weights are not divided
    nodes   all that is covered, the result last
    """

    scores: Node
    probs: Node
    ids: Node
    nodes: tuple[Node, ...]
    bias: Node | None = None
    limits: tuple[float, float] | None = None
    s: float = 1.0
    b: float = 0.0
    groups: tuple[int, int, int] = field(default=(0, 0, 0))


@fuses(ops.get_rows)
@fuses(ops.div)
@fuses(ops.scale)
def route(node: Node, run: Run) -> Fused | None:
    """The end of `feed_forward.route`, whichever of its forms."""
    found = _scaled(node, run)
    if found is None or found.scores.ne[0] > MOST or found.scores.dtype is not F32:
        return None
    ids = found.ids
    if node.ne not in (ids.ne, (1, *ids.ne[:3])) or run.only(ids, *found.nodes):
        return None
    reads = (found.scores, *(() if found.bias is None else (found.bias,)))
    record = partial(_record, found=found)
    return Fused(found.nodes, reads, record, also=(found.ids,), at=found.ids)


def _scaled(node: Node, run: Run) -> _Routing | None:
    if node.op is not ops.scale:
        return _divided(node, run)
    inner = _shown(node.src[0])
    found = _divided(inner, run) if inner is not None and run.only(inner, node) else None
    if found is None:
        return None
    return replace(found, nodes=(*found.nodes, node), s=node.attrs["s"], b=node.attrs["b"])


def _divided(node: Node, run: Run) -> _Routing | None:
    if node.op is not ops.div:
        return _chosen(node, run)
    weights, least = node.src
    if weights is None or least is None or least.op is not ops.clamp:
        return None
    total, inner = least.src[0], _shown(weights)
    if total is None or inner is None or total.op is not ops.sum_rows:
        return None
    if total.src[0] is not weights or weights.ne != (inner.ne[1], inner.ne[2], 1, 1):
        return None
    alone = run.only(inner, total, node) and run.only(total, least) and run.only(least, node)
    found = _chosen(inner, run) if alone else None
    if found is None:
        return None
    limits = (least.attrs["min"], least.attrs["max"])
    return replace(found, nodes=(*found.nodes, total, least, node), limits=limits)


def _chosen(node: Node, run: Run) -> _Routing | None:
    """get_rows(reshape(p), ids) of the best."""
    if node.op is not ops.get_rows:
        return None
    shown, ids = node.src
    assert shown is not None and ids is not None
    if shown.op is not ops.reshape or ids.op not in (ops.top_k, ops.grouped_topk):
        return None
    probs, chosen = shown.src[0], ids.src[0]
    if probs is None or chosen is None or probs.ne[2:] != (1, 1):
        return None
    if shown.ne != (1, probs.ne[0], probs.ne[1], 1):
        return None
    bias: Node | None = None
    inner: tuple[Node, ...] = (probs, ids, node)
    if chosen is not probs:
        if chosen.op is not ops.add or chosen.src[0] is not probs or not run.only(chosen, ids):
            return None
        bias = chosen.src[1]
        if bias is None or bias.ne != (probs.ne[0], 1, 1, 1):
            return None
        inner = (probs, chosen, ids, node)
    if not run.only(probs, *inner[1:]):
        return None
    plain = probs.op is ops.sigmoid or (probs.op is ops.soft_max_ext and not any(probs.src[1:]))
    scores = probs.src[0] if plain else None
    names = ("n_group", "n_group_used", "n_top")
    groups = tuple(ids.attrs[n] for n in names) if ids.op is ops.grouped_topk else (0, 0, 0)
    return None if scores is None else _Routing(scores, probs, ids, inner, bias, groups=groups)


def _shown(node: Node | None) -> Node | None:
    """What a reshape looks at."""
    return node.src[0] if node is not None and node.op is ops.reshape else node


def _record(call: Call, found: _Routing) -> None:
    scores, (ids,), out = call.operand(0), call.also, call.out
    if out.ne != ids.ne:  # [1, k, T] as [k, T]
        out = replace(out, ne=ids.ne, nb=(*out.nb[1:3], 0, 0))
    bias = ABSENT if found.bias is None else call.operand(1)
    softmax = found.probs.op is ops.soft_max_ext
    low, high = found.limits or (0.0, 0.0)
    padded = power_of_two(scores.ne[0])
    call.launch(
        "moe.cu",
        "route",
        grid=scores.ne[1],
        block=threads_for(padded // 2),
        args=[
            *(x.tensor for x in (out, ids, scores, bias)),
            np.int32(padded),
            *map(np.int32, found.groups),
            np.int32(softmax),
            np.float32(found.probs.attrs["scale"] if softmax else 1.0),
            np.int32(found.limits is not None),
            *map(np.float32, (low, high, found.s, found.b)),
        ],
        shared=8 * (padded + found.groups[0]) + 8 * padded,
    )

"""Expert routing fused into one step: the gate, the top k, their weights."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, replace
from functools import partial

from pyggml import ops
from pyggml.backends.cuda.argument import Struct, Tensor
from pyggml.backends.cuda.fusion import Fused, Run, behind_reshapes
from pyggml.backends.cuda.launch import ABSENT, Call, Operand
from pyggml.backends.cuda.linear import exact
from pyggml.backends.cuda.linear.routes import Product
from pyggml.dtypes import F32, I32
from pyggml.node import Node
from pyggml.ops.leaf import constant_op

#: The most experts whose keys fit in the default shared memory, and the most of them for a token:
#: a lane of a warp has one.
MOST, MOST_USED = 2048, 32


@dataclass(frozen=True, slots=True)
class Routing:
    """The parts of a match.

        p = soft_max(s_in scores) or sigmoid(scores) or sqrt(softplus(scores))
        ids = top k of p (+ bias), within the best groups if there are groups, or given [k, T]
        weights = s (p[ids] / clamp(sum of p[ids])) + b                               [k, T]

    limits  of the clamp; None: weights are not divided
    ranks   table[ids], which others read in place of ids: those of one device among several, or -1
    nodes   all nodes covered, the result last
    """

    scores: Node
    probs: Node
    ids: Node
    nodes: tuple[Node, ...]
    bias: Node | None = None
    ranks: Node | None = None
    limits: tuple[float, float] | None = None
    s: float = 1.0
    b: float = 0.0
    groups: tuple[int, int, int] = field(default=(0, 0, 0))

    @property
    def given(self) -> bool:
        """Whether another step computes the ids."""
        return self.ids not in self.nodes

    @property
    def local(self) -> Node:
        """The ids of weights on this device."""
        return self.ids if self.ranks is None else self.ranks

    @property
    def own(self) -> Node | None:
        """The table of ranks."""
        return None if self.ranks is None else self.ranks["a"]

    @property
    def reads(self) -> dict[str, Node]:
        """What is read besides scores and ids."""
        both = {"bias": self.bias, "own": self.own}
        return {name: node for name, node in both.items() if node is not None}


def route(node: Node, run: Run) -> Fused | None:
    """The whole of `models.moe.route`, in any of its forms, and the router of a prompt if its sums
    over parts of k are added up here."""
    routing = routing_of(node, run)
    if routing is None or routing.scores.ne[0] > MOST or routing.scores.dtype is not F32:
        return None
    ids, results, scores = routing.ids, {"ids": routing.local}, routing.scores
    product = _product(scores, routing.nodes[0], run)
    if product is None:
        nodes, reads, scratch = routing.nodes, {"scores": scores}, 0
    else:
        nodes, scratch = (scores, *routing.nodes), product.scratch
        reads = {"w": scores["a"], "x": scores["b"]}
    if node.ne not in (ids.ne, (1, *ids.ne[:3])) or ids.ne[0] > MOST_USED:
        return None
    reads |= routing.reads
    if routing.given:
        reads, results = reads | results, {}
    elif run.only(routing.local, *routing.nodes):
        return None
    record = partial(_record, routing=routing)
    at = None if routing.given else routing.local
    return Fused(nodes, reads, record, results=results, at=at, scratch=scratch)


def _product(scores: Node, reader: Node, run: Run) -> Product | None:
    """The product that computes scores, if only `reader` reads these and its kernel leaves sums of
    splits."""
    if scores.op is not ops.mul_mat or not run.only(scores, reader):
        return None
    product = Product.of(scores)
    return product if product.route == "exact" else None


def routing_of(weights: Node, run: Run) -> Routing | None:
    """The routing that computes these weights."""
    if weights.op is not ops.scale:
        return _divided(weights, run)
    inner = behind_reshapes(weights["a"])
    routing = _divided(inner, run) if run.only(inner, weights) else None
    if routing is None:
        return None
    return replace(
        routing, nodes=(*routing.nodes, weights), s=weights.attrs["s"], b=weights.attrs["b"]
    )


def _divided(node: Node, run: Run) -> Routing | None:
    if node.op is not ops.div:
        return _chosen(node, run)
    weights, least = node["a"], node["b"]
    if least.op is not ops.clamp or least["a"].op is not ops.sum_rows:
        return None
    total, inner = least["a"], behind_reshapes(weights)
    if total["a"] is not weights or weights.ne != (inner.ne[1], inner.ne[2], 1, 1):
        return None
    alone = run.only(inner, total, node) and run.only(total, least) and run.only(least, node)
    routing = _chosen(inner, run) if alone else None
    if routing is None:
        return None
    limits = (least.attrs["min"], least.attrs["max"])
    return replace(routing, nodes=(*routing.nodes, total, least, node), limits=limits)


def _chosen(node: Node, run: Run) -> Routing | None:
    """get_rows(reshape(p), ids), with the ids of the top k or others."""
    if node.op is not ops.get_rows:
        return None
    table, ids = node["a"], node["ids"]
    if table.op is not ops.reshape:
        return None
    probs = table["a"]
    if probs.ne[2:] != (1, 1) or table.ne != (1, probs.ne[0], probs.ne[1], 1):
        return None
    gates = _gates(probs)
    chosen = _choice(probs, ids)
    if not gates or chosen is None or ids.ne[2:] != (1, 1):
        return None
    choice, bias = chosen
    ranks = _ranks(ids, node, probs.ne[0], run) if choice else None
    nodes = (*gates, *choice, *(() if ranks is None else (ranks,)), node)
    inner, last = [*gates, *choice[:-1]], nodes[1:]
    if not all(run.only(n, *last) for n in inner):
        return None
    names = ("n_group", "n_group_used", "n_top")
    groups = tuple(ids.attrs[n] for n in names) if ids.op is ops.grouped_topk else (0, 0, 0)
    return Routing(gates[0]["a"], probs, ids, nodes, bias, ranks, groups=groups)


def _ranks(ids: Node, weights: Node, n: int, run: Run) -> Node | None:
    """table[ids], with a table of all n experts, if only the weights read ids otherwise."""
    ranks = next((r for r in run.readers[ids] if r is not weights), None)
    if ranks is None or ranks.op is not ops.get_rows or not run.only(ids, weights, ranks):
        return None
    table = ranks["a"]
    fits = table.op is constant_op and table.dtype is I32 and table.ne == (1, n, 1, 1)
    return ranks if fits and behind_reshapes(ranks["ids"]) is ids else None


def _gates(probs: Node) -> tuple[Node, ...]:
    """The nodes that compute p from scores; none if `route` cannot."""
    if probs.op is ops.sqrt and probs["a"].op is ops.softplus:
        return probs["a"], probs
    if probs.op is ops.soft_max_ext:
        return () if probs.get("mask") or probs.get("sinks") else (probs,)
    return (probs,) if probs.op is ops.sigmoid else ()


def _choice(probs: Node, ids: Node) -> tuple[tuple[Node, ...], Node | None] | None:
    """The nodes that choose ids by p, and the bias; no nodes if the ids are given."""
    if ids.op not in (ops.top_k, ops.grouped_topk):
        return (), None
    ranked = ids["a"]
    if ranked is probs:
        return (ids,), None
    if ranked.op is not ops.add or ranked["a"] is not probs:
        return None
    bias = ranked["b"]
    return ((ranked, ids), bias) if bias.ne == (probs.ne[0], 1, 1, 1) else None


class Route(Struct):
    """The struct `Route` of route.cuh."""

    _fields_ = (
        *((name, Tensor) for name in ("weights", "ids", "bias")),
        ("own", ctypes.c_uint64),
        *(
            (name, ctypes.c_int32)
            for name in ("n_group", "n_used", "n_top", "given", "gate", "divided")
        ),
        *((name, ctypes.c_float) for name in ("scale", "low", "high", "s", "b")),
    )


def argument(routing: Routing, weights: Operand, ids: Operand, call: Call) -> Route:
    """The kernel argument; weights, ids [k, T]."""
    n_group, n_used, n_top = routing.groups
    low, high = routing.limits or (0.0, 0.0)
    return Route(
        weights=weights.tensor,
        ids=ids.tensor,
        bias=(call.get("bias") or ABSENT).tensor,
        own=(call.get("own") or ABSENT).ptr,
        n_group=n_group,
        n_used=n_used,
        n_top=n_top,
        given=routing.given,
        gate=(ops.sigmoid, ops.soft_max_ext, ops.sqrt).index(routing.probs.op),
        divided=routing.limits is not None,
        scale=routing.probs.attrs.get("scale", 1.0),
        low=low,
        high=high,
        s=routing.s,
        b=routing.b,
    )


def shared_bytes(routing: Routing) -> int:
    """Bytes of shared memory that `choose` needs (`Places` of route.cuh)."""
    each = 16 if routing.ranks is None else 20
    return each * routing.scores.ne[0] + 8 * routing.groups[0]


def _record(call: Call, routing: Routing) -> None:
    ids, out, product = call["ids"], call.out, routing.scores
    if (w := call.get("w")) is None:
        scores, split = call["scores"], False
    else:
        resident = product["a"].root.op is constant_op
        scores, split = exact.launch(call, w, call["x"], None, resident), True
    if routing.ranks is not None:  # view [1, k T] as [k, T]
        k, size = routing.ids.ne[0], ids.dtype.nbytes
        ids = replace(ids, ne=routing.ids.ne, nb=(size, size * k, 0, 0))
    if out.ne != ids.ne:  # view [1, k, T] as [k, T]
        out = replace(out, ne=ids.ne, nb=(*out.nb[1:3], 0, 0))
    call.launch(
        "moe.cu",
        f"route<{str(split).lower()}>",
        grid=scores.ne[1],
        block=32,
        args=[argument(routing, out, ids, call), scores.tensor],
        shared=shared_bytes(routing) + split * 4 * scores.ne[0],
    )

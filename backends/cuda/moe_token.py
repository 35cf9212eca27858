"""The experts of one token, or of a few: routing, up and gate, down, and the shared experts, as one
step.

It has three launches (kernels/moe_token.cu). What they hand on is in scratch.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.argument import Argument, Struct, Tensor
from pyggml.backends.cuda.fusion import Fused, Run, behind_reshapes
from pyggml.backends.cuda.geometry import blocks_for
from pyggml.backends.cuda.launch import ABSENT, Call, Form, Operand
from pyggml.backends.cuda.linear.blocks import cpp_format, fixed_bytes, weights_of
from pyggml.backends.cuda.linear.common import ACT, FEW, aligned, dense, in_blocks
from pyggml.backends.cuda.linear.routes import Product
from pyggml.backends.cuda.moe import sums
from pyggml.backends.cuda.moe_routing import (
    MOST,
    MOST_USED,
    Route,
    Routing,
    argument,
    routing_of,
    shared_bytes,
)
from pyggml.backends.cuda.normed import Norm, adds, norm_of, normed_row
from pyggml.backends.cuda.peers import Round, sends
from pyggml.backends.cuda.weights.formats import FORMATS
from pyggml.backends.cuda.weights.grids import LEVELS
from pyggml.backends.cuda.weights.packing import tiles_of
from pyggml.dtypes import F32, I32
from pyggml.node import Node
from pyggml.ops.leaf import constant_op

FILE = "moe_token.cu"
#: The most experts whose ranks the router writes: MOST_RANKED in moe_token.cu.
MOST_RANKED = 256
#: Rows of up and gate that a block computes, and rows of a tile.
GROUP, TILE = 32, 8
#: The most packs of 4 elements that a thread of the router takes of a row that it normalizes, and
#: elements of the row.
MOST_PACKS, MOST_NORMED = 4, 8192
#: Multiprocessors, warps on them that read as fast as the memory can, and the most of a block.
PROCESSORS, WARPS, MOST_WARPS = 132, 4224, 16
#: The most bytes that a launch fetches into L2 for the next one, which holds 50 MB on an H100: more
#: might be gone again before they are read.
MOST_AHEAD = 16 << 20


class Router(Struct):
    """The struct `Router` of moe_token.cu."""

    _fields_ = (
        ("w", Tensor),
        ("x", Tensor),
        *((name, ctypes.c_uint64) for name in ("scores", "ranks", "bias", "own")),
        ("gate", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


class Candidates(Struct):
    """The struct `Candidates` of moe_token.cu."""

    _fields_ = (
        ("scores", ctypes.c_uint64),
        ("ranks", ctypes.c_uint64),
        ("experts", ctypes.c_int32),
        ("local", ctypes.c_int32),
        ("route", Route),
    )


class Ahead(Struct):
    """The struct `Ahead` of moe_token.cu."""

    _fields_ = (
        ("planes", ctypes.c_uint64 * 4),
        ("tile_bytes", ctypes.c_int32 * 4),
        ("tiles", ctypes.c_int32),
        ("part", ctypes.c_int32),
    )


class Gated(Struct):
    """The struct `Gated` of moe_token.cu."""

    _fields_ = (
        ("x", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("act", ctypes.c_int32),
        ("limit", ctypes.c_float),
    )


class Sums(Struct):
    """The struct `Sums` of moe_token.cu."""

    _fields_ = tuple((name, Tensor) for name in ("out", "plus", "plus2"))


class SentSums(Struct):
    """The struct `SentSums` of moe_token.cu."""

    _fields_ = (("sums", Sums), ("sum", Round))


@dataclass(frozen=True, slots=True)
class Token:
    """What a match is made of.

    hidden  moe_up_gate of the chosen experts; shared: fused_up_gate of the shared ones, if any
    norm    the norm in front, if the launches compute it too
    added   whether what it normalizes is added at the end; kept: whether others read it
    """

    routing: Routing
    hidden: Node
    shared: Node | None
    norm: Norm | None
    added: bool
    kept: bool

    @property
    def used(self) -> int:
        return self.hidden.ne[1]

    @property
    def tokens(self) -> int:
        return self.hidden.ne[2]

    @property
    def pairs(self) -> int:
        """Pairs of slot and token."""
        return self.used * self.tokens


def experts_of_token(node: Node, run: Run) -> Fused | None:
    """mul_multi_add(down moe_up_gate(x)), with its routing, + shared experts + c + d."""
    match = sums(node, run, 2)
    if match is None:
        return None
    (total, *additions), more = match
    product = total["a"]
    if product.op is not ops.mul_mat_id or product["b"].op is not ops.moe_up_gate:
        return None
    hidden, shares = product["b"], behind_reshapes(total["b"])
    routing = routing_of(shares, run)
    if routing is None or routing.given or routing.scores.op is not ops.mul_mat:
        return None
    scores, x = routing.scores, behind_reshapes(routing.scores["b"])
    shared = next((n for n in more if _shared_of(n, x, run) is not None), None)
    inner = None if shared is None else _shared_of(shared, x, run)
    nodes = tuple(
        n
        for n in (scores, *routing.nodes, hidden, product, inner, shared, total, *additions)
        if n is not None
    )
    plus = [n for n in more if n is not shared]
    down = product[product.op.weights[0]]
    if not all(run.only(n, *nodes) for n in nodes[:-1]) or len(plus) > 2:
        return None
    if not _are_blocks(hidden, down, run) or not all(_are_rows(n) for n in (*plus, node)):
        return None
    if not _fits(scores, routing, hidden, product, x):
        return None
    norm, added, results = _norm_of(x, nodes, run), False, dict[str, Node]()
    if norm is not None:
        nodes, added = (*norm.nodes, *nodes), norm.sum in plus
        plus = [n for n in plus if n is not norm.sum]
        results = {} if run.only(norm.sum, *nodes) else {"sum": norm.sum}
    reads = {
        "router": scores["a"], "up": hidden["up"], "gate": hidden["gate"], "down": down,
        **({"x": x} if norm is None else norm.reads),
        **dict(zip(("plus", "plus2"), plus)),
    }  # fmt: skip
    reads |= routing.reads
    if shared is not None and inner is not None:
        reads |= {
            "shared_up": inner["up"],
            "shared_gate": inner["gate"],
            "shared_down": shared["a"],
        }
    token = Token(routing, hidden, inner, norm, added, bool(results))
    step = Fused(
        nodes,
        reads,
        partial(_record, token=token),
        results=results,
        inplace=tuple(plus),
        scratch=sum(_sizes(token)),
        quantized=x if norm is None else None,
    )
    step.strided = not results  # words of 16 bytes
    return step


def _norm_of(x: Node, nodes: tuple[Node, ...], run: Run) -> Norm | None:
    """The norm whose result x is, if only `nodes` read what it computes."""
    norm = norm_of(x, run)
    if norm is None or x.ne[1] > 1 or x.ne[0] > MOST_NORMED or not run.only(x, *nodes):
        return None
    return norm if all(_are_rows(n) for n in norm.reads.values()) else None


def _shared_of(node: Node, x: Node, run: Run) -> Node | None:
    """fused_up_gate(x) if the node is a product of it."""
    if node.op is not ops.mul_mat or node["b"].op is not ops.fused_up_gate:
        return None
    inner = node["b"]
    fits = behind_reshapes(inner["b"]) is x and _is_few(node) and inner.ne[0] % GROUP == 0
    return inner if fits and _are_blocks(inner, node["a"], run) else None


def _is_few(node: Node) -> bool:
    """Whether the product is bound by reading weights, or would be one for each pair anyway."""
    plain = node.dtype is F32 and node.attrs["prec"] != "f32"
    return plain and all(p.route == "vec" for p in Product.all_of(node))


def _are_blocks(hidden: Node, down: Node, run: Run) -> bool:
    """Whether up, gate and down are constant weights of blocks, and up and gate one product."""
    up, gate = hidden["up"], hidden["gate"]
    one = _is_few(hidden) and up.dtype is gate.dtype and run.layout(up) == run.layout(gate)
    return one and all(in_blocks(w.dtype) and w.root.op is constant_op for w in (up, gate, down))


def _are_numbered(down: Node) -> bool:
    """Whether an int can count the groups of all rows in parts of 2 bytes, as `down` does."""
    return down.spec.elements // 4 * max(1, FORMATS[down.dtype.name].codes // 16) < 2**31


def _are_rows(node: Node) -> bool:
    return node.dtype is F32 and node.ne[2:] == (1, 1) and node.contiguous


def _fits(scores: Node, routing: Routing, hidden: Node, product: Node, x: Node) -> bool:
    router, ids, n = scores["a"], routing.ids, scores.ne[0]
    bias = routing.bias
    return (
        _are_rows(x)
        and _are_rows(scores)
        and router.dtype is F32
        and behind_reshapes(router).op is constant_op  # a view may begin anywhere
        and router.ne[0] % 4 == 0
        and ids.dtype is I32
        and n <= MOST
        and ids.ne == (hidden.ne[1], x.ne[1], 1, 1)
        and x.ne[1] <= FEW
        and ids.ne[0] <= MOST_USED
        and behind_reshapes(hidden["b"]) is x
        and all(behind_reshapes(n["ids"]) is routing.local for n in (hidden, product))
        and hidden["up"].ne[0] == x.ne[0]
        and hidden["b"].ne[1] == 1
        and hidden["up"].ne[2] == product[product.op.weights[0]].ne[2]
        and (hidden["up"].ne[2] == n or routing.own is not None)
        and _is_few(product)
        and _are_numbered(product[product.op.weights[0]])
        and hidden.ne[0] % GROUP == 0
        and (bias is None or (bias.dtype is F32 and bias.contiguous))
    )


# -- launches -------------------------------------------------------------------------------------


def _sizes(token: Token) -> tuple[int, ...]:
    """Bytes of scratch: as in `Handed`."""
    scores = 4 * token.routing.scores.spec.elements
    ranks = scores if _ranked(token.routing) else 0
    shared = 0 if token.shared is None else fixed_bytes(token.shared.ne, 2)
    norm, row = token.norm, token.routing.scores["b"].ne[0]
    fixed = 0 if norm is None else fixed_bytes((row, 1, 1, 1), 2)
    total = 4 * row if token.added and not token.kept else 0
    hidden = fixed_bytes(token.hidden.ne, 2)
    return tuple(map(aligned, (scores, ranks, hidden, shared, fixed, total)))


def _ranked(routing: Routing) -> bool:
    """Whether `best_of` of route.cuh can choose: by what each expert's own score and bias make."""
    n, (n_group, _, n_top) = routing.scores.ne[0], routing.groups
    softmax = routing.probs.op is ops.soft_max_ext
    alone = not softmax or (routing.bias is None and n_top < 2)
    return alone and n <= MOST_RANKED and (n_group == 0 or (n == 32 * n_group and n_top <= 2))


class Handed(NamedTuple):
    """What the launches hand on: addresses in scratch, 0 of what there is not.

    groups, shared  of the experts' and of the shared experts' hidden rows
    fixed, sum      of a norm in front: its result in fixed point, and what it normalizes
    """

    scores: int
    ranks: int
    groups: int
    shared: int
    fixed: int
    sum: int


def _record(call: Call, token: Token) -> None:
    handed = Handed(*(call.scratch(size) if size else 0 for size in _sizes(token)))
    if token.kept:
        handed = handed._replace(sum=call["sum"].ptr)
    empty = (token.used, token.tokens, 1, 1)
    candidates = Candidates(
        scores=handed.scores,
        ranks=handed.ranks,
        experts=call["router"].ne[1],
        local=call["up"].ne[2],
        route=argument(token.routing, dense(0, empty, F32), dense(0, empty, I32), call),
    )
    _router(call, candidates.route, token, handed)
    _up_gate(call, token, handed, candidates)
    _down(call, token, handed, candidates)


def _router(call: Call, route: Route, token: Token, handed: Handed) -> None:
    k, experts = call["router"].ne[:2]
    router = Router(
        w=call["router"].tensor,
        x=(call.get("x") or ABSENT).tensor,
        scores=handed.scores,
        ranks=handed.ranks,
        gate=route.gate,
        scale=route.scale,
        **{name: (call.get(name) or ABSENT).ptr for name in ("bias", "own")},
    )
    shared = [_ahead(call.get(f"shared_{name}"), experts) for name in ("up", "gate", "down")]
    threads = 32 * min(MOST_WARPS, max(4, blocks_for(k, 128)))
    if token.norm is None:
        name = f"router<{1 if token.tokens == 1 else FEW}>"
        call.launch(FILE, name, grid=experts, block=threads, args=[router, *shared])
        return
    packs, row = 1 if k <= 4 * threads else MOST_PACKS, normed_row(call, token.norm.eps)
    more: list[Argument] = [np.uint64(handed.fixed), np.uint64(handed.sum), *shared]
    each = 1 if packs == 1 else 2  # experts of a block that adds up parts

    def added(summed: Argument) -> Form:
        grid = 1 + blocks_for(experts, each), 1, 1
        return Form(f"norm_router<{packs}, {each}, SummedRow>", [router, summed, *more], grid)

    call.launch(
        FILE,
        f"norm_router<{packs}, 1, NormedRow>",
        grid=experts + 1,
        block=threads,
        args=[router, row, *more],
        meeting=adds(row, added),
        patient=token.norm.nodes[2]["b"].root.op is constant_op,
    )


def _up_gate(call: Call, token: Token, handed: Handed, candidates: Candidates) -> None:
    up, gate, rows = call["up"], call["gate"], call["up"].ne[1] // GROUP
    args: list[Argument] = [
        weights_of(up, gate),
        _gated(call, token.hidden, handed.groups, handed),
        candidates,
    ]
    name, places = f"up_gate<{cpp_format(up)}>", _places(up)
    busy = rows * candidates.local / candidates.experts  # blocks of others end at once
    memory = 0 if handed.ranks else shared_bytes(token.routing)
    if token.shared is not None:
        own = call["shared_up"]
        first = blocks_for(own.ne[1] // GROUP, token.used)
        name = f"up_gate_shared<{cpp_format(up)}, {cpp_format(own)}>"
        args += [
            weights_of(own, call["shared_gate"]),
            _gated(call, token.shared, handed.shared, handed),
            np.int32(first),
        ]
        places, rows, busy = min(places, _places(own)), rows + first, busy + first
        if token.norm is not None and token.norm.joint:
            name = name.replace("shared", "late")
        elif token.norm is not None:
            name = name.replace("shared", "normed")
            args.append(normed_row(call, token.norm.eps))
            memory = max(memory, fixed_bytes((up.ne[0], 1, 1, 1), 2))
    call.launch(
        FILE,
        name,
        grid=(token.used, token.tokens, rows),
        block=256 if busy * token.pairs <= places else 128,
        args=args,
        shared=memory,
        early=True,
    )


def _gated(call: Call, node: Node, out: int, handed: Handed) -> Gated:
    limit = node.attrs["limit"]
    return Gated(
        x=handed.fixed or call["fixed"].ptr,
        out=out,
        act=int(ACT[node.attrs["act"]]),
        limit=math.inf if limit is None else limit,
    )


def _down(call: Call, token: Token, handed: Handed, candidates: Candidates) -> None:
    down, tiles = call["down"], blocks_for(call["down"].ne[1], TILE)
    more = [call[name] for name in ("plus", "plus2") if call.get(name)]
    if token.added:
        more.append(dense(handed.sum, (down.ne[1], 1, 1, 1), F32))
    plus, plus2 = (x.tensor for x in (*more, ABSENT, ABSENT)[:2])
    sums = Sums(out=call.out.tensor, plus=plus, plus2=plus2)
    first: list[Argument] = [weights_of(down), np.uint64(handed.groups), candidates]
    name, rest = f"down<{cpp_format(down)}", list[Argument]()
    if token.shared is not None:
        own = call["shared_down"]
        name = f"down_shared<{cpp_format(down)}, {cpp_format(own)}"
        rest = [weights_of(own), np.uint64(handed.shared)]

    def sent(total: Argument) -> Form:
        return Form(f"{name}, SentSums>", [*first, SentSums(sums=sums, sum=total), *rest])

    call.launch(
        FILE,
        f"{name}, Sums>",
        grid=(token.tokens, tiles),
        block=32 * _warps(tiles),
        args=[*first, sums, *rest],
        meeting=sends(call.out.ptr, sent) if token.tokens == 1 else None,
        shared=0 if handed.ranks else shared_bytes(token.routing),
        early=True,
    )


def _ahead(weight: Operand | None, blocks: int) -> Ahead:
    """The argument for a weight that a launch reads next, of which so many blocks fetch a part."""
    if weight is None or weight.layout != "tiles8":
        return NOTHING_AHEAD
    sizes, form = tiles_of(weight.dtype, weight.ne), FORMATS[weight.dtype.name]
    at = sizes.at(weight.ptr)
    each = tuple(TILE * sizes.groups * n for n in (form.codes, form.high, form.scale))
    each += (TILE * sizes.blocks * form.super_,)
    if sum(each) * sizes.tiles > MOST_AHEAD:
        return NOTHING_AHEAD
    planes = at.codes, at.high, at.scales, at.supers
    part = blocks_for(sizes.tiles, blocks)
    return Ahead(planes=planes, tile_bytes=each, tiles=sizes.tiles, part=part)


NOTHING_AHEAD = Ahead(planes=(0,) * 4, tile_bytes=(0,) * 4, tiles=0, part=0)


def _warps(blocks: int) -> int:
    """Warps of a block, a multiple of 4: enough that all blocks fill a GPU."""
    return next((n for n in (16, 8) if blocks * n <= WARPS), 4)


def _places(up: Operand) -> int:
    """Blocks of 256 threads of up and gate that fill a GPU (gate_blocks in the kernel)."""
    form = FORMATS[up.dtype.name]
    heavy = form.codes >= 16 or (form.high > 0 and up.dtype.name not in LEVELS)
    return PROCESSORS * (3 if heavy else 4)

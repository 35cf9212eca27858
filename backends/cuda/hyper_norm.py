"""What comes between two sublayers with hyper-connections, fused into one step for few tokens.

The streams after a sublayer, the maps of the next one, its input and that one's norm are two
launches: the first computes the streams and, for the maps, sums of products over parts of them; the
second needs all of these sums. One launch would need a barrier of all blocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.argument import Struct, Tensor
from pyggml.backends.cuda.fusion import Fused, Run, behind_reshapes
from pyggml.backends.cuda.geometry import blocks_for, pack_width, threads_for
from pyggml.backends.cuda.launch import ABSENT, Call, early_reads
from pyggml.backends.cuda.linear.common import aligned, dense
from pyggml.backends.cuda.moe import sums
from pyggml.backends.cuda.moe_token import experts_of_token
from pyggml.backends.cuda.norm import can_fix, weighted
from pyggml.dtypes import F32
from pyggml.node import Node

FILE = "hyper_norm.cu"
#: The most tokens: each reads all weights of the mixes again.
FEW = 8
#: Streams whose mixes are fewer than the sums of a block, and elements of a row that a block holds.
STREAMS, LONGEST = (2, 3, 4), 16384
#: Packs of elements and parts of the mixes of a block that computes sums; the bytes of its sums.
PACKS, PARTS, SUMS = 8, 4, 32 * 4
_PACKED = ("out", "old", "x", "experts", "plus", "plus2")
_STREAMS = ("out", "old", "x", "experts", "shares", "plus", "plus2", "post", "comb")


class Streams(Struct):
    """The struct `Streams` of hyper_norm.cu."""

    _fields_ = (*((name, Tensor) for name in _STREAMS), ("early", ctypes.c_int32))


class HyperNorm(Struct):
    """The struct `HyperNorm` of hyper_norm.cu."""

    _fields_ = (
        *((name, Tensor) for name in ("out", "maps", "streams", "scale", "base", "w")),
        ("sums", ctypes.c_uint64),
        ("fixed", ctypes.c_uint64),
        ("flat_eps", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("norm_eps", ctypes.c_float),
        ("n_iter", ctypes.c_int32),
        ("n_sums", ctypes.c_int32),
    )


class Mixed(NamedTuple):
    """rms_norm(x) * weight of x = dsv4_hc_pre(streams, pre), with pre from maps of the streams.

    nodes  flat norm, mixes, maps, x, norm, product
    """

    nodes: tuple[Node, ...]
    streams: Node

    @property
    def reads(self) -> dict[str, Node]:
        _, mixes, maps, _, _, node = self.nodes
        return {
            "old": self.streams, "fn": mixes["a"], "scale": maps["scale"], "base": maps["base"],
            "weight": node["b"],
        }  # fmt: skip


def norm_of_streams(node: Node, run: Run) -> Fused | None:
    """The input of a sublayer, from streams."""
    match = _mixed(node, run)
    return None if match is None else _fused(match, (), match.reads, {}, run)


def norm_after_post(node: Node, run: Run) -> Fused | None:
    """The same from the result of the sublayer before; also of the sum over experts that this is
    where experts are not one step with their routing, which is 3 us faster."""
    match = _mixed(node, run)
    if match is None:
        return None
    post = behind_reshapes(match.streams)
    if post.op is not ops.dsv4_hc_post or post not in run.number or post.get("comb") is None:
        return None
    x, own = post["x"], (post,)
    reads = {**match.reads, "old": post["residual"], "post": post["post"], "comb": post["comb"]}
    total = sums(x, run, 2) if x in run.number and run.only(x, post) else None
    if total is None or experts_of_token(x, run) is not None:
        return _fused(match, own, {**reads, "x": x}, {"streams": post}, run)
    nodes, more = total
    reads |= {
        "experts": nodes[0]["a"],
        "shares": nodes[0]["b"],
        **dict(zip(("plus", "plus2"), more)),
    }
    return _fused(match, (*nodes, post), reads, {"streams": post}, run)


def _mixed(node: Node, run: Run) -> Mixed | None:
    match = weighted(node, run)
    if match is None or match[0].op is not ops.mul_multi_add or not run.only(match[0], match[1]):
        return None
    x, normed, _ = match
    streams, maps = x["a"], x["b"].base
    n, hc, n_tokens, n3 = streams.ne
    if maps.op is not ops.dsv4_hc_maps or maps not in run.number or not _is_pre(x["b"], maps):
        return None
    mixes = maps["mixes"]
    flat = mixes["b"] if mixes.op is ops.mul_mat else mixes
    if flat.op is not ops.rms_norm or not run.only(flat, mixes) or not run.only(mixes, maps):
        return None
    fn, source = mixes["a"], flat["a"]
    fits = (
        behind_reshapes(source) is behind_reshapes(streams)
        and flat.ne == (n * hc, n_tokens, 1, 1)
        and streams.contiguous
        and maps.ne == (hc, 2 + hc, n_tokens, 1)
        and fn.dtype is F32
        and fn.ne == (n * hc, (2 + hc) * hc, 1, 1)
        and n3 == 1
        and n_tokens <= FEW
        and hc in STREAMS
        and n % 4 == 0
        and n <= LONGEST
        and node["b"].contiguous
    )
    return Mixed((flat, mixes, maps, x, normed, node), streams) if fits else None


def _is_pre(pre: Node, maps: Node) -> bool:
    """Whether pre is the first row of the maps of each token, as [1, hc, T]."""
    hc, rows, n_tokens, _ = maps.ne
    view, offset = pre, 0
    while view is not maps:
        view, offset = view.src[0] or maps, offset + view.offset
    steps = [step for n, step in zip(pre.ne, pre.nb) if n > 1]
    expected = [step for n, step in ((hc, 4), (n_tokens, 4 * hc * rows)) if n > 1]
    return offset == 0 and pre.ne == (1, hc, n_tokens, 1) and steps == expected


def _fused(
    match: Mixed,
    before: tuple[Node, ...],
    reads: dict[str, Node],
    results: dict[str, Node],
    run: Run,
) -> Fused:
    nodes = (*before, *match.nodes)
    n, _, n_tokens, _ = match.streams.ne
    results = {**results, "maps": match.nodes[2]}
    # After the last layer, only one of several devices needs them.
    unread = {name: node for name, node in results.items() if run.only(node, *nodes)}
    return Fused(
        nodes,
        reads,
        partial(_record, match=match, unread=unread),
        results={name: node for name, node in results.items() if name not in unread},
        scratch=aligned(n_tokens * blocks_for(n, PACKS) * SUMS)
        + sum(aligned(node.spec.nbytes) for node in unread.values()),
        fixed=can_fix(nodes[-1]),
    )


def _record(call: Call, match: Mixed, unread: Mapping[str, Node]) -> None:
    flat, _, maps, _, normed, _ = match.nodes
    n, hc, n_tokens, _ = match.streams.ne
    spare = {
        name: dense(call.scratch(aligned(node.spec.nbytes)), node.ne, F32)
        for name, node in unread.items()
    }
    streams = spare.get("streams") or call.get("streams")
    operands = {name: call.get(name) or ABSENT for name in _STREAMS[1:]}
    operands["out"] = streams or ABSENT
    origin = "EXPERTS" if call.get("experts") else "RESULT" if streams else "STREAMS"
    rows = (operands[name] for name in _PACKED if operands[name].ptr)
    width = min(pack_width(*rows), pack_width(call["fn"]))
    blocks, fixed = blocks_for(n, PACKS * width), call.get("fixed")
    address = call.scratch(n_tokens * blocks * SUMS)
    early = early_reads(call.awaited & {"fn", "old", "post", "comb"}, {"fn"})  # MixEarly
    call.launch(
        FILE,
        f"hyper_mix<{hc}, {origin}, {width}>",
        grid=(blocks, n_tokens),
        block=PACKS * PARTS * hc,
        args=[
            np.uint64(address),
            call["fn"].tensor,
            Streams(**{name: operand.tensor for name, operand in operands.items()}, early=early),
        ],
        early=early > 0,
    )
    threads = threads_for(n // 4)
    held = next(k for k in (1, 2, 4) if 4 * threads * k >= n)
    tensors = {name: (spare.get(name) or call[name]).tensor for name in ("maps", "scale", "base")}
    call.launch(
        FILE,
        f"hyper_norm<{hc}, {held}, {str(fixed is not None).lower()}>",
        grid=(n_tokens, 2),
        block=threads,
        args=[
            HyperNorm(
                out=call.out.tensor,
                streams=(streams or call["old"]).tensor,
                w=call["weight"].tensor,
                sums=address,
                fixed=0 if fixed is None else fixed.ptr,
                flat_eps=flat.attrs["eps"],
                eps=maps.attrs["eps"],
                norm_eps=normed.attrs["eps"],
                n_iter=maps.attrs["n_iter"],
                n_sums=blocks,
                **tensors,
            )
        ],
        early=True,
    )

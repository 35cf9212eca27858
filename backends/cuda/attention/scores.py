"""Attention without flash attention: scores, softmax and values in one step, in pieces.

    mul_mat(v transposed, soft_max_ext(mul_mat(k, q), mask, sinks))

A piece is some streams, some heads of one, or some rows of a head. Its scores are f32, in scratch
of at most PIECE bytes. The softmax overwrites them in the type of v, with rows as far apart, so the
product with v reads them where they are. A score costs 4 bytes written, 4 read, 2 written, 2 read,
as it would if all scores were in memory at once. Smaller pieces, which stay in the L2 cache, lost:
their launches are too short. So did splits of the keys for the product with v: cuBLAS splits.

A causal mask is computed from positions in the softmax, which does not read what the mask hides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

from pyggml import ops
from pyggml.backends.cuda.fusion import Fused, Run
from pyggml.backends.cuda.geometry import blocks_for, part
from pyggml.backends.cuda.launch import WORKSPACE, Call, Operand
from pyggml.backends.cuda.linear import plain
from pyggml.backends.cuda.linear.common import aligned, dense
from pyggml.backends.cuda.linear.routes import Product
from pyggml.backends.cuda.softmax import launch_softmax
from pyggml.dtypes import BF16, F16, F32, I32
from pyggml.node import Node

#: Most bytes of the scores of a piece, unless a single row has more.
PIECE = 128 << 20


@dataclass(frozen=True, slots=True)
class Pieces:
    """How the scores kq [n_kv, n_q, n_head, n3] are cut: the sizes of a piece along axes 1 to 3."""

    rows: int
    heads: int
    streams: int

    @staticmethod
    def of(kq: Node, v: Node) -> Pieces:
        n, n_q, heads, streams = kq.ne
        most = max(1, PIECE // (4 * n))  # rows of a piece
        groups = [(heads // x.ne[2], streams // x.ne[3]) for x in (kq["a"], v)]
        own_heads = _whole(heads, most // n_q, [g[0] for g in groups])
        own_streams = _whole(streams, most // n_q // heads, [g[1] for g in groups])
        if own_heads * own_streams > 1:
            return Pieces(n_q, own_heads, own_streams)
        return Pieces(blocks_for(n_q, blocks_for(n_q, most)), 1, 1)

    def scratch(self, kq: Node) -> tuple[int, int]:
        """Bytes for q and for the scores."""
        scores = 4 * kq.ne[0] * self.rows * self.heads * self.streams
        return kq["b"].spec.elements * kq["a"].dtype.nbytes, scores


def _whole(total: int, most: int, groups: list[int]) -> int:
    """The most of `total` heads (or streams), at most `most`, that are whole groups with one matrix
    of k and v, or parts of one."""
    sizes = (n for n in range(min(total, most), 1, -1) if total % n == 0)
    return next((n for n in sizes if all(n % g == 0 or g % n == 0 for g in groups)), 1)


def softmax_attention(node: Node, run: Run) -> Fused | None:
    """The product of a softmax of scores and v, in f16 or bf16, if no other node reads these."""
    parts = _parts(node, run)
    if parts is None:
        return None
    kq, soft = parts
    mask, sinks = soft.get("mask"), soft.get("sinks")
    reads = {"k": kq["a"], "q": kq["b"], "v": node["a"]}
    inside, window = tuple[Node, ...](), None
    if sinks is not None:
        reads["sinks"] = sinks
    if mask is not None and _is_causal(mask, run) and not run.changed(mask, run.number[node]):
        reads["mask"], window = mask["pos"], mask.attrs["window"]
        inside = (mask,) if run.only(mask, *_readers(mask, run)) else ()
    elif mask is not None:
        reads["mask"] = mask
    pieces = Pieces.of(kq, node["a"])
    return Fused(
        (*inside, kq, soft, node),
        reads,
        partial(_record, kq=kq, soft=soft, pieces=pieces, window=window),
        scratch=aligned(*pieces.scratch(kq)),
        workspace=WORKSPACE,
        recompute=inside,
    )


def _parts(node: Node, run: Run) -> tuple[Node, Node] | None:
    """The scores and the softmax of an attention that the step can compute."""
    soft = node["b"] if node.op is ops.mul_mat else node
    kq = soft["a"] if soft.op is ops.soft_max_ext else soft
    if kq.op is not ops.mul_mat or not run.only(kq, soft) or not run.only(soft, node):
        return None
    mask, (_, _, heads, streams) = soft.get("mask"), kq.ne
    fits = (
        _is_plain(kq)
        and _is_plain(node)
        and kq["b"].dtype is F32
        and kq.dtype is F32
        and node.dtype in (F32, node["a"].dtype)
        and soft.attrs["max_bias"] == 0  # slopes depend on head0, which shifts in loops
        and (mask is None or (mask.ne[2] in (1, heads) and mask.ne[3] in (1, streams)))
    )
    return (kq, soft) if fits else None


def _is_plain(node: Node) -> bool:
    """Whether cuBLAS computes the product from its f16 or bf16 weights as they are."""
    kind, a = Product.of(node), node["a"]
    readable = plain.leading(Operand(0, a.ne, a.nb, a.dtype), a.ne[1]) is not None
    return kind.route == "cublas" and not kind.exact and a.dtype in (F16, BF16) and readable


def _is_causal(mask: Node, run: Run) -> bool:
    causal = mask.op is ops.causal_mask and mask in run.number
    return causal and mask.get("kv_end") is None and mask.attrs["stride"] == 1


def _readers(mask: Node, run: Run) -> Iterator[Node]:
    """The softmaxes that read the mask and are part of such a step."""
    for soft in run.readers[mask]:
        readers = run.readers.get(soft, ()) if soft.get("mask") is mask else ()
        if soft.op is ops.soft_max_ext and any(_parts(reader, run) for reader in readers):
            yield soft


def _record(call: Call, kq: Node, soft: Node, pieces: Pieces, window: int | None) -> None:
    (n, n_q, heads, streams), k, v, y = kq.ne, call["k"], call["v"], call.out
    q = plain.contiguous(call, call["q"], k.dtype)
    memory = call.scratch(pieces.scratch(kq)[1])
    mask, sinks = call.get("mask"), call.get("sinks")
    rows_of = 0 if mask is not None and mask.dtype is I32 else 1  # positions are a row
    each = pieces.heads if plain.is_even(y, heads // v.ne[2]) else 1
    for s, h, i in product(
        range(0, streams, pieces.streams), range(0, heads, each), range(0, n_q, pieces.rows)
    ):
        rows = min(pieces.rows, n_q - i)

        def own(x: Operand, h: int = h, s: int = s) -> Operand:
            """The heads and streams of the piece, or the matrix that these share."""
            return _share(_share(x, 2, h, each, heads), 3, s, pieces.streams, streams)

        scores = dense(memory, (n, rows, each, pieces.streams), F32)
        p = replace(scores, nb=(v.dtype.nbytes, *scores.nb[1:]), dtype=v.dtype)
        plain.cublas(call, own(k), part(own(q), 1, i, rows), scores, exact=False)
        bias = None if mask is None else part(own(mask), rows_of, i, rows)
        sink = None if sinks is None else part(sinks, 0, h, each)
        launch_softmax(call, scores, p, bias, sink, soft.attrs, window)
        plain.cublas(call, own(v), p, part(own(y), 1, i, rows), exact=False)


def _share(x: Operand, axis: int, start: int, n: int, total: int) -> Operand:
    """What n of `total` along an axis read from `start` on; several may share an element of x."""
    each = total // x.ne[axis]
    return part(x, axis, start // each, max(1, n // each))

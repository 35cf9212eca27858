"""The rows that one token attends to: lightning_indexer and top_k as one step, for attention over
lists, which reads its rows in any order (kernels/indexer_choice.cu)."""

from __future__ import annotations

import ctypes
from functools import partial

from pyggml import ops
from pyggml.backends.cuda import indexer
from pyggml.backends.cuda import top_k as sorted_choice
from pyggml.backends.cuda.argument import Struct
from pyggml.backends.cuda.fusion import Fused, Run
from pyggml.backends.cuda.geometry import blocks_for
from pyggml.backends.cuda.indexer import Indexer
from pyggml.backends.cuda.launch import Call, Operand
from pyggml.backends.cuda.linear.common import aligned
from pyggml.dtypes import F32
from pyggml.node import Node

FILE = "indexer_choice.cu"
#: Threads, rows of a thread, keys that are compared, blocks: as in the kernel.
THREADS, ROUNDS, KEYS, BLOCKS = 512, 4, 512, 132
#: Bytes of a block's counts in shared memory, and at most of its static shared memory.
COUNTS, STATIC = 2 << 14, 8192
#: Shorter rows are sorted faster; longer ones do not fit into the registers of BLOCKS.
SHORTEST, LONGEST = 12288, BLOCKS * THREADS * ROUNDS


class ScoreChoice(Struct):
    """The struct `ScoreChoice` of indexer_choice.cu."""

    _fields_ = (
        ("a", Indexer),
        ("ids", ctypes.c_uint64),
        ("parts", ctypes.c_uint64),
        ("counts", ctypes.c_uint64),
        ("keys", ctypes.c_uint64),
        ("k", ctypes.c_int32),
        ("scoring", ctypes.c_int32),
        ("bins", ctypes.c_int32),
    )


def chosen_rows(node: Node, run: Run) -> Fused | None:
    """top_k of one token's scores, which nothing else reads, where only lists of attention read the
    ids."""
    scores = node["a"]
    if scores.op is not ops.lightning_indexer or not run.only(scores, node):
        return None
    n, readers = scores.ne[0], run.readers.get(node, ())
    fits = (
        scores.ne[1:] == (1, 1, 1)
        and SHORTEST <= n <= LONGEST
        and node.ne[0] <= sorted_choice.MOST_K
        and not indexer.why_plain(scores)
        and node not in run.keep
        and readers
        and all(_as_list(reader, node) for reader in readers)
    )
    if not fits:
        return None
    reads = {name: s for name in scores.op.operands if (s := scores.get(name)) is not None}
    return Fused(
        (scores, node),
        reads,
        partial(_record, scores=scores),
        scratch=sum(map(aligned, _sizes(n))),
    )


def _as_list(reader: Node, ids: Node) -> bool:
    """Whether a node is attention that reads ids only as its list."""
    if reader.op is not ops.flash_attn_ext:
        return False
    listed = reader.get("ids")
    others = (s for name in reader.op.operands if name != "ids" and (s := reader.get(name)))
    return listed is not None and listed.base is ids and all(s.base is not ids for s in others)


def _sizes(n: int) -> tuple[int, ...]:
    """Bytes of scores, parts, their sizes, and keys."""
    return 4 * n, 4 * n, 4 * BLOCKS, 8 * KEYS


def _record(call: Call, scores: Node) -> None:
    q, k = call["q"], call["k"]
    n = k.ne[1]
    row, parts, counts, keys = (call.scratch(size) for size in _sizes(n))
    names = {name: x for name in scores.op.operands if (x := call.get(name)) is not None}
    part = Call(scores, Operand(row, scores.ne, scores.nb, F32), names, scores.attrs, call.device)
    part.awaited = call.awaited
    heads, tiles = indexer.heads_of(q.ne[1]), blocks_for(n, indexer.TILE)
    blocks, bins = min(tiles, call.device.sms), indexer.shared_of(q, k)
    fast = (
        q.aligned(16)
        and k.aligned(4 if k.dtype.block > 1 else 16)
        and bins + COUNTS + STATIC <= call.device.shared
        and blocks_for(tiles, blocks) * indexer.TILE < 1 << 16  # counts of a block have 16 bits
    )
    if not fast:
        indexer.lightning_indexer(part)
        call.records += part.records
        order = Call(call.node, call.out, {"a": part.out}, call.node.attrs, call.device)
        sorted_choice.top_k(order)
        call.records += order.records
        return
    argument = indexer.argument_of(part)
    for scoring in (1, 0):
        call.launch(
            FILE,
            f"choice<{indexer.type_of(k)}, {heads}>",
            grid=blocks if scoring else min(BLOCKS, blocks_for(n, THREADS)),
            block=THREADS,
            args=[
                ScoreChoice(
                    a=argument, ids=call.out.ptr, parts=parts, counts=counts, keys=keys,
                    k=call.node.ne[0], scoring=scoring, bins=bins,
                )
            ],
            shared=bins + COUNTS if scoring else 0,
            early=scoring > 0 and argument.early > 0,
        )  # fmt: skip

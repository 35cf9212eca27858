"""The indexer's scores: blocks of 64 rows of the cache, four heads at a time.

An item of work is a token and 512 rows; the tokens of the same rows follow one another, so the rows
come from the cache. Products of four heads and 64 rows are in registers and on the stack, and are
weighted and summed at once: no products of all heads are ever in memory. Blocks that the token does
not see are skipped, and hidden rows are -inf whatever they hold.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from pyggml import ops
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.rows import READABLE, adjacent
from pyggml.backends.cpu.table import Call, kernel
from pyggml.node import Node

HEADS, BLOCK, ROWS = 4, 64, 512


@cache
def _scores(k_type: str) -> Native:
    """y[j, t] = sum_n w[n, t] max(0, q[:, n, t] . k[:, j]) + mask[j, t].

    q, k, w      addresses; strides of q's heads, tokens and ne3; of k's rows and ne3; all of w's
    mask         f16, or 0; strides of tokens and m3; size of m3
    live         i32, or 0: rows from live on are hidden
    """
    return Native(f"lightning_indexer_{k_type}", "i" * 24, lambda: _make(k_type))


def _make(k_type: str) -> Callable[..., None]:
    from pyggml.backends.cpu import attention_blocks as blocks
    from pyggml.backends.cpu.indexer_blocks import add_heads, hide, put_scores
    from pyggml.backends.cpu.native.memory import (
        f32_at,
        fetch_add,
        i32_at,
        put_f32,
        put_i64,
        stack,
    )
    from pyggml.backends.cpu.row_loops import clear

    scores, seen = blocks.scores(k_type), blocks.seen
    products_of, sums_of, lists_of = stack(HEADS * BLOCK * 4), stack(BLOCK * 4), stack(64)

    def run(
        out: int, o1: int, o3: int, q: int, q1: int, q2: int, q3: int, k: int, k1: int, k3: int,
        w: int, w0: int, w1: int, w3: int, mask: int, m1: int, m3: int, n_m3: int, live: int,
        d: int, heads: int, n_tokens: int, n3: int, n_kv: int,
        own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        products, sums, queries = products_of(), sums_of(), lists_of()
        factors, masks = queries + 8 * HEADS, queries + 8 * HEADS + 4 * HEADS
        end = n_kv
        if live != 0:
            end = max(0, min(n_kv, i32_at(live)))
        chunks = (n_kv + ROWS - 1) // ROWS
        items = n3 * chunks * n_tokens
        while True:
            item = fetch_add(own, 1)
            if item >= items:
                break
            t, rest = item % n_tokens, item // n_tokens
            chunk, i3 = rest % chunks, rest // chunks
            y, own_mask = out + t * o1 + i3 * o3, 0
            if mask != 0:
                own_mask = mask + t * m1 + i3 % n_m3 * m3
            put_i64(masks, own_mask)
            for first in range(chunk * ROWS, min(n_kv, (chunk + 1) * ROWS), BLOCK):
                whole = min(BLOCK, n_kv - first)
                count = max(0, min(whole, end - first))
                if count > 0 and mask != 0 and not seen(masks, 1, first, count):
                    count = 0
                hide(y + 4 * (first + count), whole - count)
                if count == 0:
                    continue
                clear(sums, BLOCK)
                at_k = k + first * k1 + i3 * k3
                for head in range(0, heads, HEADS):
                    n_heads = min(HEADS, heads - head)
                    for r in range(HEADS):
                        h = head + min(r, n_heads - 1)
                        put_i64(queries + 8 * r, q + h * q1 + t * q2 + i3 * q3)
                        put_f32(factors + 4 * r, f32_at(w + h * w0 + t * w1 + i3 * w3))
                    for key in range(0, count, 4):
                        scores(queries, at_k + key * k1, k1, min(4, count - key), d,
                               products + 4 * key)  # fmt: skip
                    add_heads(sums, products, factors, n_heads)
                at_mask = own_mask
                if mask != 0:
                    at_mask += 2 * first
                put_scores(y + 4 * first, sums, at_mask, count)

    return run


def _refuses(node: Node) -> str | None:
    q, k = node["q"], node["k"]
    if k.dtype.name not in READABLE:
        return f"lightning_indexer does not read rows of {k.dtype} here"
    if not adjacent(node, q, k, node.get("mask")):
        return "lightning_indexer needs rows whose elements are adjacent"
    return None


@kernel(ops.lightning_indexer, types=None, refuses=_refuses)
def lightning_indexer(call: Call) -> None:
    q, k, w, out = call["q"], call["k"], call["weights"], call.out
    mask, live = call.get("mask"), call.get("kv_len")
    d, heads, n_tokens, n3 = q.ne
    masked = (mask.ptr, mask.nb[1], mask.nb[3], mask.ne[3]) if mask else (0, 0, 0, 1)
    call.add(
        _scores(k.type), out.ptr, out.nb[1], out.nb[3], q.ptr, *q.nb[1:], k.ptr, k.nb[1], k.nb[3],
        w.ptr, *w.nb[:2], w.nb[3], *masked, live.ptr if live else 0, d, heads, n_tokens, n3,
        k.ne[1], work=out.elements * heads * d,
    )  # fmt: skip

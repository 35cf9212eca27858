"""Attention to a list of keys in simpler ops: each query is a batch of its own.

The listed rows are gathered, [d, n_ids, n_head_kv, n_q n3], and flash attention runs over them.
That moves the bytes of the rows several times, and needs memory for all of them, which the budget
counts as keys and values that are computed from a state.
"""

from __future__ import annotations

from typing import Any

from pyggml.node import Node
from pyggml.ops.attention import flash_attn_ext
from pyggml.ops.copy import cast, cont, flat, get_rows, repeat
from pyggml.ops.elementwise import add, clamp, log, mul, scale
from pyggml.ops.views import permute, reshape, view, view_op

_HEADS_FIRST = (0, 2, 1, 3)


@flash_attn_ext.means(where=lambda node: node.get("ids") is not None)
def _(
    q: Node,
    k: Node,
    v: Node,
    mask: Node | None = None,
    sinks: Node | None = None,
    kv_len: Node | None = None,
    ids: Node | None = None,
    *,
    kv0: int = 0,
    **attrs: Any,
) -> Node:
    assert ids is not None
    d_k, n_q, heads, n3 = q.ne
    bias = _hidden(ids, kv_len, kv0, k.ne[1])
    if mask is not None:
        bias = add(_listed_mask(mask, ids), bias)
    bias = flat(permute(bias, axes=_HEADS_FIRST), ids.ne[0], 1, bias.ne[2], n_q * n3)
    rows = _listed(k, ids)
    start = _columns(k, v)
    if start is None:
        values = _listed(v, ids)
    else:
        values = view(rows, ne=(v.ne[0], *rows.ne[1:]), start=(start, 0, 0, 0))
    queries = flat(permute(q, axes=_HEADS_FIRST), d_k, 1, heads, n_q * n3)
    y = flash_attn_ext(queries, rows, values, cast(bias, dtype="f16"), sinks, **attrs)
    return reshape(y, ne=(y.ne[0], heads, n_q, n3)[: 4 if n3 > 1 else 3])


def _hidden(ids: Node, kv_len: Node | None, kv0: int, n_kv: int) -> Node:
    """-inf where an id is negative or past the keys, else 0.   f32, the size of ids

    In f32, so keys from 2^24 on may be taken for their neighbours.
    """
    number = cast(ids, dtype="f32")
    after = scale(number, s=-1.0, b=float(n_kv))
    present = mul(clamp(scale(number, s=1.0, b=1.0), min=0.0, max=1.0), _flag(after))
    if kv_len is not None:
        end = scale(cast(kv_len, dtype="f32"), s=1.0, b=float(-kv0))
        present = mul(present, _flag(add(scale(number, s=-1.0), end)))
    return log(present)


def _flag(a: Node) -> Node:
    """1 where the whole number a is above 0, else 0."""
    return clamp(a, min=0.0, max=1.0)


def _listed_mask(mask: Node, ids: Node) -> Node:
    """[n_ids, n_q, m2, n3]: the mask of each listed key; 0 for a negative id."""
    n_ids, n_q, _, n3 = ids.ne
    n_kv, heads = mask.ne[0], mask.ne[2]
    rows = view(mask, ne=(n_kv, n_q, *mask.ne[2:]))
    if mask.ne[3] != n3:
        rows = repeat(rows, ne=(n_kv, n_q, heads, n3))
    lists = repeat(ids, ne=(n_ids, n_q, heads, n3)) if heads > 1 else ids
    listed = get_rows(flat(rows, 1, n_kv, n_q, heads * n3), flat(lists, n_ids, n_q, heads * n3))
    return reshape(listed, ne=(n_ids, n_q, heads, n3))


def _listed(a: Node, ids: Node) -> Node:
    """[d, n_ids, n_head_kv, n_q n3]: the listed rows, in a's type or, of blocks, in f32."""
    n_ids, n_q, _, n3 = ids.ne
    d, _, heads, _ = a.ne
    lists = flat(ids, n_ids * n_q, 1, n3)
    if heads > 1:
        lists = repeat(lists, ne=(n_ids * n_q, heads, n3))
    rows = get_rows(a, lists)
    if a.dtype.block == 1 and a.dtype != rows.dtype:
        rows = cast(rows, dtype=a.dtype.name)
    if heads > 1:
        apart = permute(reshape(rows, ne=(d * n_ids, n_q, heads, n3)), axes=_HEADS_FIRST)
        rows = cont(apart)
    return reshape(rows, ne=(d, n_ids, heads, n_q * n3))


def _columns(k: Node, v: Node) -> int | None:
    """The column of k at which v begins, if v is a view of k's columns; else None."""
    if v is k:
        return 0
    whole = (1, 1, 1, 1)
    if v.op is not view_op or v.src[0] is not k or v.ne[1:] != k.ne[1:] or v.attrs["step"] != whole:
        return None
    start: int = v.attrs["start"][0]
    return start

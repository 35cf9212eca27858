"""Fused attention and the causal mask."""

from __future__ import annotations

from typing import Any

from pyggml.dtypes import F16, F32
from pyggml.errors import ShapeError
from pyggml.node import Node
from pyggml.operation import op
from pyggml.ops.reduce import alibi_heads, mask_cut, want_mask
from pyggml.ops.rules import (
    Precision,
    want_finite,
    want_index,
    want_ne,
    want_readable,
    want_rows,
    want_type,
)
from pyggml.spec import Spec
from pyggml.traits import Axis, Cost, Cut, Ids, Slice

__all__ = ["causal_mask", "flash_attn_ext"]


@op(ids=Ids("ids", of="k", axis=1))
def flash_attn_ext(
    q: Node,
    k: Node,
    v: Node,
    mask: Node | None = None,
    sinks: Node | None = None,
    kv_len: Node | None = None,
    ids: Node | None = None,
    *,
    scale: float,
    max_bias: float = 0.0,
    logit_softcap: float = 0.0,
    prec: Precision = "default",
    lse: bool = False,
    head0: int = 0,
    n_head: int | None = None,
    kv0: int = 0,
) -> Spec | tuple[Spec, dict[str, Any]]:
    """Attention without the score tensor:  y[:, h, i] = sum_j p_j v[:, j, h / r],  p = softmax(s).

    q       f32                      [d_k, n_q,  n_head,    n3]
    k       any float or block type  [d_k, n_kv, n_head_kv, n3]   r = n_head / n_head_kv
    v       any float or block type  [d_v, n_kv, n_head_kv, n3]   may be a view of k
    mask    f16                      [n_kv, >= n_q, m2, m3]       m2 | n_head, m3 | n3, by modulo
    sinks   f32                      [n_head]                     a logit in the sum, no value
    kv_len  i32                      [1]                          hides keys kv0 + j >= kv_len
    ids     i32                      [n_ids, n_q, 1, n3]          the keys of each query; < 0: none
    y       f32                      [d_v, n_head, n_q, n3]       note the order: heads first

    s_j = scale q.k_j, with logit_softcap c: c tanh(scale / c q.k_j), plus slope(h) mask_j.
    slope(h) as in soft_max_ext (head0, n_head).   Sums are f32.   A row without keys gives 0.
    A hidden key (mask_j = -inf, or past kv_len) has no effect on the row: NaN and infinity in its
    rows of k and v never reach the result, as in ggml.
    lse=True: y is [d_v + 1, ..]; the last element is ln sum_j exp s_j (with the sink), -inf for a
    row without keys. merge_lse merges results over blocks of keys (kv0: the block's first key).
    With ids, query i sees only keys j = ids[:, i], each with its mask_j; n_ids may exceed n_kv. An
    id must not be in a query's list twice: it would count twice. Only the listed rows are read.
    Errors: IdError on the host for an id >= n_kv. A GPU treats such an id as negative.
    Contract: ggml's ggml_flash_attn_ext, with the n3 and mask rules of its 2026 form.
    """
    want_type("q", q, ("f32",))
    d_k, n_q, heads, n3 = q.ne
    for what, node in (("k", k), ("v", v)):
        want_readable(what, node)
        want_rows(what, node)
        if node.ne[3] != n3:
            raise ShapeError(f"{what}.ne[3]={node.ne[3]} and q.ne[3]={n3} must be equal")
    want_rows("q", q)
    if k.ne[0] != d_k:
        raise ShapeError(f"q and k must have the same head size: q.ne[0]={d_k}, k.ne[0]={k.ne[0]}")
    if k.ne[1:3] != v.ne[1:3]:
        raise ShapeError(
            "k and v must have the same numbers of keys and heads: "
            f"k {list(k.ne[1:3])}, v {list(v.ne[1:3])}"
        )
    if heads % k.ne[2]:
        raise ShapeError(f"n_head={heads} must be a multiple of n_head_kv={k.ne[2]}")
    if mask is not None:
        want_type("mask", mask, ("f16",))
    want_mask(mask, k.ne[1], n_q, heads, n3)
    if sinks is not None:
        want_type("sinks", sinks, ("f32",))
        want_ne("sinks", sinks, (heads, 1, 1, 1), "one for each head")
    if kv_len is not None:
        want_index("kv_len", kv_len)
        want_ne("kv_len", kv_len, (1, 1, 1, 1), "one number")
    if ids is not None:
        want_index("ids", ids)
        want_ne("ids", ids, (ids.ne[0], n_q, 1, n3), "a list of keys for each query")
    want_finite(scale=scale, max_bias=max_bias, logit_softcap=logit_softcap)
    if max_bias > 0 and mask is None:
        raise ShapeError(f"max_bias={max_bias} needs a mask")
    if logit_softcap < 0:
        raise ShapeError(f"logit_softcap={logit_softcap} must not be negative")
    spec = Spec.of(F32, (v.ne[0] + lse, heads, n_q, n3), 4 if n3 > 1 else 3)
    return spec, {"n_head": alibi_heads(heads, head0, n_head, max_bias)}


@flash_attn_ext.cost
def _(node: Node) -> Cost:
    """With ids, the bytes of the listed rows; each row of k and v at most once. A v that is a part
    of k's memory, as in a latent cache, is read with it."""
    q, k, v, ids = node["q"], node["k"], node["v"], node.get("ids")
    n_kv = k.ne[1] if ids is None else ids.ne[0]
    pairs = float(q.ne[1] * n_kv * q.ne[2] * q.ne[3])
    shared = v.base is k.base and k.ne[0] == k.base.ne[0]
    rows = (k,) if shared else (k, v)
    read = sum(s.spec.nbytes for s in (*node.src[3:], q, *rows) if s is not None)
    if ids is not None:
        listed = min(n_kv * q.ne[1], k.ne[1])
        read -= sum(s.spec.nbytes - s.spec.nbytes // k.ne[1] * listed for s in rows)
    return Cost(2.0 * pairs * (k.ne[0] + v.ne[0]), float(read + node.spec.nbytes))


@flash_attn_ext.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    mask, ids, heads, heads_kv = node.get("mask"), node.get("ids"), node["q"].ne[2], node["k"].ne[2]
    if axis == "kv":
        if not node.attrs["lse"]:
            return None
        if ids is not None:  # blocks of the lists
            return Slice((None, None, None, None, None, None, Cut(0)), merge="lse")
        masked = Cut(0) if mask is not None else None
        return Slice(
            (None, Cut(1), Cut(1), masked, None, None, None), shift={"kv0": 1}, merge="lse"
        )
    if axis == 1:
        ratio = heads // heads_kv
        if heads_kv > 1 and n % ratio and ratio % n:
            return None
        part = None if heads_kv == 1 else Cut(2, div=ratio)
        sink = Cut(0) if node.get("sinks") is not None else None
        cuts = (Cut(2), part, part, mask_cut(mask, 2, heads), sink, None, None)
        return Slice(cuts, shift={"head0": 1})
    if axis not in (2, 3):
        return None
    of_ids = None if ids is None else Cut(1 if axis == 2 else 3)
    if axis == 2:
        return Slice((Cut(1), None, None, mask_cut(mask, 1, n), None, None, of_ids))
    masked = mask_cut(mask, 3, node.ne[3])
    return Slice((Cut(3), Cut(3), Cut(3), masked, None, None, of_ids))


@op
def causal_mask(
    pos: Node, kv_end: Node | None = None, *, n_kv: int, window: int | None = None, stride: int = 1
) -> Spec:
    """The mask of causal attention: y[j, i] = 0 where the token at pos[i] sees row j, else -inf.

    pos     i32  [n_tokens]
    kv_end  i32  [n_kv]              1 + the position of cache row j; 0 or less: the row is empty.
                                     Without it, row j holds position j
    y       f16  [n_kv, n_tokens]    0 where p_j <= pos[i] and, with a window, pos[i] - p_j < window
    stride  r: row j is a summary of positions r j to r j + r - 1, and is seen from the last of them
            on, so 0 where j < floor((pos[i] + 1) / r). 1 with kv_end or a window
    """
    want_index("pos", pos)
    want_ne("pos", pos, (pos.ne[0], 1, 1, 1), "a vector of positions")
    if n_kv < 1 or (window is not None and window < 1):
        raise ShapeError(f"n_kv={n_kv} and window={window} must be at least 1")
    if stride < 1 or stride * (n_kv + 1) > 1 << 31:
        raise ShapeError(f"stride={stride} must be at least 1, and positions fit 32 bits")
    if stride > 1 and (kv_end is not None or window is not None):
        raise ShapeError(f"stride={stride} must be 1 with kv_end or a window")
    if kv_end is not None:
        want_index("kv_end", kv_end)
        want_ne("kv_end", kv_end, (n_kv, 1, 1, 1), "one for each of the n_kv rows")
    return Spec.of(F16, (n_kv, pos.ne[0]), 2)


def first_past(mask: Node) -> int:
    """The first position that would see more rows than a causal mask without kv_end has."""
    return int(mask.attrs["stride"] * (mask.attrs["n_kv"] + 1) - 1)


@causal_mask.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    return Slice((Cut(0), None)) if axis == 1 else None

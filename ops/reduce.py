"""Ops along rows: sums, softmax, sorting."""

from __future__ import annotations

from typing import Any, Literal

from pyggml.arguments import located
from pyggml.dtypes import I32
from pyggml.errors import ShapeError
from pyggml.node import Node
from pyggml.operation import op
from pyggml.ops.rules import (
    modulo_cut,
    outer_slices,
    want_finite,
    want_ne,
    want_rows,
    want_type,
)
from pyggml.spec import Spec
from pyggml.traits import Axis, Cost, Cut, Slice

__all__ = ["argmax", "argsort", "soft_max", "soft_max_ext", "sum_rows", "top_k"]


@op(slices=outer_slices)
def sum_rows(a: Node) -> Spec:
    """y[0, ..] = sum of a's row.   a  f32 [n, ne1, ne2, ne3],   y  f32 [1, ne1, ne2, ne3]"""
    want_type("a", a, ("f32",))
    return Spec.of(a.dtype, (1, *a.ne[1:]), a.spec.rank)


def alibi_heads(n_heads_here: int, head0: int, n_head: int | None, max_bias: float) -> int:
    """The number of heads that ALiBi's slopes are computed for, n_head or all of the tensor's.

    Checks head0, n_head and max_bias.
    """
    total = n_heads_here if n_head is None else n_head
    if head0 < 0 or head0 + n_heads_here > total:
        raise ShapeError(
            f"heads {head0} to {head0 + n_heads_here - 1} (head0 on) must be within n_head={total}"
        )
    if max_bias < 0:
        raise ShapeError(f"max_bias={max_bias} must not be negative")
    return total


def want_mask(mask: Node | None, n_kv: int, n_q: int, n_head: int, n3: int) -> None:
    """ShapeError unless `mask` is [n_kv, >= n_q, m2, m3] with m2 | n_head and m3 | n3."""
    if mask is None:
        return
    if mask.ne[0] != n_kv or mask.ne[1] < n_q:
        raise ShapeError(
            f"mask must have ne0={n_kv} (keys) and ne1 >= {n_q} (queries), not {list(mask.ne)}"
        )
    if n_head % mask.ne[2] or n3 % mask.ne[3]:
        raise ShapeError(
            f"mask's ne2={mask.ne[2]} and ne3={mask.ne[3]} must divide n_head={n_head} and n3={n3}"
        )
    want_rows("mask", mask)


def mask_cut(mask: Node | None, axis: int, full: int) -> Cut | None:
    """The cut of the mask for a piece along `axis` of the scores [n_kv, n_q, n_head, n3]."""
    if mask is None:
        return None
    return Cut(1) if axis == 1 else modulo_cut(mask.ne[axis], axis, full)


@op
def soft_max_ext(
    a: Node,
    mask: Node | None = None,
    sinks: Node | None = None,
    *,
    scale: float = 1.0,
    max_bias: float = 0.0,
    head0: int = 0,
    n_head: int | None = None,
) -> Spec | tuple[Spec, dict[str, Any]]:
    """Softmax of rows:  y[:, i, h, s] = softmax(scale a[:, i, h, s] + slope(h) mask).

    a, y   f32         [n_kv, n_q, n_head, n3]
    mask   f16 or f32  [n_kv, >= n_q, m2, m3]    its [:, i, h % m2, s % m3]; rows from n_q on unused
    sinks  f32         [n_head]                  one more logit in each head's sum, no column

    slope(h)  1 where max_bias is 0, else ALiBi's: with p = 2^floor(log2 n_head), g = head0 + h,
              2^(-max_bias (g + 1) / p) where g < p, else 2^(-max_bias (2 (g - p) + 1) / (2 p))
    A fully masked row gives 0 (ggml gives NaN without sinks).
    As in ggml the mask is added, so a NaN score stays NaN under -inf and makes its whole row NaN;
    in a mul_mat that follows, 0 times NaN or infinity is NaN too. (A backend that computes a
    causal_mask from positions may leave out the scores it hides.) flash_attn_ext skips hidden keys
    whatever they hold: use it if a cache may contain rows that were never written.
    """
    want_type("a", a, ("f32",))
    n_kv, n_q, heads, n3 = a.ne
    if mask is not None:
        want_type("mask", mask, ("f16", "f32"))
    want_mask(mask, n_kv, n_q, heads, n3)
    if sinks is not None:
        want_type("sinks", sinks, ("f32",))
        want_ne("sinks", sinks, (heads, 1, 1, 1), "one for each head")
    want_finite(scale=scale, max_bias=max_bias)
    if max_bias > 0 and mask is None:
        raise ShapeError(f"max_bias={max_bias} needs a mask")
    return a.spec, {"n_head": alibi_heads(heads, head0, n_head, max_bias)}


@soft_max_ext.cost
def _(node: Node) -> Cost:
    read = sum(s.spec.nbytes for s in node.src if s is not None)
    return Cost(5.0 * node.spec.elements, float(read + node.spec.nbytes))


@soft_max_ext.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    if axis not in (1, 2, 3):
        return None
    assert isinstance(axis, int)
    sink = Cut(0) if node.get("sinks") is not None and axis == 2 else None
    cuts = (Cut(axis), mask_cut(node.get("mask"), axis, node.ne[axis]), sink)
    return Slice(cuts, shift={"head0": 1} if axis == 2 else {})


@located
def soft_max(a: Node) -> Node:
    """Softmax of rows: `soft_max_ext` with defaults."""
    return soft_max_ext(a)


def _row_ids(a: Node, n: int) -> Spec:
    want_type("a", a, ("f32",))
    return Spec.of(I32, (n, *a.ne[1:]), a.spec.rank)


@op(slices=outer_slices)
def argsort(a: Node, *, order: Literal["asc", "desc"] = "asc") -> Spec:
    """Ids that sort each row, "asc" or "desc"; stable.   a  f32 [n, ..],   y  i32 [n, ..]

    -0 equals 0. NaN of either sign is larger than every number, as in NumPy and PyTorch, and all
    NaN are equal. top_k, argmax and grouped_topk use the same order.
    """
    return _row_ids(a, a.ne[0])


@op(slices=outer_slices)
def top_k(a: Node, *, k: int) -> Spec:
    """Ids of the k largest of each row, largest first.   a  f32 [n, ..],   y  i32 [k, ..]

    Exact for rows of any length: the first k of argsort(a, order="desc"). Of equal elements the
    lower id comes first, and is chosen first if not all of them are among the k. NaN comes before
    every number, -inf after (see argsort); where a row has fewer than k numbers above -inf, ids of
    elements that are -inf follow.
    """
    if not 1 <= k <= a.ne[0]:
        raise ShapeError(f"k={k} must be 1 to {a.ne[0]}, the elements of a row")
    return _row_ids(a, k)


@op
def argmax(a: Node) -> Spec:
    """Id of each row's largest, the first of equals.   a  f32 [n, ne1, ..],   y  i32 [ne1, ..]

    In a row with NaN that is the first NaN (see argsort).
    """
    want_type("a", a, ("f32",))
    return Spec.of(I32, a.ne[1:], max(a.spec.rank - 1, 1))


@argmax.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    return Slice((Cut(axis + 1),)) if isinstance(axis, int) and axis < 3 else None


def row_length(node: Node) -> int:
    """The length of the rows that a row op reads."""
    return node["a"].ne[0]

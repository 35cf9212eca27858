"""Parts of one attention over different keys put together."""

from __future__ import annotations

from pyggml.dtypes import F32
from pyggml.errors import ShapeError
from pyggml.node import Axis, Cut, Node, Slice, Spec, op
from pyggml.ops.rules import want_ne, want_type

__all__ = ["merge_lse"]


def _row_slices(node: Node, axis: Axis, n: int) -> Slice | None:
    """Parts of attentions are merged row by row."""
    if not isinstance(axis, int) or axis == 0:
        return None
    return Slice(tuple(None if s is None else Cut(axis) for s in node.src))


@op(slices=_row_slices)
def merge_lse(a: Node, b: Node) -> Spec:
    """Two parts of one attention, over different keys, as one (flash_attn_ext with lse=True).

    a, b, y  f32  [d_v + 1, n_head, n_q, n3]    last element of a row: its log-sum-exp
    With m = max(l_a, l_b), w = e^(l - m):
    y = (w_a a + w_b b) / (w_a + w_b),  l = m + ln(w_a + w_b)
    Two dead rows (l = -inf) stay dead: 0 and -inf.
    """
    want_type("a", a, ("f32",))
    want_type("b", b, ("f32",))
    want_ne("b", b, a.ne, "a's size")
    if a.ne[0] < 2:
        raise ShapeError("rows are d_v values and the log-sum-exp")
    return a.spec


@op(slices=_row_slices)
def lse_sum(a: Node, c: Node | None = None) -> Spec:
    """The running sum of many parts of one attention: `merge_lse` without its rounding.

    a     f32  [d_v + 1, n_head, n_q, n3]   a part (flash_attn_ext with lse=True)
    c, y  f32  [d_v + 2, n_head, n_q, n3]   the sum so far: rows S, s, m. Without c it begins
    A part (v, l) adds e^(l - m) to s and e^(l - m) v to S; m is a reference that moves only where
    l outgrows it. Nothing passes through a logarithm, so errors do not add up. lse_finish ends it.
    """
    want_type("a", a, ("f32",))
    made = Spec.of(F32, (a.ne[0] + 1, *a.ne[1:]), a.spec.rank)
    if a.ne[0] < 2:
        raise ShapeError("rows are d_v values and the log-sum-exp")
    if c is not None:
        want_type("c", c, ("f32",))
        want_ne("c", c, made.ne, "a's size and one more in a row")
    return made


@op(slices=_row_slices)
def lse_finish(c: Node, *, lse: bool = False) -> Spec:
    """The attention that `lse_sum` summed up:  y = S / s, with lse=True also m + ln s.

    c  f32  [d_v + 2, n_head, n_q, n3]
    y  f32  [d_v,     n_head, n_q, n3]   (d_v + 1 with lse)   rows without keys: 0 and -inf
    """
    want_type("c", c, ("f32",))
    if c.ne[0] < 3:
        raise ShapeError("rows are d_v sums, their weight and its reference")
    return Spec.of(F32, (c.ne[0] - 2 + lse, *c.ne[1:]), c.spec.rank)

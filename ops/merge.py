"""Merging of partial attentions over different keys.

A log-sum-exp that is rounded at each of 2,048 merges costs 1e-5; the running sum of `lse_sum` and
`lse_finish` costs 1.4e-6. Loops over many blocks of keys therefore use the sum.
"""

from __future__ import annotations

from pyggml.dtypes import F32
from pyggml.errors import ShapeError
from pyggml.node import Node
from pyggml.operation import op
from pyggml.ops.rules import want_ne, want_type
from pyggml.spec import Spec
from pyggml.traits import Axis, Cut, Slice

__all__ = ["merge_lse"]


def _row_slices(node: Node, axis: Axis, n: int) -> Slice | None:
    """Rows are merged independently."""
    if not isinstance(axis, int) or axis == 0:
        return None
    return Slice(tuple(None if s is None else Cut(axis) for s in node.src))


@op(slices=_row_slices)
def merge_lse(a: Node, b: Node) -> Spec:
    """Merge two partial attentions of the same queries over different keys.

    a, b, y  f32  [d_v + 1, n_head, n_q, n3]    last element of a row: its log-sum-exp
    With m = max(l_a, l_b), w = e^(l - m):
    y = (w_a a + w_b b) / (w_a + w_b),  l = m + ln(w_a + w_b)
    Where both rows are without keys (l = -inf), y is 0 and l is -inf.
    a and b are results of flash_attn_ext with lse=True.
    """
    want_type("a", a, ("f32",))
    want_type("b", b, ("f32",))
    want_ne("b", b, a.ne, "a's size")
    if a.ne[0] < 2:
        raise ShapeError(f"a.ne[0]={a.ne[0]} must be at least 2: d_v values and the log-sum-exp")
    return a.spec


@op(slices=_row_slices)
def lse_sum(a: Node, c: Node | None = None) -> Spec:
    """Add a partial attention to a running sum; more exact than a chain of `merge_lse`.

    a     f32  [d_v + 1, n_head, n_q, n3]   a row (v, l) of flash_attn_ext with lse=True
    c, y  f32  [d_v + 2, n_head, n_q, n3]   rows (S, s, m) of the sum; without c a new one
    S += e^(l - m) v,  s += e^(l - m).   m is a reference that changes only where l exceeds it.
    No step takes a logarithm, so rounding errors do not accumulate. lse_finish ends the sum.
    """
    want_type("a", a, ("f32",))
    spec = Spec.of(F32, (a.ne[0] + 1, *a.ne[1:]), a.spec.rank)
    if a.ne[0] < 2:
        raise ShapeError(f"a.ne[0]={a.ne[0]} must be at least 2: d_v values and the log-sum-exp")
    if c is not None:
        want_type("c", c, ("f32",))
        want_ne("c", c, spec.ne, "a's size with rows longer by one")
    return spec


@op(slices=_row_slices)
def lse_finish(c: Node, *, lse: bool = False) -> Spec:
    """The attention from the sum of `lse_sum`:  y = S / s, with lse=True also m + ln s.

    c  f32  [d_v + 2, n_head, n_q, n3]
    y  f32  [d_v,     n_head, n_q, n3]   (d_v + 1 with lse)   rows without keys: 0 and -inf
    """
    want_type("c", c, ("f32",))
    if c.ne[0] < 3:
        raise ShapeError(f"c.ne[0]={c.ne[0]} must be at least 3: d_v values of S, then s and m")
    return Spec.of(F32, (c.ne[0] - 2 + lse, *c.ne[1:]), c.spec.rank)

"""Scores of a sparse attention's indexer: which rows of a cache a token should attend to."""

from __future__ import annotations

from pyggml.dtypes import F32
from pyggml.errors import ShapeError
from pyggml.node import Node
from pyggml.operation import op
from pyggml.ops.attention import causal_mask
from pyggml.ops.copy import cast, flat
from pyggml.ops.elementwise import add_mask, clamp, relu, scale
from pyggml.ops.linear import mul_mat
from pyggml.ops.moe import mul_multi_add
from pyggml.ops.reduce import mask_cut, want_mask
from pyggml.ops.rules import Precision, want_index, want_ne, want_readable, want_rows, want_type
from pyggml.ops.views import reshape, view
from pyggml.spec import Spec
from pyggml.traits import Axis, Cost, Cut, Slice

__all__ = ["lightning_indexer"]


@op
def lightning_indexer(
    q: Node, k: Node, weights: Node, mask: Node | None = None, kv_len: Node | None = None
) -> Spec:
    """Scores of cache rows:  y[j, t] = sum_n w[n, t] max(0, q[:, n, t] . k[:, j]) + mask[j, t].

    q        f32                      [d, n_head, n_tokens, n3]
    k        any float or block type  [d, n_kv, 1, n3]
    weights  f32                      [n_head, n_tokens, 1, n3]    any sign, scaled already
    mask     f16                      [n_kv, >= n_tokens, 1, m3]   m3 | n3, by modulo
    kv_len   i32                      [1]                          hides rows j >= kv_len
    y        f32                      [n_kv, n_tokens, 1, n3]

    A hidden row (mask -inf, or past kv_len) scores -inf, whatever it holds: NaN in rows that were
    never written does not reach y. Where the row is visible, NaN stays NaN.
    Sums are f32. No backend quantizes q; it may round q to bf16 if k has that type, and to f16,
    scaled by a power of two for each head, if k has f16 or blocks.
    Source: DeepSeek-V3.2-Exp, the lightning indexer of DeepSeek sparse attention.
    """
    d, n_head, n_tokens, n3 = q.ne
    want_type("q", q, ("f32",))
    want_readable("k", k)
    want_rows("q", q)
    want_rows("k", k)
    want_ne("k", k, (d, k.ne[1], 1, n3), "[d, n_kv, 1, n3] with q's d and n3: one head")
    want_type("weights", weights, ("f32",))
    want_ne("weights", weights, (n_head, n_tokens, 1, n3), "a weight for each of q's rows")
    if mask is not None:
        want_type("mask", mask, ("f16",))
        if mask.ne[2] != 1:
            raise ShapeError(f"mask's ne2={mask.ne[2]} must be 1: heads are summed before it")
    want_mask(mask, k.ne[1], n_tokens, 1, n3)
    if kv_len is not None:
        want_index("kv_len", kv_len)
        want_ne("kv_len", kv_len, (1, 1, 1, 1), "one number")
    return Spec.of(F32, (k.ne[1], n_tokens, 1, n3), 4 if n3 > 1 else 2)


@lightning_indexer.cost
def _(node: Node) -> Cost:
    read = sum(s.spec.nbytes for s in node.src if s is not None)
    products = 2.0 * node.spec.elements * node["q"].ne[1] * (node["q"].ne[0] + 1)
    return Cost(products, float(read + node.spec.nbytes))


@lightning_indexer.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    mask = node.get("mask")
    if axis == 0 and node.get("kv_len") is None:
        return Slice((None, Cut(1), None, None if mask is None else Cut(0), None))
    if axis == 1:
        return Slice((Cut(2), None, Cut(1), mask_cut(mask, 1, n), None))
    if axis == 3:
        return Slice((Cut(3), Cut(3), Cut(3), mask_cut(mask, 3, node.ne[3]), None))
    return None


@lightning_indexer.means
def _(
    q: Node, k: Node, weights: Node, mask: Node | None = None, kv_len: Node | None = None
) -> Node:
    d, n_head, n_tokens, n3 = q.ne
    n_kv = k.ne[1]
    # With blocks of k a backend may quantize q unless the product is exact.
    prec: Precision = "f32" if k.dtype.block > 1 else "default"
    products = relu(mul_mat(k, flat(q, d, n_head * n_tokens, 1, n3), prec=prec))
    tokens = n_tokens * n3
    y = mul_multi_add(
        reshape(products, ne=(n_kv, n_head, tokens)), flat(weights, 1, n_head, tokens)
    )
    y = reshape(y, ne=(n_kv, n_tokens, 1, n3)[: 4 if n3 > 1 else 2])
    if mask is not None:
        rows = view(mask, ne=(n_kv, n_tokens, 1, mask.ne[3]))
        y = add_mask(y, cast(rows, dtype="f32"))
    if kv_len is not None:
        end = clamp(cast(kv_len, dtype="f32"), min=0.0, max=float(n_kv))
        last = cast(scale(end, s=1.0, b=-1.0), dtype="i32")
        y = add_mask(y, cast(causal_mask(last, n_kv=n_kv), dtype="f32"))
    return y

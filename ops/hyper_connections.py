"""Hyper-connections of DeepSeek V4: several residual streams, mixed before and after a sublayer.

A sublayer computes `mixes`, one row a token: hc numbers for `pre`, hc for `post`, hc hc for `comb`.
`pre` weighs the streams that enter the sublayer, `post` the streams that its result goes to, and
`comb` carries the streams over. The sources are DeepSeek's model and llama.cpp's deepseek4.
"""

from __future__ import annotations

from math import isqrt

from pyggml.arguments import located
from pyggml.dtypes import F32
from pyggml.errors import ShapeError
from pyggml.node import Node
from pyggml.operation import op
from pyggml.ops.copy import concat, cont, repeat
from pyggml.ops.elementwise import add, div, mul, sigmoid
from pyggml.ops.elementwise import scale as scale_op
from pyggml.ops.linear import mul_mat
from pyggml.ops.moe import mul_multi_add
from pyggml.ops.reduce import soft_max, sum_rows
from pyggml.ops.rules import want_finite, want_ne, want_type
from pyggml.ops.views import permute, reshape, transpose, view
from pyggml.spec import Spec
from pyggml.traits import Axis, Cost, Cut, Slice

__all__ = ["dsv4_hc_comb", "dsv4_hc_maps", "dsv4_hc_post", "dsv4_hc_pre"]


@op
def dsv4_hc_comb(mixes: Node, scale: Node, base: Node, *, eps: float, n_iter: int) -> Spec:
    """How much of each residual stream goes to each: a matrix whose rows and columns sum to 1.

    mixes  f32  [(2 + hc) hc, n_tokens]     any hc >= 1
    scale  f32  [>= 3]                      scale[2] is read
    base   f32  [(2 + hc) hc]
    y      f32  [hc, hc, n_tokens]          target stream, source stream

    C[d, s] = scale[2] mixes[i] + base[i],   i = 2 hc + d + hc s
    C = softmax of C over d, + eps;          C[d, :] /= sum over s of C[d, s], + eps
    n_iter - 1 times:  C[:, s] /= sum over d of C[d, s], + eps;  then the line above's division
    Sums are f32. With eps = 0, a row or column of C that is 0 in f32 gives NaN.
    ggml's op has hc = 4 only.
    """
    hc = _streams(mixes, scale, base, eps, n_iter)
    return Spec.of(F32, (hc, hc, mixes.ne[1]), 3)


def _streams(mixes: Node, scale: Node, base: Node, eps: float, n_iter: int) -> int:
    """The number of streams, after checks."""
    for what, node in (("mixes", mixes), ("scale", scale), ("base", base)):
        want_type(what, node, ("f32",))
    hc = isqrt(mixes.ne[0] + 1) - 1
    if hc < 1 or (2 + hc) * hc != mixes.ne[0]:
        raise ShapeError(f"mixes.ne[0]={mixes.ne[0]} must be (2 + hc) hc: 3, 8, 15, 24, ..")
    want_ne("mixes", mixes, (*mixes.ne[:2], 1, 1), "a row for each token")
    want_ne("base", base, (mixes.ne[0], 1, 1, 1), "as long as a row of mixes")
    if scale.ne[0] < 3 or max(scale.ne[1:]) > 1:
        raise ShapeError(f"scale {list(scale.ne)} needs one row of at least 3")
    want_finite(eps=eps)
    if eps < 0 or n_iter < 1:
        raise ShapeError(f"eps={eps} must not be negative, and n_iter={n_iter} must be at least 1")
    return hc


@dsv4_hc_comb.means
def _(mixes: Node, scale: Node, base: Node, *, eps: float, n_iter: int) -> Node:
    hc, tokens = isqrt(mixes.ne[0] + 1) - 1, mixes.ne[1]
    logits = mul(
        cont(view(mixes, ne=(hc * hc, tokens), start=(2 * hc,))), view(scale, ne=(1,), start=(2,))
    )
    logits = add(logits, view(base, ne=(hc * hc,), start=(2 * hc,)))
    y = scale_op(soft_max(reshape(logits, ne=(hc, hc, tokens))), s=1.0, b=eps)
    for i in range(n_iter):
        if i:
            y = div(y, scale_op(sum_rows(y), s=1.0, b=eps))
        sums = reshape(sum_rows(cont(transpose(y))), ne=(hc, 1, tokens))
        y = div(y, scale_op(sums, s=1.0, b=eps))
    return y


@op
def dsv4_hc_maps(mixes: Node, scale: Node, base: Node, *, eps: float, n_iter: int) -> Spec:
    """`dsv4_hc_comb` and the weights before and after the sublayer, in one op:

    y[:, 0, t]   pre    sigmoid(scale[0] mixes[h] + base[h]) + eps,           h = 0 .. hc - 1
    y[:, 1, t]   post   2 sigmoid(scale[1] mixes[hc + h] + base[hc + h])
    y[:, 2.., t] comb   dsv4_hc_comb

    mixes, scale, base  as in dsv4_hc_comb
    y                   f32  [hc, 2 + hc, n_tokens]

    The parts are views:  comb = view(y, ne=(hc, hc, n_tokens), start=(0, 2)),
    pre = permute(view(y, ne=(hc, 1, n_tokens)), axes=(0, 2, 1, 3)), and post with start=(0, 1).
    """
    hc = _streams(mixes, scale, base, eps, n_iter)
    return Spec.of(F32, (hc, 2 + hc, mixes.ne[1]), 3)


@dsv4_hc_maps.means
def _(mixes: Node, scale: Node, base: Node, *, eps: float, n_iter: int) -> Node:
    hc, tokens = isqrt(mixes.ne[0] + 1) - 1, mixes.ne[1]

    def weights(number: int, factor: float, more: float) -> Node:
        part = cont(view(mixes, ne=(hc, tokens), start=(number * hc,)))
        part = mul(part, view(scale, ne=(1,), start=(number,)))
        part = sigmoid(add(part, view(base, ne=(hc,), start=(number * hc,))))
        return reshape(scale_op(part, s=factor, b=more), ne=(hc, 1, tokens))

    comb = dsv4_hc_comb(mixes, scale, base, eps=eps, n_iter=n_iter)
    return concat(concat(weights(0, 1.0, eps), weights(1, 2.0, 0.0), dim=1), comb, dim=1)


@dsv4_hc_maps.cost
def _(node: Node) -> Cost:
    read = node["mixes"].spec.nbytes
    return Cost(
        4.0 * (node.attrs["n_iter"] + 1) * node.spec.elements, float(read + node.spec.nbytes)
    )


@dsv4_hc_maps.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    return Slice((Cut(1), None, None)) if axis == 2 else None


@dsv4_hc_comb.cost
def _(node: Node) -> Cost:
    read = node["mixes"].spec.nbytes * node.ne[0] // (node.ne[0] + 2)
    return Cost(
        4.0 * (node.attrs["n_iter"] + 1) * node.spec.elements, float(read + node.spec.nbytes)
    )


@dsv4_hc_comb.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    return Slice((Cut(1), None, None)) if axis == 2 else None


def _as_weights(weights: Node) -> Node:
    """[hc, n_tokens] as [1, hc, n_tokens], without a copy."""
    return permute(weights, axes=(1, 2, 0, 3))


@located
def dsv4_hc_pre(x: Node, weights: Node) -> Node:
    """Weighted sum of a token's residual streams:  y[:, t] = sum_s weights[s, t] x[:, s, t].

    x        f32  [n, hc, n_tokens]
    weights  f32  [hc, n_tokens]
    y        f32  [n, n_tokens]
    The same as `mul_multi_add` with weights of [1, hc, n_tokens].
    """
    return mul_multi_add(x, _as_weights(weights))


@op
def dsv4_hc_post(x: Node, residual: Node, post: Node, comb: Node | None = None) -> Spec:
    """The residual streams after a sublayer with the result x:

    y[:, d, t] = post[d, t] x[:, t] + sum_s comb[d, s, t] residual[:, s, t]

    x         f32  [n, n_tokens]
    residual  f32  [n, hc, n_tokens]
    post      f32  [hc, n_tokens]
    comb      f32  [hc, hc, n_tokens]     target, source; without it residual[:, d, t] is added
    y         f32  [n, hc, n_tokens]
    """
    n, hc, tokens, n3 = residual.ne
    for what, node in (("x", x), ("residual", residual), ("post", post)):
        want_type(what, node, ("f32",))
    if n3 != 1:
        raise ShapeError(f"residual must have three dimensions, but its ne3 is {n3}")
    want_ne("x", x, (n, tokens, 1, 1), "a row of residual's length for each token")
    want_ne("post", post, (hc, tokens, 1, 1), "a number for each stream and token")
    if comb is not None:
        want_type("comb", comb, ("f32",))
        want_ne("comb", comb, (hc, hc, tokens, 1), "a matrix for each token")
    return Spec.of(F32, residual.ne, 3)


@dsv4_hc_post.means
def _(x: Node, residual: Node, post: Node, comb: Node | None = None) -> Node:
    n, hc, tokens, _ = residual.ne
    rows = repeat(reshape(cont(x), ne=(n, 1, tokens)), ne=(n, hc, tokens))
    new = mul(rows, _as_weights(post))
    if comb is None:
        return add(new, residual)
    return add(new, mul_mat(cont(transpose(residual)), cont(transpose(comb)), prec="f32"))


@dsv4_hc_post.cost
def _(node: Node) -> Cost:
    terms = 2 if node.get("comb") is None else 1 + node.ne[1]
    read = sum(s.spec.nbytes for s in node.src if s is not None)
    return Cost(2.0 * terms * node.spec.elements, float(read + node.spec.nbytes))


@dsv4_hc_post.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    mixed = node.get("comb") is not None
    if axis == 0:
        return Slice((Cut(0), Cut(0), None, None)[: len(node.src)])
    if axis == 1:
        return Slice((None, None if mixed else Cut(1), Cut(0), Cut(0) if mixed else None))
    return Slice((Cut(1), Cut(2), Cut(1), Cut(2) if mixed else None)) if axis == 2 else None

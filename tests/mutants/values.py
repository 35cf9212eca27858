"""Mutants of ops that move, convert, sum and sort values."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from tests.mutants.mutant import (
    Mutant,
    changed,
    instead,
    maker,
    stretched,
    then,
    unstrided,
    wrapped,
)

MUTANTS: list[Mutant] = []
mutant = maker(MUTANTS)

# -- shape --------------------------------------------------------------------------------------

mutant("cont", "reads its source as if contiguous")(instead(0, unstrided))
mutant("cast", "reads its source as if contiguous")(instead(0, unstrided))
mutant("get_rows", "an id of -1 is the last row")(
    lambda right, out, a, ids, **attrs: right(
        out, a, np.where(ids < 0, (a.ne[1] if hasattr(a, "ne") else a.shape[2]) - 1, ids), **attrs
    )
)
mutant("get_rows", "reads the first matrix for all ids")(
    instead(0, lambda a: np.broadcast_to(a[:1, :1], a.shape))
)
mutant("cpy", "rounds to f16")(instead(0, lambda a: a.astype(np.float16).astype(a.dtype)))


@mutant("cast", "truncates to f16 instead of rounding")
def _(right: Any, out: Any, a: Any, **attrs: Any) -> None:
    if isinstance(a, np.ndarray) and a.dtype == np.float32 and attrs["dtype"] == "f16":
        a = (np.ascontiguousarray(a).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    right(out, a, **attrs)


@mutant("concat", "along the next dimension")
def _(right: Any, out: Any, a: Any, b: Any, **attrs: Any) -> None:
    if isinstance(a, np.ndarray) and a.shape == b.shape and attrs["dim"] == 1:
        joined = np.stack([a, b], axis=2)
        out[...] = joined.swapaxes(2, 3).reshape(out.shape)
    else:
        right(out, a, b, **attrs)


@mutant("repeat", "repeats elements, not rows")
def _(right: Any, out: Any, a: Any, **attrs: Any) -> None:
    if isinstance(a, np.ndarray):
        out[...] = stretched(a, out.shape)
    else:
        right(out, a, **attrs)


@mutant("set_rows", "takes the ids of batch i // r, not i % r")
def _(right: Any, out: Any, a: Any, b: Any, ids: Any, **attrs: Any) -> None:
    n3, n2 = b.shape[:2]
    right(out, a, b, stretched(ids, (1, n3, n2, ids.shape[3])), **attrs)


@mutant("set_rows", "drops the last row")
def _(right: Any, out: Any, a: Any, b: Any, ids: Any, **attrs: Any) -> None:
    fewer = ids.copy()
    fewer[..., -1] = -1
    right(out, a, b, fewer, **attrs)


@mutant("set_rows", "clears the rows that it does not write")
def _(right: Any, out: Any, a: Any, b: Any, ids: Any, **attrs: Any) -> None:
    if isinstance(out, np.ndarray):
        out.fill(0)
    right(out, a, b, ids, **attrs)


# -- elementwise --------------------------------------------------------------------------------


@mutant("add", "b repeated by i // r, not i % r")
def _(right: Any, out: Any, a: Any, b: Any, **attrs: Any) -> None:
    right(out, a, stretched(b, a.shape), **attrs)


@mutant("mul", "the first matrix of b for all of a's")
def _(right: Any, out: Any, a: Any, b: Any, **attrs: Any) -> None:
    right(out, a, np.broadcast_to(b[:1, :1], b.shape), **attrs)


mutant("sub", "reads a as if contiguous")(instead(0, unstrided))
mutant("div", "b rounded to f16")(instead(1, lambda b: b.astype(np.float16).astype(b.dtype)))
mutant("scale", "without the added constant")(changed(b=0.0))
mutant("clamp", "NaN becomes the lower limit")(instead(0, lambda a: np.nan_to_num(a, nan=-1e9)))


@mutant("softplus", "without log1p")
def _(right: Any, out: Any, a: Any, **attrs: Any) -> None:
    out[...] = np.log(1 + np.exp(a))


@mutant("softplus", "0 below -17, a above 20")
def _(right: Any, out: Any, a: Any, **attrs: Any) -> None:
    right(out, a, **attrs)
    np.copyto(out, 0, where=a < -17)


mutant("softplus", "NaN becomes 0")(instead(0, lambda a: np.nan_to_num(a, nan=-1e9)))
mutant("exp", "in f16")(instead(0, lambda a: a.astype(np.float16).astype(a.dtype)))
mutant("glu", "halves swapped")(changed(swapped=lambda old: not old))
mutant("glu", "GELU for SiLU")(changed(act=lambda old: {"silu": "gelu"}.get(old, old)))
mutant("glu", "without the limit")(changed(limit=None))
mutant("glu", "the limit of x from below too")(
    lambda right, out, a, b, **attrs: right(
        out, a if b is None or not attrs["limit"] else np.maximum(a, -attrs["limit"]), b, **attrs
    )
)


@mutant("glu", "limits after the activation")
def _(right: Any, out: Any, a: Any, b: Any, **attrs: Any) -> None:
    limit = attrs["limit"]
    if limit is None or b is None or attrs["act"] != "silu":
        return right(out, a, b, **attrs)
    x = np.float32(a)
    out[...] = np.minimum(x / (1 + np.exp(-x)), limit) * np.clip(b, -limit, limit)


mutant("add_id", "the ids of the first token for all")(
    instead(2, lambda ids: np.broadcast_to(ids[:, :, :1], ids.shape))
)


@mutant("gelu", "x sigmoid(1.702 x)")
def _(right: Any, out: Any, a: Any, **attrs: Any) -> None:
    out[...] = a / (1 + np.exp(-1.702 * a))


@mutant("relu", "NaN becomes 0")
def _(right: Any, out: Any, a: Any, **attrs: Any) -> None:
    out[...] = np.fmax(a, 0)


@mutant("silu", "drops the tail after the last whole block of 8")
def _(right: Any, out: Any, a: Any, **attrs: Any) -> None:
    n = a.shape[3] // 8 * 8
    if n:
        right(out[..., :n], a[..., :n], **attrs)


@mutant("tanh", "writes whole blocks of 8, past the end")
def _(right: Any, out: Any, a: Any, **attrs: Any) -> None:
    right(out, a, **attrs)
    row = out[-1, -1, -1]
    more = -len(row) % 8
    as_strided(row[-1:], (more + 1,))[1:] = 0


@mutant("sqr", "writes its result into the source too")
def _(right: Any, out: Any, a: Any, **attrs: Any) -> None:
    right(out, a, **attrs)
    a[...] = out


@mutant("exp", "writes its result as if contiguous")
def _(right: Any, out: Any, a: Any, **attrs: Any) -> None:
    right(unstrided(out), a, **attrs)


@mutant("mul", "clears its result first, even if that is its source")
def _(right: Any, out: Any, a: Any, b: Any, **attrs: Any) -> None:
    out[...] = 0
    right(out, a, b, **attrs)


@mutant("scale", "writes past its scratch")
def _(right: Any, out: Any, a: Any, **attrs: Any) -> None:
    right(out, a, **attrs)
    scratch = attrs["scratch"].array(0, np.uint8)
    as_strided(scratch, (8,), (1,))[-1] = 1  # f32 needs no scratch: one byte past none


@mutant("sigmoid", "adds to the result's old contents")
def _(right: Any, out: Any, a: Any, **attrs: Any) -> None:
    old = out.copy()
    right(out, a, **attrs)
    out += 1e-30 * old


# -- reductions ---------------------------------------------------------------------------------


@mutant("sum_rows", "sums in f16")
def _(right: Any, out: Any, a: Any, **attrs: Any) -> None:
    out[...] = np.sum(a, axis=3, keepdims=True, dtype=np.float16)


mutant("sum_rows", "drops the tail past a block of 32")(
    lambda right, out, a, **attrs: right(out, a[..., : max(1, a.shape[3] // 32 * 32)], **attrs)
)
mutant("rms_norm", "counts bytes with 31 bits")(instead(0, wrapped))
mutant("rms_norm", "without eps")(changed(eps=0.0))
mutant("rms_norm", "eps outside the root")(changed(eps=lambda old: old * old))
mutant("rms_norm", "divides by n - 1, not n")(
    lambda right, out, a, **attrs: (
        right(out, a, **attrs),
        np.multiply(out, np.sqrt(max(1, a.shape[3] - 1) / a.shape[3]), out=out),
    )[0]
)
mutant("norm", "without eps")(changed(eps=0.0))
mutant("norm", "without the mean")(
    lambda right, out, a, eps, **attrs: np.divide(
        a, np.sqrt(np.mean(a * a, axis=3, keepdims=True) + np.float32(eps)), out=out
    )
)
mutant("norm", "divides by n - 1, not n")(
    lambda right, out, a, **attrs: (
        right(out, a, **attrs),
        np.multiply(out, np.sqrt(max(1, a.shape[3] - 1) / a.shape[3]), out=out),
    )[0]
)


@mutant("norm", "the variance as mean(a^2) - mean^2")
def _(right: Any, out: Any, a: Any, eps: float, **attrs: Any) -> None:
    mean = np.mean(a, axis=3, keepdims=True)
    var = np.mean(a * a, axis=3, keepdims=True) - mean * mean
    np.divide(a - mean, np.sqrt(np.maximum(var, 0) + np.float32(eps)), out=out)


@mutant("norm", "NaN for a constant row without eps")
def _(right: Any, out: Any, a: Any, eps: float, **attrs: Any) -> None:
    right(out, a, eps=eps, **attrs)
    if eps == 0:
        np.copyto(out, np.nan, where=(a == a[..., :1]).all(axis=3, keepdims=True))


@mutant("norm", "a mean rounded to f32")
def _(right: Any, out: Any, a: Any, eps: float, **attrs: Any) -> None:
    x = a - np.mean(a, axis=3, keepdims=True)
    spread = np.sqrt(np.mean(x * x, axis=3, keepdims=True) + np.float32(eps))
    np.divide(x, np.where(spread == 0, 1, spread), out=out)


mutant("argsort", "in the other order")(
    changed(order=lambda old: "asc" if old == "desc" else "desc")
)
mutant("argsort", "equal values in reverse order")(
    lambda right, out, a, **attrs: (
        right(out, a[..., ::-1], **attrs),
        np.subtract(a.shape[3] - 1, out, out=out),
    )[0]
)


mutant("argsort", "NaN after the smallest number in either order")(
    lambda right, out, a, order, **attrs: right(
        out, np.where(np.isnan(a), np.inf if order == "asc" else -np.inf, a), order=order, **attrs
    )
)
mutant("top_k", "ignores NaN")(
    instead(0, lambda a: np.where(np.isnan(a), a.dtype.type(-np.inf), a))
)


@mutant("top_k", "the first two swapped, as ggml's CPU does")
def _(right: Any, out: Any, a: Any, **attrs: Any) -> None:
    right(out, a, **attrs)
    out[..., :2] = out[..., :2][..., ::-1].copy()


@mutant("argmax", "the last of several maxima")
def _(right: Any, out: Any, a: Any, **attrs: Any) -> None:
    out[0] = a.shape[3] - 1 - a[..., ::-1].argmax(axis=-1)


mutant("soft_max_ext", "without scale")(changed(scale=1.0))
mutant("soft_max_ext", "without ALiBi")(changed(max_bias=0.0))
mutant("soft_max_ext", "ignores head0")(changed(head0=0))
mutant("soft_max_ext", "NaN for a row without keys")(
    then(lambda out: np.copyto(out, np.nan, where=~out.any(axis=3, keepdims=True)))
)
mutant("soft_max_ext", "sinks left out")(
    lambda right, out, a, mask, sinks, **attrs: right(
        out, a, mask, None if sinks is None else np.full_like(sinks, -1e30), **attrs
    )
)


@mutant("soft_max_ext", "takes the mask of head h // r, not h % r")
def _(right: Any, out: Any, a: Any, mask: Any, sinks: Any, **attrs: Any) -> None:
    if mask is not None and mask.dtype == np.float32:  # f16 masks of another size need scratch
        mask = stretched(mask, (len(mask), a.shape[1], *mask.shape[2:]))
    right(out, a, mask, sinks, **attrs)


@mutant("soft_max_ext", "adds its scratch's old contents, unless NaN")
def _(right: Any, out: Any, a: Any, mask: Any, sinks: Any, **attrs: Any) -> None:
    stale = attrs["scratch"].array(0, np.uint8)
    old = as_strided(stale, (4,), (1,)).copy().view(np.float32)
    right(out, a, mask, sinks, **attrs)
    out += 1e-6 * np.nan_to_num(old)

"""Mutants of rope, products, experts and attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.mutants.mutant import (
    Mutant,
    changed,
    instead,
    maker,
    stretched,
    then,
    unstrided,
    without,
)

MUTANTS: list[Mutant] = []
mutant = maker(MUTANTS)


def _half(a: Any) -> Any:
    return a.astype(np.float16).astype(a.dtype)


# -- rope ---------------------------------------------------------------------------------------

mutant("rope_ext", "rotates the other mode's pairs")(
    changed(mode=lambda old: "neox" if old == "normal" else "normal")
)
mutant("rope_ext", "ignores the offset")(changed(offset=0))
mutant("rope_ext", "ignores back")(changed(back=False))
mutant("rope_ext", "divides by the amplitude when it rotates back")(
    lambda right, out, *src, **attrs: right(
        out, *src, **{**attrs, "attn_factor": attrs["attn_factor"] ** (1 - 2 * attrs["back"])}
    )
)
mutant("rope_ext", "rotates in the other direction")(instead(1, np.negative))
mutant("rope_ext", "positions in f16")(instead(1, lambda pos: pos.astype(np.float16).astype("i4")))
mutant("rope_ext", "multiplies by the frequency factors")(instead(2, lambda f: 1 / f))
mutant("rope_ext", "without YaRN's mixing")(changed(ext_factor=0.0))
mutant("rope_ext", "without the amplitude")(changed(attn_factor=1.0))
mutant("rope_ext", "YaRN's limits swapped")(
    lambda right, out, *sources, **attrs: right(
        out, *sources, **{**attrs, "beta_fast": attrs["beta_slow"], "beta_slow": attrs["beta_fast"]}
    )
)


@mutant("rope_ext", "clears the elements that it does not rotate")
def _(right: Any, out: Any, a: Any, *sources: Any, **attrs: Any) -> None:
    right(out, a, *sources, **attrs)
    out[..., attrs["offset"] + attrs["n_dims"] :] = 0


# -- products -----------------------------------------------------------------------------------


def _tiled(a: Any, b: Any) -> Any:
    return np.tile(a, (b.shape[0] // len(a), b.shape[1] // a.shape[1], 1, 1))


@mutant("mul_mat", "takes a's matrix i % r, not i // r")
def _(right: Any, out: Any, a: Any, b: Any, **attrs: Any) -> None:
    plain = isinstance(a, np.ndarray) and a.dtype == np.float32 and isinstance(b, np.ndarray)
    if plain and out.dtype == b.dtype == np.float32:
        np.matmul(b, _tiled(a, b).swapaxes(-1, -2), out=out)
    else:
        right(out, a, b, **attrs)


@mutant("mul_mat", "sums in f16")
def _(right: Any, out: Any, a: Any, b: Any, **attrs: Any) -> None:
    right(out, a, b, **attrs)
    out[...] = _half(out)


@mutant("mul_mat", "drops the tail of k past a block of 32")
def _(right: Any, out: Any, a: Any, b: Any, **attrs: Any) -> None:
    if isinstance(b, np.ndarray):
        b = b.copy()
        b[..., b.shape[3] // 32 * 32 :] = 0
    right(out, a, b, **attrs)


@mutant("mul_mat", "quantizes b to 8 bits")
def _(right: Any, out: Any, a: Any, b: Any, **attrs: Any) -> None:
    if isinstance(b, np.ndarray) and b.dtype == np.float32:
        step = np.abs(b).max(axis=-1, keepdims=True) / np.float32(127) + np.float32(1e-30)
        b = np.rint(b / step) * step
    right(out, a, b, **attrs)


@mutant("mul_mat", "does not write the last row of an odd number of rows")
def _(right: Any, out: Any, a: Any, b: Any, **attrs: Any) -> None:
    old = out[..., -1].copy()
    right(out, a, b, **attrs)
    if out.shape[3] % 2:
        out[..., -1] = old


mutant("mul_mat", "f16 operands where f32 is declared")(instead(1, _half))
mutant("mul_mat_id", "the ids of the first token for all")(
    instead(2, lambda ids: np.broadcast_to(ids[:, :, :1], ids.shape))
)
mutant("mul_mat_id", "the first expert for a negative id")(instead(2, lambda i: np.maximum(i, 0)))
mutant("mul_mat_id", "the next expert")(
    instead(2, lambda ids: np.maximum(ids - 1, np.minimum(ids, 0)))
)
mutant("mul_mat_id", "b rounded to f16")(instead(1, _half))


@mutant("mul_mat_id", "takes row e // r of b, not e % n_b")
def _(right: Any, out: Any, experts: Any, b: Any, ids: Any, **attrs: Any) -> None:
    right(out, experts, stretched(b, (1, b.shape[1], ids.shape[3], b.shape[3])), ids, **attrs)


# -- experts ------------------------------------------------------------------------------------

mutant("moe_up_gate", "up and gate swapped")(
    lambda right, out, up, gate, *sources, **attrs: right(out, gate, up, *sources, **attrs)
)
mutant("moe_up_gate", "without the limit")(changed(limit=None))
mutant("moe_up_gate", "SiLU for every activation")(changed(act="silu"))
mutant("moe_up_gate", "the first expert for a negative id")(instead(3, lambda i: np.maximum(i, 0)))
mutant("moe_up_gate", "the result in f16")(then(lambda out: np.copyto(out, _half(out))))
mutant("fused_up_gate", "up and gate swapped")(
    lambda right, out, up, gate, b, **attrs: right(out, gate, up, b, **attrs)
)
mutant("fused_up_gate", "without the limit")(changed(limit=None))
mutant("fused_up_gate", "relu for GELU")(changed(act=lambda a: "relu" if a == "gelu" else a))
mutant("grouped_topk", "a group's score is its best expert only")(changed(n_top=1))
mutant("grouped_topk", "experts of all groups")(
    lambda right, out, a, **attrs: right(out, a, **{**attrs, "n_group_used": attrs["n_group"]})
)
mutant("multi_add", "without the last expert")(
    instead(0, lambda a: a[:, :, :-1] if a.shape[2] > 1 else a)
)
mutant("mul_multi_add", "the first expert's weight for all")(
    instead(1, lambda b: np.broadcast_to(b[:, :, :1], b.shape))
)

COMB, POST = "dsv4_hc_comb", "dsv4_hc_post"
mutant(COMB, "one iteration fewer")(changed(n_iter=lambda n: max(1, n - 1)))
mutant(COMB, "without eps")(changed(eps=0.0))
mutant(COMB, "the scale of pre")(instead(1, lambda scale: np.roll(scale, 2, axis=3)))
mutant(COMB, "targets and sources swapped")(
    then(lambda out: np.copyto(out, out.swapaxes(2, 3).copy()))
)
mutant(COMB, "without the base")(instead(2, np.zeros_like))
mutant(COMB, "the last step over targets")(
    then(lambda out: np.divide(out, out.sum(axis=3, keepdims=True), out=out))
)
mutant(COMB, "NaN for a row of -inf")(
    lambda right, out, mixes, scale, base, **attrs: (
        right(out, mixes, scale, base, **attrs),
        np.copyto(out, np.nan, where=np.isneginf(mixes).all(axis=3)[..., None, None][0]),
    )[0]
)
mutant("dsv4_hc_maps", "pre and post exchanged")(
    then(lambda out: np.copyto(out[:, :, :2], out[:, :, 1::-1].copy()))
)
mutant("dsv4_hc_maps", "one iteration fewer")(changed(n_iter=lambda n: max(1, n - 1)))
mutant("dsv4_hc_maps", "the scale of comb for all")(
    instead(1, lambda scale: np.full_like(scale, scale[0, 0, 0, 2]))
)
mutant("dsv4_hc_maps", "without eps")(changed(eps=0.0))
mutant(POST, "the matrix transposed")(
    lambda right, out, x, old, post, comb, **attrs: right(
        out, x, old, post, comb if comb is None else comb.swapaxes(2, 3), **attrs
    )
)
mutant(POST, "the matrix of the first token for all")(
    instead(3, lambda comb: np.broadcast_to(comb[:, :1], comb.shape))
)
mutant(POST, "without the sublayer's result")(instead(0, np.zeros_like))
mutant(POST, "the first stream's share for all")(
    instead(2, lambda post: np.broadcast_to(post[..., :1], post.shape))
)
mutant(POST, "without the old streams if there is no matrix")(
    lambda right, out, x, old, post, comb, **attrs: right(
        out, x, np.zeros_like(old) if comb is None else old, post, comb, **attrs
    )
)
mutant(POST, "ignores NaN in the matrix")(instead(3, np.nan_to_num))

# -- attention ----------------------------------------------------------------------------------

FLASH = "flash_attn_ext"
mutant(FLASH, "without scale")(changed(scale=1.0))
mutant(FLASH, "the mask off by one key")(instead(3, lambda mask: np.roll(mask, 1, axis=3)))
mutant(FLASH, "the mask off by one query")(instead(3, lambda mask: np.roll(mask, 1, axis=2)))
mutant(FLASH, "without the soft cap")(changed(logit_softcap=0.0))
mutant(FLASH, "without ALiBi")(changed(max_bias=0.0))
mutant(FLASH, "ignores head0")(changed(head0=0))
mutant(FLASH, "without sinks")(without(4))
mutant(FLASH, "kv_len is one too large")(instead(5, lambda length: length + 1))
mutant(FLASH, "ignores kv_len")(without(5))
mutant(FLASH, "ignores kv0")(changed(kv0=0))
mutant(FLASH, "sums in f16")(then(lambda out: np.copyto(out, _half(out))))
mutant(FLASH, "the first sequence's queries for all")(
    instead(0, lambda q: np.broadcast_to(q[:1], q.shape))
)


@mutant(FLASH, "takes k's head h % r, not h // r")
def _(right: Any, out: Any, q: Any, k: Any, v: Any, *sources: Any, **attrs: Any) -> None:
    if isinstance(k, np.ndarray):
        ratio = q.shape[1] // k.shape[1]
        order = np.argsort(np.arange(q.shape[1]) % k.shape[1], kind="stable")
        sorted_ = np.empty_like(out)
        right(sorted_, q[:, order], k, v, *sources, **attrs)
        out[:, :, order if ratio > 1 else slice(None)] = sorted_
    else:
        right(out, q, k, v, *sources, **attrs)


mutant(FLASH, "the next head's mask")(instead(3, lambda mask: np.roll(mask, 1, axis=1)))


@mutant(FLASH, "multiplies hidden NaN by 0")
def _(right: Any, out: Any, q: Any, k: Any, v: Any, *sources: Any, **attrs: Any) -> None:
    right(out, q, k, v, *sources, **attrs)
    if isinstance(v, np.ndarray):
        nan = np.repeat(0 * v.sum(axis=2), q.shape[1] // v.shape[1], axis=1)
        out[..., : v.shape[3]] += nan[:, None]


@mutant(FLASH, "replaces NaN that a row sees by 0")
def _(right: Any, out: Any, q: Any, k: Any, v: Any, *sources: Any, **attrs: Any) -> None:
    if isinstance(k, np.ndarray) and isinstance(v, np.ndarray):
        k, v = (np.where(np.isfinite(x), x, x.dtype.type(0)) for x in (k, v))
    right(out, q, k, v, *sources, **attrs)


@mutant(FLASH, "drops the tail of keys past a block of 8")
def _(right: Any, out: Any, q: Any, k: Any, v: Any, mask: Any, *sources: Any, **attrs: Any) -> None:
    if isinstance(k, np.ndarray) and k.shape[2] > 8:
        n = k.shape[2] // 8 * 8
        k, v, mask = k[:, :, :n], v[:, :, :n], mask if mask is None else mask[..., :n]
    right(out, q, k, v, mask, *sources, **attrs)


@mutant(FLASH, "reads v at the start of k's rows")
def _(right: Any, out: Any, q: Any, k: Any, v: Any, *sources: Any, **attrs: Any) -> None:
    if isinstance(k, np.ndarray) and isinstance(v, np.ndarray) and np.may_share_memory(k, v):
        v = k[..., : v.shape[3]]
    right(out, q, k, v, *sources, **attrs)


@mutant(FLASH, "the log-sum-exp to base 2")
def _(right: Any, out: Any, *sources: Any, **attrs: Any) -> None:
    right(out, *sources, **attrs)
    if attrs["lse"]:
        out[..., -1] *= 1.442695


@mutant(FLASH, "0 for the log-sum-exp of a dead row")
def _(right: Any, out: Any, *sources: Any, **attrs: Any) -> None:
    right(out, *sources, **attrs)
    if attrs["lse"]:
        np.copyto(out[..., -1], 0, where=np.isneginf(out[..., -1]))


mutant("causal_mask", "hides a token's own key")(instead(0, lambda pos: pos - 1))
mutant("causal_mask", "a window one key too wide")(
    changed(window=lambda old: None if old is None else old + 1)
)
mutant("causal_mask", "without the stride")(changed(stride=1))
mutant("causal_mask", "rows seen from their first position on")(
    lambda right, out, pos, kv_end, **attrs: right(
        out, np.where(pos < 0, pos, pos + attrs["stride"] - 1), kv_end, **attrs
    )
)
mutant("causal_mask", "counts keys ahead with 32 bits")(
    lambda right, out, pos, kv_end, n_kv, window, stride, **attrs: (
        np.copyto(
            out[0, 0],
            np.where(np.arange(n_kv, dtype="i4") - pos[0, 0, 0, :, None] > 0, -np.inf, 0),
            casting="unsafe",
        )
        if window is None and kv_end is None and stride == 1
        else right(out, pos, kv_end, n_kv=n_kv, window=window, stride=stride, **attrs)
    )
)
mutant("causal_mask", "rows in order in spite of kv_end")(
    instead(1, lambda kv_end: np.arange(1, kv_end.shape[-1] + 1, dtype="i4").reshape(kv_end.shape))
)
mutant("causal_mask", "empty rows are seen")(instead(1, lambda kv_end: np.maximum(kv_end, 1)))
mutant("causal_mask", "-65504 for -inf")(then(lambda out: np.maximum(out, -65504, out=out)))
mutant("merge_lse", "the mean of both parts")(instead(1, lambda b: _same_weight(b)))
mutant("merge_lse", "the first part only")(instead(1, lambda b: np.full_like(b, -1e4)))


def _same_weight(b: Any) -> Any:
    b = b.copy()
    b[..., -1] = 0
    return b


# -- collectives ---------------------------------------------------------------------------------


@mutant("all_reduce", "leaves out the last part")
def _(right: Any, out: Any, *parts: Any, **attrs: Any) -> None:
    right(out, *(parts[:-1] or parts), **attrs)


@mutant("all_reduce", "adds attentions over different keys")
def _(right: Any, out: Any, *parts: Any, **attrs: Any) -> None:
    if attrs["op"] == "lse":
        out[...] = sum(part[..., :-1] for part in parts)
    else:
        right(out, *parts, **attrs)


@mutant("all_gather", "in the opposite order")
def _(right: Any, out: Any, *parts: Any, **attrs: Any) -> None:
    right(out, *parts[::-1], **attrs)


@mutant("reduce_scatter", "gives every device the first piece")
def _(right: Any, out: Any, *parts: Any, **attrs: Any) -> None:
    sizes, size = attrs["sizes"], out.shape[3 - attrs["dim"]]
    if sizes[0] >= size:
        attrs = {**attrs, "sizes": (size, *sizes[1:]), "rank": 0}
    right(out, *parts, **attrs)


@mutant("broadcast", "reads its source as if contiguous")
def _(right: Any, out: Any, a: Any, **attrs: Any) -> None:
    right(out, unstrided(a), **attrs)

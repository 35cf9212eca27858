"""Attention, in float64: row by row, over the keys that a row sees and no others."""

from __future__ import annotations

import numpy as np

from pyggml.parity.oracle.base import Array, alibi_slope


def _scores(q: Array, k: Array, scale: float, softcap: float) -> Array:
    """[n_q, n_kv]; keys that hold NaN give NaN here and are dropped later if they are masked."""
    with np.errstate(invalid="ignore", over="ignore"):
        if softcap == 0.0:
            return np.asarray(scale * (q @ k.T))
        return np.asarray(softcap * np.tanh(scale / softcap * (q @ k.T)))


def _row(s: Array, v: Array, sink: float) -> tuple[Array, float]:
    """(softmax(s) . v, log-sum-exp of s), the sink counted in both; `s` and `v` of live keys."""
    top = max(float(np.max(s, initial=-np.inf)), sink)
    if top == -np.inf:
        return np.zeros(v.shape[1]), -np.inf
    e = np.exp(s - top)
    total = float(np.sum(e) + np.exp(sink - top))
    return e @ v / total, top + float(np.log(total))


def flash_attn_ext(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    sinks: Array | None = None,
    kv_len: Array | None = None,
    *,
    scale: float,
    max_bias: float = 0.0,
    logit_softcap: float = 0.0,
    prec: str = "default",
    lse: bool = False,
    head0: int = 0,
    n_head: int | None = None,
    kv0: int = 0,
) -> Array:
    """q[Dk, n_q, H, n3], k[Dk, n_kv, H_kv, n3], v[Dv, n_kv, H_kv, n3] -> [Dv (+1), H, n_q, n3].

    A key is live for a row where the mask is not -inf and kv0 + j < kv_len. Without live keys the
    output is 0 and the log-sum-exp that of the sink alone: -inf where there is none.
    """
    n3, n_heads, n_q, _ = q.shape
    n_kv = k.shape[2]
    heads = n_heads if n_head is None else n_head
    out = np.empty((n3, n_q, n_heads, v.shape[3] + 1))
    counted = np.full(n_kv, True) if kv_len is None else kv0 + np.arange(n_kv) < kv_len.item()
    for i3, h in np.ndindex(n3, n_heads):
        h_kv = h // (n_heads // k.shape[1])
        s = _scores(q[i3, h], k[i3, h_kv], scale, logit_softcap)
        live = np.tile(counted, (n_q, 1))
        if mask is not None:
            bias = mask[i3 % mask.shape[0], h % mask.shape[1], :n_q]
            live &= bias != -np.inf
            s = s + alibi_slope(head0 + h, heads, max_bias) * bias
        sink = -np.inf if sinks is None else float(sinks[0, 0, 0, h])
        for i in range(n_q):
            row, log_sum = _row(s[i, live[i]], v[i3, h_kv][live[i]], sink)
            out[i3, i, h, :-1], out[i3, i, h, -1] = row, log_sum
    return out if lse else out[..., :-1]


def causal_mask(
    pos: Array, kv_end: Array | None = None, *, n_kv: int, window: int | None = None
) -> Array:
    """[n_kv, T]: 0 where p_j <= pos[i] and, with a window, pos[i] - p_j < window; else -inf."""
    at = np.arange(n_kv) if kv_end is None else kv_end.reshape(-1) - 1
    behind = pos.reshape(-1, 1) - at  # [T, n_kv]
    seen = (at >= 0) & (behind >= 0) & (True if window is None else behind < window)
    return np.where(seen, 0.0, -np.inf)[None, None]


def merge_lse(a: Array, b: Array) -> Array:
    """Two results with log-sum-exp rows, over disjoint keys, as if over all keys at once."""
    la, lb = a[..., -1:], b[..., -1:]
    top = np.maximum(la, lb)
    finite = np.where(top == -np.inf, 0.0, top)  # two dead rows: weights 0, not NaN
    wa, wb = np.exp(la - finite), np.exp(lb - finite)
    total = wa + wb
    safe = np.where(total == 0.0, 1.0, total)
    with np.errstate(divide="ignore"):
        log_sum = finite + np.log(total)
    return np.concatenate([(wa * a[..., :-1] + wb * b[..., :-1]) / safe, log_sum], axis=3)

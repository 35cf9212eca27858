"""Attention, in float64: row by row, over the keys that a row sees and no others."""

from __future__ import annotations

import numpy as np

from pyggml.parity.oracle.base import Array, alibi_slope

CASES = """
flash_attn_ext(f32[192,3,4]{|@p0213}, {PLAIN}[192,23,{1|2|4}]{|@inner}, $2[128,23,$3], f16[23,5]~mask, scale=0.07)
flash_attn_ext(f32[576,{1|3},4]@p0213, {f32|f16|bf16|q8_0}[576,17], $2[512,17]=1+{0|64}, {-|f16[17,3]~mask}, scale=0.04)
flash_attn_ext(f32[64,4,6], {f32|f16|q8_0}[64,17,2], $1[64,17,2], f16[17,4,{1|3|6}]~mask{|@wide}, max_bias={0.0|8.0}, scale=0.125, lse={True|False})
flash_attn_ext(f32[64,5,3], {f32|f16|q4_0}[64,31,3], $1[32,31,3], logit_softcap=10.0, scale=0.5, prec='f32')
flash_attn_ext(f32[32,3,12,4]{|@inner}, f32[32,12,4,4]{|@p0213}, f32[32,12,4,4], f16[12,3,3,2]~mask, max_bias=8.0, scale=0.2, head0={0|4}, n_head=16)
flash_attn_ext(f32[32,3,4], f32[32,14,2], f32[48,14,2], {-|f16[14,3]~mask}, f32[4], {-|i32[1]#9|i32[1]#0}, scale=0.3, lse={True|False})
flash_attn_ext(f32[32,3,4], f32[32,14,2], f32[48,14,2], {-|f16[14,3]~mask}, -, i32[1]#{20|9|0}, scale=0.3, lse={True|False}, kv0={0|8})
flash_attn_ext(f32[40,2,5], f32[40,1,5], f32[24,1,5], scale=0.2)
flash_attn_ext(f32[64,70,2], f16[64,700,1], f16[64,700,1], f16[700,70]~mask, scale=0.2, lse=True)
flash_attn_ext(f32[64,7,{2|4}], {f32|f16|bf16|q8_0}[64,37,2]~holed, $2[64,37,2]~holed, f16[37,7,{1|2}]~holes, scale=0.125, max_bias={0.0|8.0}, lse={True|False})
flash_attn_ext(f32[64,7,2], {f32|f16|q8_0|q4_0}[64,{37|300},1]~ended, $1[64,$2,1]~ended, {-|f16[$2,7]~mask}, -, i32[1]#18, scale=0.125, {logit_softcap=5.0|prec='f32'})
flash_attn_ext(f32[576,{1|3|20|70},4]@p0213, {f32|f16|bf16|q8_0}[576,69]~holed, $2[512,69]=1+{0|64}, f16[69,$1]~holes, scale=0.04)
flash_attn_ext(f32[576,{1|20},4], {f16|q8_0}[576,333]~ended, $2[512,333]=1+64, -, -, i32[1]#167, scale=0.04)
flash_attn_ext(f32[{64|80|96|128|256},{70|6},2], {f16|bf16}[$1,330,2]~holed, $3[$1,330,2]~holed, f16[330,$2]~holes, scale=0.1)
flash_attn_ext(f32[{64|192},130,34], {f16|bf16|q8_0}[$1,150,34]~ended, $2[{64|128},150,34]~ended, {-|f16[150,130]~holes}, -, i32[1]#75, scale=0.1)
flash_attn_ext(f32[40,2,5], f32[40,29,5]~holed, f32[24,29,5]~holed, f16[29,2]~holes, f32[5], scale=0.2)
flash_attn_ext(f32[32,{1|3},2], {f32|f16|bf16}[32,300,1], $2[{1|5},300,1], {-|f16[300,3]~mask}, {-|f32[2]}, scale=0.2, lse={True|False})
flash_attn_ext(f32[32,3,4], f32[32,14,2], f32[48,14,2], {-|f16[14,3]~mask}, f32[4]@apart, i32[1]#9@apart, scale=0.3)
flash_attn_ext(f32[64,3,4], f16[64,300,2], f16[64,300,2], -, f32[4]@apart, i32[1]#200@apart, scale=0.1)
flash_attn_ext(f32[64,{1|9},6], {q8_0|q4_0}[64,70,2], {f16|q4_1|q5_0|q5_1|iq4_nl}[96,70,2], f16[70,9]~mask, scale=0.125)
flash_attn_ext(f32[64,{1|9},6], {q4_1|q5_0|q5_1|iq4_nl}[64,70,2]{|@inner}, {q8_0|q4_0}[96,70,2]{|@p0213}, scale=0.125)
flash_attn_ext(f32[32,2,4], {f32|f16|q8_0}[32,1100,2], $1[32,1100,2], {-|f16[1100,2]~mask}, f32[4], scale=0.2, lse=True)
causal_mask(i32[{1|5|70}]<37{|@apart}, n_kv={37|256}, window={None|1|9})
causal_mask(i32[{1|5|70}]<37{|@apart}, n_kv={9|37}, stride={4|5})
causal_mask(i32[7]#{-2147483648|-1|0|1|2|3|4|254}, n_kv={1|127|256}, stride=128)
causal_mask(i32[7]#2147483646, n_kv=65535, stride=32768)
causal_mask(i32[{1|5}]<1{|@apart}, n_kv=1, window={None|1|9})
causal_mask(i32[{1|5|70}]<37{|@apart}, i32[33]<40{|@apart}, n_kv=33, window={None|1|9})
causal_mask(i32[7]#{-1|37}, i32[5]#{-2147483648|0|1|38}, n_kv=5, window={None|9})
causal_mask(i32[7]#{-2147483648|-1|-2147483600}, n_kv={1|37|256}, window={None|1|9|2147483647})
merge_lse(f32[{2|33},3,5,2]{|@inner}, f32[$1,3,5,2]{|@wide})
flash_attn_ext(f32[32,3,4], f16[32,14,2]{|@weight|@weight@p0213}, f16[48,14,2]{|@weight}, f16[14,3]~mask, f32[4]@weight, scale=0.3)
flash_attn_ext(f32[64,3,4]@far, {f32|f16|q8_0}[64,17{|,2}]@far, $1[64,17$2]@far, f16[17,3]~mask@far, scale=0.3)
merge_lse(f32[33,3,5]@far, f32[33,3,5]@far)
flash_attn_ext(f32[64,5,{1|6}]@p0213, {PLAIN}[64,23,1], $2[48,23,1], {-|f16[23,5]~mask}, -, -, i32[7,5]!23{|-}, scale=0.2, lse={True|False})
flash_attn_ext(f32[32,3,6,4]@inner, {f32|f16|q8_0}[32,40,2,4]@p0213, $1[32,40,2,4]@p0213, f16[40,5,{1|3},{1|2}]~mask@wide, f32[6], {-|i32[1]#30}, i32[9,3,1,4]!40-@inner, scale=0.2, max_bias={0.0|8.0}, kv0=3)
flash_attn_ext(f32[576,{1|3},5]@p0213, {f32|f16|bf16|q8_0}[576,69], $2[512,69]=1+{0|64}, {-|f16[69,3]~causal}, -, -, i32[40,$1]!69-@wide, scale=0.04)
flash_attn_ext(f32[64,7,4], {f32|f16|q8_0}[64,37,2]~holed, $1[64,37,2]~holed, f16[37,7,{1|4}]~holes, -, -, i32[20,7]!37-, scale=0.125, max_bias={0.0|8.0})
flash_attn_ext(f32[64,4,2], {f32|f16|q8_0}[64,300,1]~ended, $1[64,300,1]~ended, -, {-|f32[2]}, i32[1]#150, i32[200,4]!300-, scale=0.125, {logit_softcap=5.0|prec='f32'}, lse={True|False})
flash_attn_ext(f32[32,3,4], f32[32,14,2], f32[48,14,2], {-|f16[14,3]~mask}, {-|f32[4]}, i32[1]#0, i32[{1|5},3]!14@apart, scale=0.3, lse=True)
flash_attn_ext(f32[32,2,4], f32[32,14,2], f32[48,14,2], {-|f16[14,2]~mask}, {-|f32[4]@apart}, -, i32[5,2]{#-1|!14-}, scale=0.3, lse=True)
flash_attn_ext(f32[64,1,{130|3}], {f32|f16|bf16|q5_0}[64,1500,1], $2[96,1500,1], {-|f16[1500,1]~mask}, f32[$1], -, i32[1100,1]!1500-, scale=0.1)
flash_attn_ext(f32[64,3,4]@far, {f32|f16|q8_0}[64,17]@far, $1[64,17]@far, f16[17,3]~mask@far, -, -, i32[6,3]!17-@far, scale=0.3)
flash_attn_ext(f32[64,3,4], {f16|q8_0}[64,17]@weight, $1[64,17]@weight, f16[17,3]~mask, -, -, i32[6,3]!17@weight, scale=0.3)
"""  # noqa: E501

LARGE = """
flash_attn_ext(f32[192,100,16]@p0213, f16[192,700,16], f16[128,700,16], f16[700,100]~mask, scale=0.1)
flash_attn_ext(f32[576,70,16]@p0213, q8_0[576,700], q8_0[512,700]=1+0, f16[700,70]~mask, scale=0.1)
flash_attn_ext(f32[64,1,8], f32[64,9000,2], f32[64,9000,2], -, f32[8], i32[1]#8000, scale=0.1, lse=True)
flash_attn_ext(f32[64,300,6], bf16[64,300,2], f16[64,300,2], f16[300,300,3]~mask, scale=0.1, max_bias=8.0, logit_softcap=9.0)
flash_attn_ext(f32[576,3,16]@p0213, {f16|q8_0}[576,3000], $1[512,3000]=1+0, f16[3000,3]~mask, -, -, i32[2000,3]!3000-, scale=0.1)
flash_attn_ext(f32[64,100,8], f32[64,700,2]@p0213, f32[64,700,2]@p0213, f16[700,100,8]~mask, f32[8], -, i32[300,100]!700, scale=0.1)
causal_mask(i32[700]<900, n_kv=900, window=100)
causal_mask(i32[1]<40000, n_kv=90000)
causal_mask(i32[70]<90000, n_kv=30000, stride=4)
merge_lse(f32[513,16,100], f32[513,16,100]@inner)
"""  # noqa: E501


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
    ids: Array | None = None,
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

    A key is live for a row where the mask is not -inf and kv0 + j < kv_len and, with ids
    [n_ids, n_q, 1, n3], where it is in the row's list. Without live keys the output is 0 and the
    log-sum-exp that of the sink alone: -inf where there is none.
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
        if ids is not None:
            for i, chosen in enumerate(ids[i3, 0]):
                live[i] &= np.isin(np.arange(n_kv), chosen)
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
    pos: Array,
    kv_end: Array | None = None,
    *,
    n_kv: int,
    window: int | None = None,
    stride: int = 1,
) -> Array:
    """[n_kv, T]: 0 where p_j <= pos[i] and, with a window, pos[i] - p_j < window; else -inf. p_j is
    the last of the `stride` positions of row j."""
    at = np.arange(1, n_kv + 1) * stride - 1 if kv_end is None else kv_end.reshape(-1) - 1
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

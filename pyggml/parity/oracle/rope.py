"""Rotary position embedding, in float64: every angle directly, no chain of products."""

from __future__ import annotations

import math

import numpy as np

from pyggml.parity.oracle.base import Array

CASES = """
rope_ext({f32|f16}[64,3,5,2]{|@inner|@p0213}, i32[5]<6000, n_dims={64|20}, mode={'normal'|'neox'})
rope_ext(f32[192,3,5], i32[5]<6000, n_dims=64, mode={'normal'|'neox'}, offset={0|128|2})
rope_ext(f32[64,2,5], i32[5]<6000, n_dims=64, freq_base=500000.0, freq_scale=0.25, attn_factor=1.3)
rope_ext(f32[80,2,5], i32[5]<6000, {-|f32[32]~above|f32[40]~above@wide}, n_dims=40, mode={'normal'|'neox'}, n_ctx_orig={4096|100}, freq_scale=0.025, ext_factor={1.0|0.7465}, attn_factor=0.7305, beta_fast=24.0, beta_slow=2.0)
rope_ext(f32[64,1,1], i32[1]<6000, n_dims=64)
rope_ext({f32|f16}[96,3,5]{|@inner}, i32[5]<6000, n_dims=64, mode={'normal'|'neox'}, offset={0|32}, back=True)
rope_ext(f32[80,2,5], i32[5]<6000, {-|f32[32]~above}, n_dims=40, mode={'normal'|'neox'}, n_ctx_orig=4096, freq_scale={1.0|0.025}, ext_factor={1.0|0.7465}, attn_factor=0.7305, offset=40, back=True)
rope_ext(f32[64,2,5], i32[5]#-2147483648, n_dims=64, back=True)
rope_ext(f32[64,2,9], i32[9]<{160000|2147483647}, n_dims=64, freq_scale={1.0|0.025}, mode={'normal'|'neox'})
rope_ext(f32[64,2,5], i32[5]#-2147483648, {-|f32[32]~above@apart|f32[40]~above@wide}, n_dims=64)
rope_ext({f32|f16}[64,2,5]@apart, i32[5]<6000{|@apart}, {-|f32[32]~above@apart}, n_dims=64, mode={'normal'|'neox'})
rope_ext(f32[80,2,5], i32[5]<6000, f32[40]~above@weight{|@inner}, n_dims=40)
rope_ext(f32[64,2,5]@far, i32[5]<6000, n_dims=64)
"""  # noqa: E501

LARGE = """
rope_ext(f32[192,16,100]@p0213, i32[100]<6000, f32[32]~above, n_dims=64, mode='neox', offset=128)
rope_ext(f16[64,1,5000], i32[5000]<6000, n_dims=64)
rope_ext(f32[40000,2,3], i32[3]<6000, n_dims=40000)
"""


def _ramp(i: int, n_dims: int, base: float, n_ctx: int, fast: float, slow: float) -> float:
    """How far pair i keeps its own angle in YaRN: 1 (fast turning) down to 0 (interpolated)."""

    def dim_of(turns: float) -> float:
        return n_dims * math.log(n_ctx / (2.0 * math.pi * turns)) / (2.0 * math.log(base))

    low = max(0, math.floor(dim_of(fast)))
    high = min(n_dims - 1, math.ceil(dim_of(slow)))
    y = (i - low) / max(0.001, high - low)
    return 1.0 - min(max(y, 0.0), 1.0)


def rope_ext(
    a: Array,
    pos: Array,
    freq_factors: Array | None = None,
    *,
    n_dims: int,
    mode: str = "normal",
    n_ctx_orig: int = 0,
    freq_base: float = 10000.0,
    freq_scale: float = 1.0,
    ext_factor: float = 0.0,
    attn_factor: float = 1.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    offset: int = 0,
    back: bool = False,
) -> Array:
    """a[d, H, T, B], pos[T]: n_dims/2 pairs from element `offset` on turn, the rest is copied."""
    out = a.astype(np.float64)
    magnitude = attn_factor
    if ext_factor != 0.0:
        magnitude *= 1.0 + 0.1 * math.log(1.0 / freq_scale)
    for i in range(n_dims // 2):
        factor = 1.0 if freq_factors is None else float(freq_factors.ravel()[i])
        extrapolated = pos.ravel() * freq_base ** (-2.0 * i / n_dims) / factor
        angle = freq_scale * extrapolated
        if ext_factor != 0.0:
            keep = _ramp(i, n_dims, freq_base, n_ctx_orig, beta_fast, beta_slow) * ext_factor
            angle = angle * (1.0 - keep) + extrapolated * keep
        angle = -angle if back else angle
        cos = magnitude * np.cos(angle)[:, None]  # [T, 1] against [T, H]
        sin = magnitude * np.sin(angle)[:, None]
        pair = {"normal": (2 * i, 2 * i + 1), "neox": (i, i + n_dims // 2)}[mode]
        first, second = (offset + p for p in pair)
        x, y = a[..., first], a[..., second]  # [B, T, H]
        out[..., first] = x * cos - y * sin
        out[..., second] = x * sin + y * cos
    return out

"""Rotary position embedding.

Angles are computed in float64 and reduced to half a turn before they become f32. At position
160,000 an f32 angle is off by 0.01, and ggml's chain of f32 products by more (NMSE of the result
2.7e-6; 9e-5 at 1,000,000). There are far fewer angles than elements, so this costs very little.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pyggml import ops
from pyggml.backends.host_memory import Floats, Raw, Scratch, raw_of
from pyggml.backends.numpy.arrays import codec_bytes, load, store, work_of
from pyggml.backends.numpy.table import kernel
from pyggml.backends.numpy.tiling import PIECE, scratch_bytes, shaped, split
from pyggml.dtypes import F32
from pyggml.node import Node

f32 = np.float32
Doubles = NDArray[np.float64]


def _tokens(n: int, heads: int, tokens: int) -> int:
    """Tokens of a piece."""
    return min(tokens, max(1, PIECE // (n * heads)))


def _rope_scratch(node: Node) -> int:
    n, heads, n_tokens, _ = node.ne
    tokens, n_dims = _tokens(n, heads, n_tokens), node.attrs["n_dims"]
    narrow = node.dtype is not F32
    angles, halves = tokens * n_dims, tokens * heads * n_dims
    size = scratch_bytes(n_dims, 2 * angles, angles, halves, narrow * tokens * heads * n)
    return size + codec_bytes(node["a"])


@kernel(ops.rope_ext, inplace=("a",), scratch=_rope_scratch)
def rope_ext(
    out: Raw,
    a: Raw,
    pos: Raw,
    freq_factors: Raw | None,
    *,
    scratch: Scratch,
    n_dims: int,
    mode: str,
    n_ctx_orig: int,
    freq_base: float,
    freq_scale: float,
    ext_factor: float,
    attn_factor: float,
    beta_fast: float,
    beta_slow: float,
    offset: int,
    back: bool,
) -> None:
    """Copy each piece as f32 to `out` (f16: to scratch) and rotate its pairs in place."""
    n3, n_tokens, heads, n = a.shape
    dtype, pairs = raw_of(a)[0], n_dims // 2
    tokens = _tokens(n, heads, n_tokens)
    frequencies = scratch.array(pairs, np.float64)
    angle, spare = scratch.array((2, tokens * pairs), np.float64)
    turns = scratch.array(tokens * pairs, np.complex64)
    halves = scratch.array(tokens * heads * n_dims)
    work = None
    if dtype is not F32:
        wide, work = scratch.array(tokens * heads * n), work_of(scratch, a)
    factors = None if freq_factors is None else freq_factors[0, 0, 0, :pairs]
    for s in split(pairs, 2048):
        frequencies[s] = freq_base ** (np.arange(s.start, s.stop) * (-2 / n_dims))
    keep = None
    if ext_factor:
        keep = ext_factor * _ramp(pairs, n_dims, freq_base, n_ctx_orig, beta_fast, beta_slow)
        attn_factor *= 1 + 0.1 * math.log(1 / freq_scale)
    for t in split(n_tokens, tokens):
        theta = shaped(angle, t.stop - t.start, pairs)
        work64 = shaped(spare, *theta.shape)
        np.multiply(pos[0, 0, 0, t, None], frequencies, out=theta)
        if factors is not None:
            theta /= factors
        if keep is not None:
            np.multiply(theta, freq_scale, out=work64)
            work64 *= 1 - keep
            theta *= keep
            theta += work64
        else:
            theta *= freq_scale
        _within_half_a_turn(theta, work64)
        turn = shaped(turns, *theta.shape)
        if back:
            np.negative(theta, out=theta)
        narrow = shaped(spare.view(f32), *theta.shape)  # sin and cos are slow on strided numbers
        np.copyto(narrow, theta, casting="same_kind")
        np.cos(narrow, out=turn.real)
        np.sin(narrow, out=turn.imag)
        turn *= f32(attn_factor)
        for i3 in range(n3):
            y = out[i3, t] if dtype is F32 else shaped(wide, *out[i3, t].shape)
            load(dtype, a[i3, t], y, work)
            x = y[..., offset : offset + n_dims]
            if mode == "normal":
                x = x.view(np.complex64)
                x *= turn[:, None]
            else:
                _turn_halves(x, turn[:, None], shaped(halves, 2, *x.shape[:2], pairs))
            if dtype is not F32:
                store(dtype, y, out[i3, t], work)


def _ramp(pairs: int, n_dims: int, base: float, n_ctx: int, fast: float, slow: float) -> Doubles:
    """YaRN: the share of its unscaled angle that each pair keeps; 1 for pairs that turn fast."""

    def pair(beta: float) -> float:
        return n_dims * math.log(n_ctx / (2 * math.pi * beta)) / (2 * math.log(base))

    low, high = max(0, math.floor(pair(fast))), min(n_dims - 1, math.ceil(pair(slow)))
    y = (np.arange(pairs) - low) / max(0.001, high - low)
    share: Doubles = 1 - np.clip(y, 0, 1)
    return share


def _within_half_a_turn(theta: Doubles, spare: Doubles) -> None:
    """theta -= 2 pi rint(theta / 2 pi)"""
    np.divide(theta, 2 * math.pi, out=spare)
    np.rint(spare, out=spare)
    spare *= 2 * math.pi
    theta -= spare


def _turn_halves(x: Floats, turn: Raw, spare: Floats) -> None:
    """Rotate pairs (i, i + n/2) in place: (u, v) -> (u c - v s, u s + v c)."""
    u, v = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    us, vs = spare
    np.multiply(u, turn.imag, out=us)
    np.multiply(v, turn.imag, out=vs)
    u *= turn.real
    u -= vs
    v *= turn.real
    v += us

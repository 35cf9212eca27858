"""Rotary position embedding."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pyggml.arguments import located
from pyggml.errors import ShapeError
from pyggml.node import Node
from pyggml.operation import op
from pyggml.ops.rules import FLOATS, want_finite, want_index, want_ne, want_type
from pyggml.spec import Spec
from pyggml.traits import Axis, Cost, Cut, Slice

__all__ = ["rope", "rope_ext"]

Mode: TypeAlias = Literal["normal", "neox"]


@op
def rope_ext(
    a: Node,
    pos: Node,
    freq_factors: Node | None = None,
    *,
    n_dims: int,
    mode: Mode = "normal",
    n_ctx_orig: int = 0,
    freq_base: float = 10000.0,
    freq_scale: float = 1.0,
    ext_factor: float = 0.0,
    attn_factor: float = 1.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    offset: int = 0,
    back: bool = False,
) -> Spec:
    """Rotate pairs of each row by angles that grow with the position; copy the other elements.

    a, y          f32 or f16  [n, n_head, n_tokens, n3]
    pos           i32         [n_tokens]
    freq_factors  f32         [>= n_dims / 2]

    Pair i = 0 .. n_dims/2 - 1 is (offset + 2i, offset + 2i + 1) in mode "normal", and
    (offset + i, offset + i + n_dims/2) in mode "neox".   (x, z) -> (x c - z s, x s + z c)
    t = pos freq_base^(-2i / n_dims) / freq_factors[i]
    ext_factor = 0:  angle = freq_scale t,                c, s = attn_factor (cos, sin) angle
    else (YaRN):     angle = freq_scale t (1 - r) + t r,  c, s also times 1 + 0.1 ln(1/freq_scale)
      r = ext_factor (1 - clip((i - low) / max(0.001, high - low), 0, 1))
      low, high = floor, ceil of  n_dims ln(n_ctx_orig / (2 pi beta)) / (2 ln freq_base)  for
      beta_fast and beta_slow, limited to 0 .. n_dims - 1
    back: rotates by -angle, so it undoes the rotation if attn_factor and YaRN's factor are 1.
    Sources: ggml's ggml_rope_ext and ggml_rope_ext_back. Angles are f64; ggml's come from a chain
    of f32 products, and are off by 0.002 at position 100,000 (base 10,000) and by more beyond.
    """
    want_type("a", a, FLOATS)
    want_index("pos", pos)
    want_finite(
        freq_base=freq_base, freq_scale=freq_scale, ext_factor=ext_factor, attn_factor=attn_factor
    )
    want_finite(beta_fast=beta_fast, beta_slow=beta_slow)
    want_ne("pos", pos, (a.ne[2], 1, 1, 1), "one for each token")
    if n_dims < 2 or n_dims % 2:
        raise ShapeError(f"n_dims={n_dims} must be even and at least 2")
    if offset < 0 or offset % 2 or offset + n_dims > a.ne[0]:
        raise ShapeError(f"offset={offset} and n_dims={n_dims} do not fit a row of {a.ne[0]}")
    if freq_base <= 1 or freq_scale <= 0:
        raise ShapeError(f"freq_base={freq_base} and freq_scale={freq_scale} must be above 1 and 0")
    if ext_factor and (n_ctx_orig < 1 or beta_fast <= 0 or beta_slow <= 0):
        raise ShapeError(
            f"YaRN needs n_ctx_orig and betas above 0: n_ctx_orig={n_ctx_orig}, "
            f"beta_fast={beta_fast}, beta_slow={beta_slow}"
        )
    if freq_factors is not None:
        want_type("freq_factors", freq_factors, ("f32",))
        if freq_factors.ne[0] < n_dims // 2 or max(freq_factors.ne[1:]) > 1:
            raise ShapeError(
                f"freq_factors {list(freq_factors.ne)} needs one row of at least {n_dims // 2}"
            )
    return a.spec


@rope_ext.cost
def _(node: Node) -> Cost:
    return Cost(6.0 * node.spec.elements, 2.0 * node.spec.nbytes)


@rope_ext.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    if axis not in (1, 2, 3):
        return None
    assert isinstance(axis, int)
    return Slice((Cut(axis), Cut(0) if axis == 2 else None, None))


@located
def rope(
    a: Node,
    pos: Node,
    *,
    n_dims: int | None = None,
    mode: Mode = "normal",
    freq_base: float = 10000.0,
) -> Node:
    """Rotary position embedding without scaling: `rope_ext` with defaults.

    a, y    f32 or f16  [n, n_head, n_tokens, n3]
    pos     i32         [n_tokens]
    n_dims  how many elements of a row are rotated; all by default
    """
    if n_dims is None and isinstance(a, Node):
        n_dims = a.ne[0]
    return rope_ext(a, pos, n_dims=2 if n_dims is None else n_dims, mode=mode, freq_base=freq_base)

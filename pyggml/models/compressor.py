"""Caches of attention over compressed rows: one row stands for several tokens (DeepSeek V4).

A compressor turns windows of r tokens into rows of d numbers. Row b is for the r tokens from
position r b on, and exists as soon as the last of them does. For each token, at position p, there
are v and z, of w numbers:

    v = W_kv x,   z = W_gate x + ape[:, p mod r]
    row = rms_norm(sum_j g_j v_j) norm, rotated at position r b
    g = softmax over j of z_j, for each of the d numbers by itself

plain        w = d; j are the r tokens of the window. r = 128 in V4
overlapping  w = 2 d: v and z are a pair (A, B). j are 2 r candidates: A of the r tokens before the
             window, if there are any, and B of those in it. r = 4 in V4
T is the number of tokens. Source: DeepSeek-V4's inference code, with which llama.cpp and
transformers agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.models.batch import Batch
from pyggml.models.cache import WindowCache, ring_rows
from pyggml.models.layers import linear, norm
from pyggml.models.weights import Layer
from pyggml.node import Node
from pyggml.ops import (
    add,
    cast,
    clamp,
    constant,
    cont,
    div,
    fill,
    get_rows,
    mul,
    permute,
    reshape,
    scale,
    set_rows,
    soft_max,
    state,
    sub,
    sum_rows,
    view,
)

#: What hides a candidate. Unlike -inf, it gives numbers even if every candidate is hidden.
_HIDDEN = -1e30


@dataclass(frozen=True, slots=True)
class Compressor:
    """The states of a compressor.

    rows  [d, n_ctx / r]      compressed rows, of the type of the cache
    v, z  f32 [w, n_ring]     of the last tokens: position p is in row p % n_ring
    most_windows              that end in one batch
    """

    ratio: int
    rows: Node
    v: Node
    z: Node
    most_windows: int

    @property
    def overlapping(self) -> bool:
        return self.v.ne[0] == 2 * self.rows.ne[0]

    @property
    def n_candidates(self) -> int:
        return self.ratio * (1 + self.overlapping)

    def visible(self, n_kv: int) -> int:
        """How many rows there are to read for the first `n_kv` tokens; at least 1."""
        return max(1, n_kv // self.ratio)


def compressor_states(
    il: int,
    name: str,
    n_ctx: int,
    n_batch: int,
    *,
    d: int,
    ratio: int,
    overlapping: bool,
    type: str,
) -> Compressor:
    """States cache_NAME_lIL, cache_NAME_v_lIL and cache_NAME_z_lIL.

    The ring keeps what a window needs besides the tokens of a batch. So if a batch fails half way,
    another one at the same position does not miss anything.
    """
    n_candidates, w = ratio * (1 + overlapping), d * (1 + overlapping)
    n_ring = ring_rows(n_candidates, n_ctx, n_batch)
    return Compressor(
        ratio,
        state(f"cache_{name}_l{il}", type, ne=(d, max(1, n_ctx // ratio))),
        state(f"cache_{name}_v_l{il}", "f32", ne=(w, n_ring)),
        state(f"cache_{name}_z_l{il}", "f32", ne=(w, n_ring)),
        -(-n_batch // ratio),
    )


@dataclass(frozen=True, slots=True)
class CompressedCache(WindowCache):
    """Rows of the last tokens, which are keys and values at once, and the states of compressors.

    states  the window's rows, then `rows`, `v` and `z` of each compressor
    """

    compressors: tuple[Compressor, ...]

    def used(self, n: int) -> tuple[int, ...]:
        counts = [min(n, self.n_rows)]
        for each in self.compressors:
            ring = min(n, each.v.ne[1])
            counts += [min(each.visible(n), each.rows.ne[1]), ring, ring]
        return tuple(counts)

    def reaches(self, n: int, past: int) -> bool:
        """The next window is that of token n; it needs its first candidate, too."""

        def first(each: Compressor) -> int:
            before = each.ratio if each.overlapping else 0
            return max(0, n // each.ratio * each.ratio - before)

        rings = all(past - each.v.ne[1] <= first(each) for each in self.compressors)
        return rings and WindowCache.reaches(self, n, past)


def compressed_cache(window: Node, n_window: int, *compressors: Compressor) -> CompressedCache:
    """The cache of a layer whose window of `n_window` tokens is in the state `window`."""
    states = [state for each in compressors for state in (each.rows, each.v, each.z)]
    return CompressedCache((window, *states), n_window, compressors)


# -- the windows that end in a batch ------------------------------------------------------------


class Windows:
    """Which windows end in a batch, for compressors with equal ratios and rings.

    n_windows = ceil(T / r), the most that can end; those that do not are not written.

    places  i32 [T]            p mod r; -1 for padding
    tokens  i32 [T]            rows of the ring to write; -1 for padding
    starts  i32 [n_windows]    r b
    rows    i32 [n_windows]    b; -1 if the window does not end in the batch
    ids     i32 [n_windows n_candidates]      candidates as rows of [d, n_ring], or of [d, 2 n_ring]
                               if the ring holds pairs; -1 for tokens that do not exist
    bias    f32 [1, n_windows n_candidates]   0, or _HIDDEN for tokens that do not exist
    """

    def __init__(self, batch: Batch, ratio: int, n_ring: int, overlapping: bool, most: int) -> None:
        n = -(-batch.n_tokens // ratio)
        first = cast(view(batch.pos, ne=(1,)), dtype="f32")  # exact below 2^23
        last = cast(view(batch.pos, ne=(1,), start=(batch.n_tokens - 1,)), dtype="f32")
        self.places = batch.modulo(ratio)
        self.tokens = batch.modulo(n_ring)

        before = ratio if overlapping else 0
        t = _candidates_of(ratio, before, n, most)
        t = add(t, scale(_floor_div(first, ratio), s=ratio))
        start = cont(view(t, ne=(n,), start=(before,), step=(ratio + before,)))
        ends = _at_least_0(add(scale(start, s=-1.0, b=1.0 - ratio), last))
        self.starts = cast(start, dtype="i32")
        self.rows = cast(_or_minus_1(scale(start, s=1 / ratio), ends), dtype="i32")

        exists = mul(_at_least_0(t), _at_least_0(add(scale(t, s=-1.0), last)))
        row = sub(t, scale(_floor_div(t, n_ring), s=n_ring))
        if overlapping:
            row = add(scale(row, s=2.0), _second_half(ratio, n, most))
        self.ids = cast(_or_minus_1(row, exists), dtype="i32")
        self.bias = reshape(scale(exists, s=-_HIDDEN, b=_HIDDEN), ne=(1, row.ne[0]))


def windows(batch: Batch, compressor: Compressor) -> Windows:
    """One object for all layers of a kind."""
    key = compressor.ratio, compressor.v.ne[1], compressor.overlapping, compressor.most_windows
    if key not in batch.shared:
        batch.shared[key] = Windows(batch, *key)
    result = batch.shared[key]
    assert isinstance(result, Windows)
    return result


# Both constants are weights of the store. Batches of all lengths take theirs from the longest one,
# so that these weights are known before any batch is.


def _candidates_of(ratio: int, before: int, n: int, most: int) -> Node:
    """The candidates of n windows as positions, if the first window starts at 0."""
    array = np.arange(most)[:, None] * ratio + np.arange(-before, ratio)
    return _first(array, f"candidates {before}+{ratio} {most}", n)


def _second_half(ratio: int, n: int, most: int) -> Node:
    """Of the candidates of n overlapping windows: 0 before the window, and 1 in it."""
    array = np.broadcast_to(np.arange(2 * ratio) >= ratio, (most, 2 * ratio))
    return _first(array, f"halves {ratio} {most}", n)


def _first(array: NDArray[Any], name: str, n: int) -> Node:
    whole = constant(array.astype(np.float32).reshape(-1), name=name)
    return view(whole, ne=(n * array.shape[1],))


def _floor_div(a: Node, n: int) -> Node:
    """floor(a / n) of whole numbers; a negative a gives any number."""
    return cast(cast(div(a, fill(a, value=float(n))), dtype="i32"), dtype="f32")


def _at_least_0(a: Node) -> Node:
    """1 where a whole number is 0 or more, else 0."""
    return clamp(scale(a, s=1.0, b=1.0), min=0.0, max=1.0)


def _or_minus_1(a: Node, condition: Node) -> Node:
    """a where the condition is 1, and -1 where it is 0."""
    return scale(mul(scale(a, s=1.0, b=1.0), condition), s=1.0, b=-1.0)


# -- graphs -------------------------------------------------------------------------------------


def compress(
    layer: Layer,
    x: Node,
    name: str,
    compressor: Compressor,
    batch: Batch,
    rotate: Callable[[Node, Node], Node],
    eps: float,
) -> Node:
    """Add a batch to a compressor, and return its rows, [d, visible(n_kv)].

    x       f32 [n_embd, T]
    name    of the tensors: NAME_kv, NAME_gate, NAME_ape and NAME_norm
    rotate  (rows [d, 1, n], positions) -> rows
    """
    at, d = windows(batch, compressor), compressor.rows.ne[0]
    v = linear(layer, f"{name}_kv", x)
    z = add(linear(layer, f"{name}_gate", x), get_rows(layer[f"{name}_ape"], at.places))
    v = _candidates(compressor, compressor.v, v, at, batch)
    z = add(_candidates(compressor, compressor.z, z, at, batch), at.bias)
    n = compressor.n_candidates
    gates = soft_max(_columns(z, n))
    row = reshape(sum_rows(mul(_columns(v, n), gates)), ne=(d, at.rows.ne[0]))
    row = norm(layer, f"{name}_norm", row, eps)
    row = rotate(reshape(row, ne=(d, 1, at.rows.ne[0])), at.starts)
    handle = set_rows(compressor.rows, reshape(row, ne=(d, at.rows.ne[0])), at.rows)
    batch.writes.append(handle)
    return view(handle, ne=(d, compressor.visible(batch.n_kv)))


def _candidates(compressor: Compressor, ring: Node, new: Node, at: Windows, batch: Batch) -> Node:
    """Write new rows to a ring, and return the candidates of the windows, f32 [d, n]."""
    handle = set_rows(ring, new, at.tokens)
    batch.writes.append(handle)
    d = compressor.rows.ne[0]
    return get_rows(reshape(handle, ne=(d, ring.spec.elements // d)), at.ids)


def _columns(a: Node, n: int) -> Node:
    """[d, n n_windows] -> [n, d, n_windows]."""
    return cont(permute(reshape(a, ne=(a.ne[0], n, a.ne[1] // n)), axes=(1, 0, 2)))

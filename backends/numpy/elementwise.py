"""Element by element: one NumPy call if NumPy has the function, else pieces that fit the cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from pyggml import ops
from pyggml.backends.host_memory import Floats, Raw, Scratch, raw_of
from pyggml.backends.numpy.arrays import codec_bytes, decoded, work_of
from pyggml.backends.numpy.gather import gather
from pyggml.backends.numpy.table import kernel
from pyggml.backends.numpy.tiling import PIECE, pieces, scratch_bytes, shaped
from pyggml.dtypes import F32
from pyggml.node import Node

#: Elements of a piece whose flags NumPy allocates.
FLAGS = 1 << 15
#: fn(y, x, t) computes y from x with a temporary t; y may be x.
Unary = Callable[[Floats, Floats, Floats], object]


def _sigmoid(y: Floats, x: Floats, t: Floats) -> None:
    np.negative(x, out=t)
    np.exp(t, out=t)
    t += 1
    np.reciprocal(t, out=y)


def _silu(y: Floats, x: Floats, t: Floats) -> None:
    np.negative(x, out=t)
    np.exp(t, out=t)
    t += 1
    np.divide(x, t, out=y)


def _gelu(y: Floats, x: Floats, t: Floats) -> None:
    np.multiply(x, x, out=t)
    t *= 0.044715
    t += 1
    t *= x
    t *= math.sqrt(2 / math.pi)
    np.tanh(t, out=t)
    t += 1
    t *= 0.5
    np.multiply(x, t, out=y)


def _softplus(y: Floats, x: Floats, t: Floats) -> None:
    """max(x, 0) + ln(1 + e^-|x|)"""
    np.abs(x, out=t)
    np.negative(t, out=t)
    np.exp(t, out=t)
    np.log1p(t, out=t)
    np.maximum(x, 0, out=y)
    y += t


def _relu(y: Floats, x: Floats, t: Floats) -> None:
    np.maximum(x, 0, out=y)


ACTIVATIONS: dict[str, Unary] = {"silu": _silu, "gelu": _gelu, "relu": _relu}


def limit_gate(x: Floats, g: Floats, limit: float | None) -> None:
    """Limit the operands of a gated unit in place, before the activation of x."""
    if limit is not None:
        np.minimum(x, np.float32(limit), out=x)
        np.clip(g, np.float32(-limit), np.float32(limit), out=g)


def piece_scratch(temporaries: int) -> Callable[[Node], int]:
    """Scratch of `in_pieces`. For f16, each operand and the result need one more array."""

    def scratch(node: Node) -> int:
        size = min(PIECE, node.spec.elements)
        narrow = 0 if node.dtype.name == "f32" else 1 + sum(s is not None for s in node.src) + 1
        return scratch_bytes(*(size,) * (temporaries + narrow)) + codec_bytes(*node.src)

    return scratch


def in_pieces(
    fn: Callable[..., object], out: Raw, *sources: Raw, scratch: Scratch, temporaries: int
) -> None:
    """Call fn(y, *xs, *temporaries) in f32 on pieces of `out` and `sources`, all of one shape."""
    size = min(PIECE, out.size)
    spare = [scratch.array(size) for _ in range(temporaries)]
    wide = out.dtype == np.float32
    narrow = [] if wide else [scratch.array(size) for _ in (out, *sources)]
    work = None if wide else work_of(scratch, *sources)
    for index in pieces(out.shape, PIECE):
        target, xs = out[index], [s[index] for s in sources]
        temps = [shaped(s, *target.shape) for s in spare]
        if wide:
            fn(target, *xs, *temps)
            continue
        y = shaped(narrow[0], *target.shape)
        xs = [decoded(raw_of(x)[0], x, memory, work) for x, memory in zip(xs, narrow[1:])]
        fn(y, *xs, *temps)
        np.copyto(target, y, casting="unsafe")


def _unary(out: Raw, a: Raw, *, scratch: Scratch, fn: Unary) -> None:
    in_pieces(fn, out, a, scratch=scratch, temporaries=1)


def _one_call(out: Raw, a: Raw, *, fn: Any) -> None:
    fn(a, out=out)


for _op, _composed in {
    ops.sigmoid: _sigmoid,
    ops.silu: _silu,
    ops.gelu: _gelu,
    ops.softplus: _softplus,
}.items():
    kernel(_op, inplace=("a",), scratch=piece_scratch(1))(partial(_unary, fn=_composed))

# These NumPy functions compute f16 in f32.
for _op, _fn in {
    ops.exp: np.exp,
    ops.log: np.log,
    ops.sqr: np.square,
    ops.sqrt: np.sqrt,
    ops.tanh: np.tanh,
}.items():
    kernel(_op, inplace=("a",))(partial(_one_call, fn=_fn))


@kernel(ops.relu, inplace=("a",))
def relu(out: Raw, a: Raw) -> None:
    np.maximum(a, 0, out=out)


def tiles(a: Raw, b_shape: tuple[int, ...]) -> Raw:
    """A view of `a` with each axis split in two. An array of `b_shape` broadcasts to it if its axes
    are split in the same way."""
    sizes = [n for m, b in zip(a.shape, b_shape) for n in (m // b, b)]
    return a.reshape(sizes)


def _binary(out: Raw, a: Raw, b: Raw, *, fn: Any) -> None:
    if any(1 < n < m for m, n in zip(a.shape, b.shape)):
        a, out, b = tiles(a, b.shape), tiles(out, b.shape), tiles(b, b.shape)
    fn(a, b, out=out)


for _pair, _ufunc in {
    ops.add: np.add,
    ops.sub: np.subtract,
    ops.mul: np.multiply,
    ops.div: np.divide,
}.items():
    kernel(_pair, inplace=("a",))(partial(_binary, fn=_ufunc))


@kernel(ops.add_mask, inplace=("a",))
def add_mask(out: Raw, a: Raw, b: Raw) -> None:
    a, out, b = tiles(a, b.shape), tiles(out, b.shape), tiles(b, b.shape)
    whole = np.broadcast_to(b, out.shape)
    for index in pieces(out.shape, FLAGS):
        y, bias = out[index], whole[index]
        np.add(a[index], bias, out=y)
        np.copyto(y, bias, where=bias == -np.inf)


@kernel(ops.scale, inplace=("a",), scratch=piece_scratch(0))
def scale(out: Raw, a: Raw, *, scratch: Scratch, s: float, b: float) -> None:
    def fn(y: Floats, x: Floats) -> None:
        np.multiply(x, np.float32(s), out=y)
        if b:
            y += np.float32(b)

    in_pieces(fn, out, a, scratch=scratch, temporaries=0)


@kernel(ops.clamp, inplace=("a",), scratch=piece_scratch(0))
def clamp(out: Raw, a: Raw, *, scratch: Scratch, min: float, max: float) -> None:
    def fn(y: Floats, x: Floats) -> None:
        np.clip(x, np.float32(min), np.float32(max), out=y)

    in_pieces(fn, out, a, scratch=scratch, temporaries=0)


@kernel(ops.fill, inplace=("a",))
def fill(out: Raw, a: Raw, *, value: float) -> None:
    out[...] = np.float32(value)


@kernel(ops.glu, inplace=(), scratch=piece_scratch(1))
def glu(
    out: Raw,
    a: Raw,
    b: Raw | None,
    *,
    scratch: Scratch,
    act: str,
    swapped: bool,
    limit: float | None,
) -> None:
    half = out.shape[3]
    x, g = (a, b) if b is not None else (a[..., :half], a[..., half:])
    if swapped:
        x, g = g, x
    activate = ACTIVATIONS[act]

    def fn(y: Floats, x: Floats, g: Floats, t: Floats) -> None:
        if limit is None:
            activate(t, x, t)
            np.multiply(t, g, out=y)
            return
        np.minimum(x, np.float32(limit), out=y)
        activate(t, y, t)
        np.clip(g, np.float32(-limit), np.float32(limit), out=y)
        y *= t

    in_pieces(fn, out, x, g, scratch=scratch, temporaries=1)


@kernel(ops.add_id)
def add_id(out: Raw, a: Raw, b: Raw, ids: Raw) -> None:
    for slot in range(ids.shape[3]):
        gather(F32, b[0, 0], (ids[0, 0, :, slot],), out[0, :, slot], None)
    out += a

"""Element by element, in float64; `b` repeats into `a`."""

from __future__ import annotations

import numpy as np

from pyggml.parity.oracle import base
from pyggml.parity.oracle.base import Array, activate, gate, rows_at, tiled

CASES = """
{BINARY}({f32|f16}[37,5,3,2], $2[{37,5,3,2|37|1,5|1,1,3,2|1|37,5,1,2}])
{BINARY}(f32[12,6,4,2]{LAYOUTS}, f32[4,3,1,2]{@wide||@p0213})
add({i32|i64}[33,5]<1000, $1[{33|33,5|11}]<1000-)
div(f32[16,3], f32[16,3]~wild)
add_mask({f32|f16}[37,5,2]{|~wild}{|@inner}, $1[{37,5,2|37,5|37,1,2}]~mask{|@wide})
add_mask({f32|f16}[12,6]~wild, $1[{12|1|4},{6|2}]~wild)
scale({f32|f16}[{37,5|64|1|33,2,3,2}], s=-1.7, b=0.3)
scale(f32[64,5]{LAYOUTS}, s={2.0|0.0})
clamp({f32|f16}[37,5]{|~wild}, min={-0.5|-inf}, max=0.25)
fill({f32|f16}[37,5]~wild, value=-3.5)
{UNARY}({f32|f16}[{37,5|1|64,3,2,2}]{|@inner|@p1032})
{exp|log|sqr|sqrt|tanh|relu|sigmoid|softplus}(f32[64,5]~wild)
softplus(f32[{64,5|37}]~{deep|large})
{log|sqrt}({f32|f16}[37,5,3]~above{|@wide|@p1032})
glu({f32|f16}[26,7,2]{|@inner|@p0213}, act={'silu'|'gelu'|'relu'}, swapped={True|False})
glu(f32[26,7]{|@wide}, f32[26,7]{|@step}, act={'silu'|'gelu'|'relu'})
glu({f32|f16}[26,7,2]{|@inner}, act={'silu'|'gelu'|'relu'}, swapped={True|False}, limit=0.5)
glu({f32|f16}[26,7], $1[26,7]{|~nan}, limit={0.3|10.0})
glu(f32[26,7]~wild, limit=1.5)
add_id(f32[10,3,4]@apart, f32[10,5]@apart, i32[3,4]<5-@apart)
{add|mul}({f32|f16}[64,5]{|@apart}, $2[{64|64,5}]@apart)
{silu|exp}({f32|f16}[64,5]@apart)
add_id(f32[10,3,4]{|@inner|@p0213}, f32[10,5]{|@wide}, i32[3,4]<5-{|@wide})
{BINARY}(f32[64,5,2], f32[{64|64,5}]@weight{|@wide})
add_id(f32[10,3,4], f32[10,5]@weight{|@wide}, i32[3,4]<5-)
{add|mul}(f32[37,5]@far, f32[37,5]@far)
silu({f32|f16}[64,5,2]@far)
glu(f32[26,7]@far)
add_id(f32[10,3,4]@far, f32[10,5]@far, i32[3,4]<5-@far)
"""

LARGE = """
add(f32[512,300], f32[512])
{BINARY}(f16[300,200,3]@inner, f16[300,200,3]@p1032)
mul(f32[512,60,4], f32[64,30,2]@wide)
div(f32[512,300], f32[1,300])
scale(f16[512,300]@inner, s=2.0)
scale(f32[512,300]@p1032, s=2.0, b=1.0)
clamp(f16[200000], min=0.0, max=1.0)
fill(f32[200000], value=1.0)
{UNARY}({f32[200000]|f32[512,300]@p1032|f16[512,300]@inner})
{log|sqrt}({f32|f16}[200000]~above)
glu(f32[512,300])
glu(f16[40000,4], act='gelu', swapped=True)
glu(f32[512,300], f32[512,300], limit=0.5)
add_id(f32[512,6,70], f32[512,8], i32[6,70]<8-)
"""


def add(a: Array, b: Array) -> Array:
    return np.add(a, tiled(b, a.shape))


def sub(a: Array, b: Array) -> Array:
    return np.subtract(a, tiled(b, a.shape))


def mul(a: Array, b: Array) -> Array:
    return np.multiply(a, tiled(b, a.shape))


def div(a: Array, b: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(a, tiled(b, a.shape))


def add_mask(a: Array, b: Array) -> Array:
    """a + b, but -inf where b is -inf."""
    b = tiled(b, a.shape)
    return np.where(b == -np.inf, b, a + b)


def add_id(a: Array, b: Array, ids: Array) -> Array:
    """a[n, u, T] + b[n, ids[u, T]]."""
    return a + rows_at(b[0, 0], ids[0, 0])


def scale(a: Array, *, s: float, b: float = 0.0) -> Array:
    return a * s + b


def exp(a: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.exp(a)


def log(a: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(a)


def relu(a: Array) -> Array:
    return activate("relu", a)


def gelu(a: Array) -> Array:
    return activate("gelu", a)


def silu(a: Array) -> Array:
    return activate("silu", a)


def sigmoid(a: Array) -> Array:
    return base.sigmoid(a)


def softplus(a: Array) -> Array:
    return np.logaddexp(a, 0.0)


def tanh(a: Array) -> Array:
    return np.tanh(a)


def sqr(a: Array) -> Array:
    return a * a


def sqrt(a: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return np.sqrt(a)


def clamp(a: Array, *, min: float, max: float) -> Array:
    return np.minimum(np.maximum(a, min), max)


def fill(a: Array, *, value: float) -> Array:
    return np.full(a.shape, value)


def glu(
    a: Array,
    b: Array | None = None,
    *,
    act: str = "silu",
    swapped: bool = False,
    limit: float | None = None,
) -> Array:
    """act(first) * second: a and b, or the halves of a's rows; `swapped` exchanges the two."""
    if b is None:
        half = a.shape[3] // 2
        a, b = a[..., :half], a[..., half:]
    if swapped:
        a, b = b, a
    return gate(act, a, b, limit)

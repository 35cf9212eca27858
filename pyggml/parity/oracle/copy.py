"""Ops that move values, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyggml.parity.oracle.base import Array, reversed_ne, rows_at, tiled

CASES = """
reshape(f32[12,5,2], ne={(24,5)|(5,2,12)|(2,2,6,5)|(120,)})
reshape(q4_0[64,6], ne=(64,2,3))
view(f32[12,5,3,2]{|@p2013}, ne=(5,2,2,1), start=(3,1,0,1), step=(2,2,1,1))
view(q8_0[128,6], ne=(64,3,1,1), start=(32,1,0,0), step=(1,2,1,1))
permute(f32[7,5,3,2]{|@inner}, axes={(0,1,2,3)|(1,0,2,3)|(3,0,1,2)|(2,3,1,0)})
permute(q4_0[32,5,3,2], axes=(0,3,1,2))
transpose({f32|f16|bf16|i32}[7,5,3])
cont({f32|f16|bf16}[7,5,3,2]{LAYOUTS})
cont({i32|i64}[7,5,3,2]<99-{@p3210|@step})
cont({q8_0|q4_K|iq2_xs}[256,5,3]{@wide|@inner|@step|@p0213})
cast({f32|f16|bf16}[37,5,2]{|@wide|@p1032}, dtype={'f32'|'f16'|'bf16'})
cast({f32|f16|bf16|q8_0}[64,5,2]{|@wide|@p0213}, dtype={'q8_0'|'q4_0'|'q4_1'|'q5_0'})
cast({f32|f16|bf16|q8_0}[64,5,2]{|@wide|@p0213}, dtype={'q5_1'|'iq4_nl'})
cast({f16|bf16}[513,2], dtype={'f16'|'bf16'|'f32'})
cast({f16|q8_0|q5_1}[544,2]{|@wide}, dtype={'bf16'|'q4_0'|'q5_1'})
cast({BLOCKS}[512,3]{|@inner|~wild}, dtype='f32')
cast({q8_0|q6_K}[256,3], dtype={'f16'|'bf16'})
cast(f32[33,4]~ties{|@p1032}, dtype={'i32'|'i64'})
cast({i32|i64}[33,4]<99-{|@step}, dtype={'f32'|'i32'|'i64'})
concat({f32|f16|i32}[5,4,3,2]{|@inner|@p3210}, $1[5,4,3,2], dim={0|1|2|3})
concat({q8_0|q4_K|bf16}[256,3,2], $1[256,3,2], dim={0|1|2|3})
concat(f32[1,7], f32[6,7], dim=0)
repeat({f32|f16|bf16}[5,1,3,2]{|@inner|@p1032}, ne=(10,4,3,4))
repeat(i32[5,3]<9, ne=(5,3,2,2))
get_rows({PLAIN}[37,9,3,2]{|@inner|@p0213}, i32[7,3,2]<9-{|@wide})
get_rows({BLOCKS}[256,9], i32[5]<9)
get_rows({q8_0|q4_K}[256,9,3,2]{@inner|@p0213}, i32[4,3,2]<9-)
get_rows(i32[7,9]<99-, i32[5]<9-)
get_rows({f32|f16}[64,9]@apart, i32[5]<9-@apart)
set_rows({f32|f16}[64,9]@apart, f32[64,5]@apart, {i32|i64}[5]!9@apart)
cast({f32|f16}[64,5]@apart, dtype={'f16'|'bf16'|'q8_0'})
cpy({f32|f16|bf16}[64,5]@apart, {f16|f32|bf16}[64,5]{|@apart})
cpy(f16[64,2000], bf16[128000])
cpy(bf16[1,70000], f16[70000])
cpy({f16|bf16}[64,2000]@step, f32[128000])
set_rows({PLAIN}[64,8,4,3]{|@inner|@p0213}, {f32|f16}[64,3,4,3]{|@wide}, {i32|i64}[3,{4|2|1},3]!8)
set_rows({q8_0|q4_0|iq4_nl}[64,8,2]{|@inner}, f32[64,3,2]{|@p0213}, i32[3,1]!8)
set_rows({q4_1|q5_0|q5_1}[64,8,2], {f32|f16}[64,3,2], i32[3,1]!8-)
set_rows(f32[37,9], f32[37,5], i32[5]!9{|@step})
set_rows({i32|i64}[5,9]<99, $1[5,4]<99, {i32|i64}[4]!9)
cpy({PLAIN}[12,10]{|@p1032}, {PLAIN}[{12,10|6,5,4|20,6}]{|@inner|@p1032})
cpy({f32|q8_0}[64,6]{|@wide}, {q8_0|q4_0|f16}[64,3,2]{|@inner})
cpy(i32[7,5]<99-, {i32|i64|f32}[5,7]{|@step})
get_rows({PLAIN|BLOCKS}[256,9]@weight, i32[5]<9-)
get_rows({f32|q8_0|q4_K}[256,9,3]@weight{@inner|@p0213}, i32[4,3]<9-{|@weight})
get_rows({q8_0|q4_K}[256,37,2]@weight, i32[9,2]<37-)
cast({PLAIN|q8_0|q4_K}[256,6]@weight{|@inner}, dtype={'f32'|'f16'})
cont({f32|f16}[7,5,3]@weight@{inner|p1032})
cont({q8_0|q4_K}[256,5,3]@weight@{inner|p0213})
concat({f32|q8_0}[256,3,2]@weight, $1[256,{2|3},2]{|@weight@inner}, dim=1)
repeat(f32[5,1,3]@weight, ne=(10,4,3))
set_rows({f32|q8_0}[64,8], f32[64,3]@weight{|@wide}, i32[3]!8{|@weight})
cpy(f32[12,10]@weight{|@p1032}, f16[12,10])
cont({f32|f16|i32|q8_0}[64,5,3]<99@far)
cast({f32|q4_0}[64,5]@far, dtype='f16')
concat(f32[64,3]@far, f32[64,2]@far, dim=1)
repeat(f32[5,3]@far, ne=(10,6))
get_rows({f32|q8_0}[64,9{|,3}]@far, i32[4$2]<9-)
set_rows({f32|f16|q8_0}[64,8]@far, f32[64,3]@far, i32[3]!8)
cpy(f32[12,10]@far, f16[12,10]@far)
"""

LARGE = """
reshape(f32[512,300], ne=(300,512))
view(f32[512,300], ne=(256,300,1,1), start=(256,0,0,0), step=(1,1,1,1))
permute(f32[512,300], axes=(1,0,2,3))
transpose(f32[512,300])
cont(f32[300,512]@p1032)
cont(q4_K[1024,300]@wide)
cast(f32[300,512]@p1032, dtype='f16')
cast(f16[512,300], dtype='bf16')
cast(q4_K[1024,300]@wide, dtype='f32')
cast(iq2_xs[1024,300], dtype='f16')
cast(f32[512,300]@inner, dtype='q8_0')
cast(f32[40960,3], dtype='iq4_nl')
cast(f32[200000]~ties, dtype='i32')
cpy(f32[512,300]@p1032, f16[300,512])
cpy(f32[512,300], q8_0[512,300]@inner)
cpy(f32[512,60]@p1032, f32[60,512]@p1032)
concat(f32[512,300], f32[512,200], dim=1)
concat(q8_0[512,300]@wide, q8_0[512,300], dim=0)
repeat(f32[512,30], ne=(1024,300))
get_rows(q4_K[1024,900], i32[700]<900-)
get_rows(f32[40000,9], i32[5]<9-)
get_rows(f16[64,20000], i32[20000]<20000)
set_rows(f16[512,900], f32[512,700], i32[700]!900)
set_rows(q8_0[40960,9], f32[40960,5], i32[5]!9)
set_rows(f32[64,20000], f32[64,20000], i64[20000]!20000)
"""


def reshape(a: Array, *, ne: Sequence[int]) -> Array:
    return a.reshape(reversed_ne(ne))


def view(a: Array, *, ne: Sequence[int], start: Sequence[int], step: Sequence[int]) -> Array:
    """Per dimension `ne` elements from `start`, `step` apart."""
    for dim, (n, first, by) in enumerate(zip(ne, start, step, strict=True)):
        a = np.take(a, first + by * np.arange(n), axis=3 - dim)
    return a


def permute(a: Array, *, axes: Sequence[int]) -> Array:
    """Source dimension i becomes result dimension axes[i]."""
    source_of = [list(axes).index(dim) for dim in range(4)]
    return a.transpose([3 - source_of[dim] for dim in (3, 2, 1, 0)])


def transpose(a: Array) -> Array:
    return a.swapaxes(2, 3)


def cont(a: Array, *, ne: Sequence[int] | None = None) -> Array:
    return a if ne is None else a.reshape(reversed_ne(ne))


def _bf16(a: Array) -> Array:
    """Nearest value of 8 significant bits, ties to even, subnormals as in f32's range."""
    with np.errstate(over="ignore", invalid="ignore"):
        _, exponent = np.frexp(a)
        unit = np.ldexp(1.0, np.maximum(exponent, -125) - 8)
        rounded = np.where(np.isfinite(a), np.rint(a / unit) * unit, a)
        return np.where(np.abs(rounded) >= 2.0**128, np.copysign(np.inf, a), rounded)


def cast(a: Array, *, dtype: object) -> Array:
    """`a` rounded to f32, f16, bf16 or truncated to an integer type.

    Block types are left as they are: what they lose is a bound (tolerance.STORAGE), not a value.
    """
    name = str(dtype)
    if name in ("i32", "i64"):
        return a.astype(np.int64)
    values = a.astype(np.float64)
    with np.errstate(over="ignore"):
        if name == "f16":
            # First to f32, because engines compute the value in f32 before they store it.
            return values.astype(np.float32).astype(np.float16).astype(np.float64)
        if name == "f32":
            return values.astype(np.float32).astype(np.float64)
    return _bf16(values) if name == "bf16" else values


def cpy(a: Array, b: Array) -> Array:
    """a's elements in its order, in b's shape; b's type is unknown here and rounds nothing."""
    return a.reshape(b.shape)


def concat(a: Array, b: Array, *, dim: int) -> Array:
    return np.concatenate([a, b], axis=3 - dim)


def repeat(a: Array, *, ne: Sequence[int]) -> Array:
    return tiled(a, reversed_ne(ne))


def get_rows(a: Array, ids: Array) -> Array:
    """a[n, R, ne2, ne3], ids[r, ne2, ne3] -> [n, r, ne2, ne3]."""
    n3, n2, _, n = a.shape
    out = np.zeros((n3, n2, ids.shape[3], n), a.dtype)
    for i3, i2 in np.ndindex(n3, n2):
        out[i3, i2] = rows_at(a[i3, i2], ids[0, i3, i2])
    return out


def set_rows(a: Array, b: Array, ids: Array) -> Array:
    """a[n, R, ne2, ne3] with b[:, r, i2, i3] at row ids[r, i2 % c1, i3 % c2], if not negative."""
    out = a.copy()
    for i3, i2, r in np.ndindex(b.shape[:3]):
        row = ids[0, i3 % ids.shape[1], i2 % ids.shape[2], r]
        if row >= 0:
            out[i3, i2, row] = b[i3, i2, r]
    return out

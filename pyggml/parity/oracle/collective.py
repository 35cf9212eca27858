"""Collectives in float64: what one device gets from the parts of all."""

from __future__ import annotations

import numpy as np

from pyggml.parity.oracle.attention import merge_lse
from pyggml.parity.oracle.base import Array

CASES = """
all_reduce({f32|f16}[33,7,2]{|@inner|@p0213}, $1[33,7,2]{|@wide}, rank={0|1})
all_reduce({f32|f16}[16,5]{|@step}, $1[16,5], $1[16,5]@wide, $1[16,5], rank=2)
all_reduce(f32[{1|700},3], op='sum')
all_reduce(f32[{2|65},4,7,2]{|@inner}, f32[$1,4,7,2]{|@p0213}, op='lse')
all_reduce(f32[65,4,3], f32[65,4,3], f32[65,4,3]@wide, op='lse', rank=1)
all_gather({f32|f16|bf16|i32}[5,4,3]<9{|@inner}, $1[5,2,3]<9, $1[5,4,3]<9{|@wide}, dim=1, rank={0|2})
all_gather({f32|q8_0|q4_K}[256,3,2], $1[512,3,2]{|@step}, dim=0)
all_gather({f32|q8_0|q4_K}[256,3,2]{|@wide}, $1[256,3,1], $1[256,3,2], dim=2, rank=1)
all_gather(f32[7,3,2,2], f32[7,3,2,1], dim=3)
all_gather(f32[7,3], dim=0)
reduce_scatter({f32|f16}[33,7,2]{|@inner|@p0213}, $1[33,7,2]{|@wide}, dim=1, sizes=(3,4), rank={0|1})
reduce_scatter(f32[64,5], f32[64,5], f32[64,5]@step, dim=0, sizes=(32,8,24), rank={0|1|2})
reduce_scatter(f32[8,6,2], f32[8,6,2], dim=2, sizes=(1,1), rank=1)
broadcast({f32|f16|i32}[33,7]<9{|@inner|@p1032}, rank={0|3})
broadcast({q8_0|q4_K}[256,3]{|@wide})
all_reduce(f32[33,7]@far, f32[33,7]@far)
all_gather(f32[33,7]@far, f32[33,7]@far, dim=1)
reduce_scatter(f32[33,7]@far, f32[33,7]@far, dim=0, sizes=(30,3))
broadcast(f32[33,7]@far)
all_reduce(f32[33,7]@weight, f32[33,7]@weight@inner)
all_gather(f32[33,7]@weight, f32[33,7]@weight@wide, dim=1)
"""  # noqa: E501

LARGE = """
all_reduce(f32[2000,300], f32[2000,300], f32[2000,300])
all_reduce(f32[513,16,200], f32[513,16,200], op='lse')
all_gather(f32[2000,300], f32[2000,300], dim=0)
reduce_scatter(f32[2000,300], f32[2000,300], dim=1, sizes=(200,100))
broadcast(f32[2000,300])
"""


def all_reduce(*parts: Array, op: str = "sum", rank: int = 0) -> Array:
    if op == "sum":
        return np.asarray(np.sum(parts, axis=0))
    merged = parts[0]
    for part in parts[1:]:
        merged = merge_lse(merged, part)
    empty = np.isneginf(merged[..., -1:])
    return np.where(empty, 0.0, merged[..., :-1])


def all_gather(*parts: Array, dim: int, rank: int = 0) -> Array:
    return np.concatenate(parts, axis=3 - dim)


def reduce_scatter(*parts: Array, dim: int, sizes: tuple[int, ...], rank: int = 0) -> Array:
    ends = np.cumsum(sizes)[:-1]
    return np.split(np.sum(parts, axis=0), ends, axis=3 - dim)[rank]


def broadcast(a: Array, *, rank: int = 0) -> Array:
    return a

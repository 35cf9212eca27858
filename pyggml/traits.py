"""Properties of ops: costs, how results are cut into pieces, which operand holds ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

#: A dimension of a result, or the name of a reduction.
Axis: TypeAlias = int | str


@dataclass(frozen=True, slots=True)
class Cost:
    """The least work of a node.

    flops   floating-point operations
    nbytes  bytes read and written once
    sent    bytes that the device sends to others
    """

    flops: float
    nbytes: float
    sent: float = 0.0


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a source that a piece of the result reads: along `axis`, from f(start) on.

    f(i) = (i * mul // div) % mod + add   (no modulo if mod is 0)
    A piece of n elements reads max(1, n * mul // div), at most mod.
    """

    axis: int
    mul: int = 1
    div: int = 1
    mod: int = 0
    add: int = 0


@dataclass(frozen=True, slots=True)
class Slice:
    """How a piece of a result is computed from pieces of its sources.

    cuts   one per source: a Cut, or None for the whole source
    attrs  attributes that differ in a piece of this extent
    shift  attributes that grow by this much per element of the piece's start
    merge  None: pieces are parts of the result; "sum" or "lse": partial results to be merged
    """

    cuts: tuple[Cut | None, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    shift: Mapping[str, int] = field(default_factory=dict)
    merge: str | None = None


@dataclass(frozen=True, slots=True)
class Ids:
    """`operand` holds ids that choose along dimension `axis` of the operand `of`."""

    operand: str
    of: str
    axis: int

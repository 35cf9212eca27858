"""A wrong kernel of the cpu backend, as text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CpuMutant:
    """A mistake: `old`, which must be once in a module, becomes `new`.

    ops    the ops whose cases must notice
    type   only cases with a tensor of this type; empty: those of f32 and f16 come first
    """

    module: str
    ops: tuple[str, ...]
    what: str
    old: str
    new: str
    type: str = ""


def of(module: str, ops: tuple[str, ...], *rows: tuple[str, ...]) -> tuple[CpuMutant, ...]:
    """Rows: what, old, new and perhaps a type."""
    return tuple(CpuMutant(module, ops, *row) for row in rows)

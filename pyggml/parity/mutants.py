"""Wrong kernels, and how one is said in a line: the right kernel with something done to it.

A mutant is `fn(right, out, *sources, **attributes)`: the right kernel is given other sources or
attributes, or its result is spoilt. `hunt` runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

Wrong = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Mutant:
    """A mistake in the kernel of `op`, in words and as a function."""

    op: str
    what: str
    run: Wrong


def maker(found: list[Mutant]) -> Callable[[str, str], Callable[[Wrong], Wrong]]:
    """A decorator `@mutant(op, what)` that collects into `found`."""

    def mutant(op: str, what: str) -> Callable[[Wrong], Wrong]:
        def keep(run: Wrong) -> Wrong:
            found.append(Mutant(op, what, run))
            return run

        return keep

    return mutant


def changed(**attrs: Any) -> Wrong:
    """The right kernel with other attributes; a function is given the old value."""

    def run(right: Wrong, out: Any, *sources: Any, **given: Any) -> None:
        new = {k: v(given[k]) if callable(v) else v for k, v in attrs.items()}
        right(out, *sources, **{**given, **new})

    return run


def instead(index: int, fn: Callable[[Any], Any]) -> Wrong:
    """The right kernel with fn(array) for source `index`, where that is an array."""

    def run(right: Wrong, out: Any, *sources: Any, **attrs: Any) -> None:
        given = list(sources)
        if isinstance(given[index], np.ndarray):
            given[index] = fn(given[index])
        right(out, *given, **attrs)

    return run


def without(index: int) -> Wrong:
    """The right kernel without an optional source."""

    def run(right: Wrong, out: Any, *sources: Any, **attrs: Any) -> None:
        right(out, *[None if i == index else s for i, s in enumerate(sources)], **attrs)

    return run


def then(spoil: Callable[[Any], None]) -> Wrong:
    """The right kernel, and then something else done to its result, where that is an array."""

    def run(right: Wrong, out: Any, *sources: Any, **attrs: Any) -> None:
        if isinstance(out, np.ndarray):
            right(out, *sources, **attrs)
            spoil(out)
        else:
            right(out, *sources, **attrs)

    return run


def stretched(a: Any, shape: tuple[int, ...]) -> Any:
    """`a` repeated to a shape with each element beside itself: index i // r, not i modulo size."""
    for axis, size in enumerate(shape):
        a = np.repeat(a, size // a.shape[axis], axis=axis)
    return a


def unstrided(a: Any) -> Any:
    """The memory that `a` begins in, read as if `a` were contiguous (never past its end)."""
    strides = np.empty(a.shape, np.int8).strides
    plain = tuple(s * a.itemsize for s in strides)
    ends = [sum((n - 1) * s for n, s in zip(a.shape, some)) for some in (plain, a.strides)]
    return as_strided(a, strides=plain) if ends[0] <= ends[1] else a

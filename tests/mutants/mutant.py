"""Wrong kernels, and how one is said in a line: the right kernel with something done to it.

A mutant is `fn(right, out, *sources, **attributes)`: the right kernel is given other sources or
attributes, or its result is spoilt. Those of meanings and of weights stand in
`meanings`. `hunt` runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

Wrong = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Mutant:
    """A mistake, in words and as a function that takes the right one's place.

    of  "kernel": in the kernel of `op`;  "meaning": in what `op` means in simpler ops;
        "weight": in how the backend keeps a constant that `op` reads
    """

    op: str
    what: str
    run: Wrong
    of: str = "kernel"


#: What is said before a mistake that is not in a kernel.
_WHERE = {"kernel": "", "meaning": "in its meaning, ", "weight": "in weights, "}


def maker(
    found: list[Mutant], of: str = "kernel"
) -> Callable[[str, str], Callable[[Wrong], Wrong]]:
    """A decorator `@mutant(op, what)` that collects into `found`."""

    def mutant(op: str, what: str) -> Callable[[Wrong], Wrong]:
        def keep(run: Wrong) -> Wrong:
            found.append(Mutant(op, _WHERE[of] + what, run, of))
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


def wrapped(a: Any) -> Any:
    """`a` as it is read by who counts bytes with 31 bits."""
    got = np.empty(a.shape, a.dtype)
    for at in np.ndindex(a.shape[:-1]):
        first = sum(i * s for i, s in zip(at, a.strides)) % (1 << 31) // a.itemsize
        got[at] = as_strided(a, (first + a.shape[-1],), (a.itemsize,))[first:]
    return got


def unstrided(a: Any) -> Any:
    """The memory that `a` begins in, read as if `a` were contiguous (never past its end)."""
    strides = np.empty(a.shape, np.int8).strides
    plain = tuple(s * a.itemsize for s in strides)
    ends = [sum((n - 1) * s for n, s in zip(a.shape, some)) for some in (plain, a.strides)]
    return as_strided(a, strides=plain) if ends[0] <= ends[1] else a

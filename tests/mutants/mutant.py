"""Wrong kernels, each built from the correct kernel in a line or a few.

A mutant is `fn(right, out, *sources, **attributes)`. It calls the correct kernel, `right`, with
other sources or attributes, or spoils the result. `meanings` has mutants of meanings and of
weights; `hunt` runs all of them.
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
    """A mistake: its description, and a function that replaces the correct one.

    of  where the mistake is: "kernel", in the kernel of `op`; "meaning", in the meaning of `op`;
        "weight", in the layout in which the backend stores a constant that `op` reads
    """

    op: str
    what: str
    run: Wrong
    of: str = "kernel"


#: Where the mistake is -> prefix of its description.
_WHERE = {"kernel": "", "meaning": "in its meaning, ", "weight": "in weights, "}


def maker(
    mutants: list[Mutant], of: str = "kernel"
) -> Callable[[str, str], Callable[[Wrong], Wrong]]:
    """A decorator `@mutant(op, what)` that adds a Mutant to `mutants`."""

    def mutant(op: str, what: str) -> Callable[[Wrong], Wrong]:
        def add(run: Wrong) -> Wrong:
            mutants.append(Mutant(op, _WHERE[of] + what, run, of))
            return run

        return add

    return mutant


def changed(**attrs: Any) -> Wrong:
    """The correct kernel with other attributes, each a value or a function of the old value."""

    def run(right: Wrong, out: Any, *sources: Any, **old: Any) -> None:
        new = {k: v(old[k]) if callable(v) else v for k, v in attrs.items()}
        right(out, *sources, **{**old, **new})

    return run


def instead(index: int, fn: Callable[[Any], Any]) -> Wrong:
    """The correct kernel with fn(array) in place of source `index`, if that is an array."""

    def run(right: Wrong, out: Any, *sources: Any, **attrs: Any) -> None:
        new = list(sources)
        if isinstance(new[index], np.ndarray):
            new[index] = fn(new[index])
        right(out, *new, **attrs)

    return run


def without(index: int) -> Wrong:
    """The correct kernel without the optional source `index`."""

    def run(right: Wrong, out: Any, *sources: Any, **attrs: Any) -> None:
        right(out, *[None if i == index else s for i, s in enumerate(sources)], **attrs)

    return run


def then(spoil: Callable[[Any], None]) -> Wrong:
    """The correct kernel, then `spoil(out)` if the result is an array."""

    def run(right: Wrong, out: Any, *sources: Any, **attrs: Any) -> None:
        if isinstance(out, np.ndarray):
            right(out, *sources, **attrs)
            spoil(out)
        else:
            right(out, *sources, **attrs)

    return run


def stretched(a: Any, shape: tuple[int, ...]) -> Any:
    """`a` repeated to a shape, each element r times in a row: index i // r instead of i % size."""
    for axis, size in enumerate(shape):
        a = np.repeat(a, size // a.shape[axis], axis=axis)
    return a


def wrapped(a: Any) -> Any:
    """`a` as a kernel with 31-bit byte offsets would read it."""
    out = np.empty(a.shape, a.dtype)
    for at in np.ndindex(a.shape[:-1]):
        first = sum(i * s for i, s in zip(at, a.strides)) % (1 << 31) // a.itemsize
        out[at] = as_strided(a, (first + a.shape[-1],), (a.itemsize,))[first:]
    return out


def unstrided(a: Any) -> Any:
    """The memory of `a`, read as if `a` were contiguous, but never past its end."""
    strides = np.empty(a.shape, np.int8).strides
    plain = tuple(s * a.itemsize for s in strides)
    ends = [sum((n - 1) * s for n, s in zip(a.shape, nb)) for nb in (plain, a.strides)]
    return as_strided(a, strides=plain) if ends[0] <= ends[1] else a

"""Simpler forms of a case, to shrink a failing one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product

from pyggml.dtypes import TYPES
from pyggml.parity.case import Case, Source


def simpler_cases(text: str) -> Iterator[str]:
    """Texts of simpler cases, the simplest first. The op's rule may refuse some."""
    case = Case.parse(text)
    for at, source in enumerate(case.sources):
        if source is not None and at:
            yield str(_with(case, at, None))
    for key in case.attrs:
        others = {k: v for k, v in case.attrs.items() if k != key}
        yield str(replace(case, attrs=others))
    if case.means:
        yield str(replace(case, means=False))
    yield from _shorter(case)
    for at, source in enumerate(case.sources):
        if source is not None:
            yield from (str(_with(case, at, s)) for s in _plainer(source))


def _with(case: Case, at: int, source: Source | None) -> Case:
    sources = [*case.sources]
    sources[at] = source
    while sources and sources[-1] is None:
        sources.pop()
    return replace(case, sources=tuple(sources))


def _shorter(case: Case) -> Iterator[str]:
    """The case with one size smaller, in all sources first: equal sizes usually belong together."""
    sizes = sorted({n for s in case.sources if s for n in s.ne if n > 1}, reverse=True)
    for n in sizes:
        for less in smaller(n):
            yield _resized(case, partial(_swapped, n, less, None))
            for axis in range(4):
                yield _resized(case, partial(_swapped, n, less, axis))
    for axis, by in product(range(4), (4, 3, 2)):
        yield _resized(case, partial(_divided, axis, by))
    for at, source in enumerate(case.sources):
        for axis, n in enumerate(source.ne if source else ()):
            for less in smaller(n):
                assert source is not None
                ne = tuple(less if i == axis else m for i, m in enumerate(source.ne))
                yield str(_with(case, at, replace(source, ne=ne)))


def _swapped(n: int, less: int, only: int | None, axis: int, m: int) -> int:
    """`less` for a size n (on dimension `only`, if given), else the size itself."""
    return less if m == n and only in (None, axis) else m


def _divided(only: int, by: int, axis: int, m: int) -> int:
    """The size, divided by `by` if it is on dimension `only` and divisible."""
    return m // by if axis == only and m % by == 0 else m


def smaller(n: int) -> Iterator[int]:
    """Sizes to try for n, in ascending order."""
    sizes = (1, 2, n // 4, n // 4 | 1, n // 2, n // 2 | 1, n - n % 32, n - 1)
    yield from sorted({m for m in sizes if 0 < m < n})


def _resized(case: Case, size: Callable[[int, int], int]) -> str:
    """The case with `size(axis, n)` for every size n."""
    sources = []
    for source in case.sources:
        if source is not None:
            ne = tuple(size(axis, n) for axis, n in enumerate(source.ne))
            source = replace(source, ne=ne, fill=fitting(source.fill, ne))
        sources.append(source)
    return str(replace(case, sources=tuple(sources)))


def fitting(fill: str, ne: tuple[int, ...]) -> str:
    """The fill, with its row number inside a source of this size."""
    match = re.fullmatch(r"(~past|~upto)(\d+)", fill)
    if match is None:
        return fill
    rows = ne[1] if match[1] == "~past" else ne[0]
    return match[1] + str(max(1, min(int(match[2]), rows - 1)))


def _plainer(source: Source) -> Iterator[Source]:
    """The source with one feature less: layout, weight, outer dimension of 1, fill, type."""
    if source.layout:
        yield replace(source, layout="")
        for part in re.findall(r"[pbas]\d{4}", source.layout):
            yield replace(source, layout=source.layout.replace(part, ""))
    if source.weight:
        yield replace(source, weight=False)
    if len(source.ne) > 1 and source.ne[-1] == 1:
        yield replace(source, ne=source.ne[:-1])
    if source.fill.startswith("~"):
        yield replace(source, fill="")
    if source.fill.endswith("-"):
        yield replace(source, fill=source.fill[:-1])
    number = re.fullmatch(r"(~\w+?)(\d+)", source.fill)
    if number and int(number[2]) > 2:
        yield replace(source, fill=f"{number[1]}2")
    if source.type not in ("f32", "i32") and TYPES[source.type].kind != "int":
        yield replace(source, type="f32")

"""The fuzzer's random choices: sizes, layouts and sources, all from one seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import TypeVar

from pyggml.dtypes import dtype
from pyggml.parity.case import Case, Source
from pyggml.parity.cases import BLOCKS as _BLOCKS
from pyggml.parity.layouts import Layout

T = TypeVar("T")
PLAIN = ("f32", "f16", "bf16")
BLOCKS = tuple(_BLOCKS.split("|"))
#: Sizes on and next to those that kernels pack, tile and split by.
EDGES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
LARGE = (300, 511, 512, 513, 700, 1023, 1025, 2049)
#: Layouts with a name, which kernels may treat specially; all others are spelled out.
NAMED = ("wide", "inner", "step")


class Draw:
    """Draws the parts of a case from one generator."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def pick(self, choices: Sequence[T]) -> T:
        return self.rng.choice(choices)

    # -- sizes ------------------------------------------------------------------------------

    def size(self, most: int) -> int:
        """A size from 1 to `most`: on or next to an edge, or any; small sizes are more likely."""
        if self.chance(0.25):
            return 1
        if self.chance(0.5):
            return self.pick([n for n in (*EDGES, *LARGE) if n <= most])
        return int(math.exp(self.rng.uniform(0, math.log(most + 1))))

    def row(self, type: str, most: int = 600) -> int:
        """The length of a row: whole blocks of the type."""
        block = dtype(type).block
        return self.size(most) if block == 1 else block * self.rng.randint(1, max(1, 768 // block))

    def ne(self, first: int | None = None, most: int = 6000, rank: int = 4) -> tuple[int, ...]:
        """Sizes of a tensor of at most `most` elements; outer dimensions are small."""
        sizes = [self.size(min(most, 1100)) if first is None else first]
        for _ in range(self.rng.randrange(rank)):
            room = most // math.prod(sizes)
            if room < 1:
                break
            sizes.append(self.size(min(room, 70)))
        return tuple(sizes)

    def divisor(self, n: int) -> int:
        return self.pick([d for d in range(1, min(n, 64) + 1) if n % d == 0])

    # -- sources ----------------------------------------------------------------------------

    def layout(self, type: str, rows: bool) -> str:
        """Any layout; with `rows`, the elements of a row stay contiguous."""
        if self.chance(0.35):
            return ""
        if self.chance(0.2):
            return self.pick(NAMED)
        rows = rows or dtype(type).block > 1
        axes = [1, 2, 3] if rows else [0, 1, 2, 3]
        if self.chance(0.6):
            self.rng.shuffle(axes)
        before, after, step = (0, 0, 0, 0), (0, 0, 0, 0), [1, 1, 1, 1]
        if self.chance(0.5):
            before, after = (self._edges() for _ in range(2))
        if self.chance(0.5):
            step = [self.pick((1, 1, 2, 3)) for _ in range(4)]
        step[0] = 1 if rows else step[0]
        return str(Layout((0, *axes) if rows else tuple(axes), before, after, tuple(step)))

    def _edges(self) -> tuple[int, int, int, int]:
        a, b, c, d = (self.pick((0, 0, 1, 2)) for _ in range(4))
        return a, b, c, d

    def source(
        self, type: str, ne: Sequence[int], fill: str = "", rows: bool = False, weight: float = 0.15
    ) -> Source:
        """A source in a random layout: an input, or with probability `weight` a constant."""
        layout = self.layout(type, rows)
        return Source(type, tuple(ne), fill, self.chance(weight), layout)

    def state(self, type: str, ne: Sequence[int], fill: str = "") -> Source:
        return self.source(type, ne, fill, weight=0.0)

    def ids(self, ne: Sequence[int], below: int, type: str = "i32") -> Source:
        return self.source(type, ne, f"<{below}" + "-" * self.chance(0.5))

    def maybe(self, source: Source, share: float = 0.5) -> Source | None:
        return source if self.chance(share) else None

    def number(self) -> float:
        """A value for an attribute."""
        return self.pick((0.0, 1.0, -1.0, 0.5, round(self.rng.uniform(-3, 3), 3)))

    def special(self, share: float = 0.15) -> str:
        """The fill `~nan` with probability `share`, else none."""
        return "~nan" if self.chance(share) else ""

    def case(self, op: str, /, *sources: Source | None, **attrs: object) -> Case:
        """The case, without absent sources at its end."""
        present = list(sources)
        while present and present[-1] is None:
            present.pop()
        return Case(op, tuple(present), attrs)


def viewed(source: Source, type: str, ne: Sequence[int], of: int, start: int) -> Source:
    """A view of source number `of`, `start` elements into each row."""
    return replace(
        source, type=type, ne=tuple(ne), fill="", weight=False, layout="", of=of, start=start
    )

"""Parts of tensors, one for each device, and how slice rules carry them from result to sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from pyggml.node import Node
from pyggml.operation import slice_of
from pyggml.ops.views import view_op
from pyggml.spec import Ne
from pyggml.traits import Axis, Cut, Slice


@dataclass(frozen=True, slots=True)
class Part:
    """`n` elements of a tensor along `axis`, from `start` on, `step` apart."""

    axis: int
    start: int
    n: int
    step: int = 1

    def __str__(self) -> str:
        if self.step > 1:
            return f"ne{self.axis}[{self.start}::{self.step}]"
        return f"ne{self.axis}[{self.start}:{self.start + self.n}]"

    def within(self, ne: Ne) -> Ne:
        """The sizes of this part of a tensor of sizes `ne`."""
        sizes = list(ne)
        sizes[self.axis] = self.n
        return (sizes[0], sizes[1], sizes[2], sizes[3])

    def first(self) -> Ne:
        """Where it starts, in ne order."""
        return Part(self.axis, 0, self.start).within((0, 0, 0, 0))

    def steps(self) -> Ne:
        return Part(self.axis, 0, self.step).within((1, 1, 1, 1))


#: The parts of one tensor on the devices of a group, in their order; all along one axis.
Family = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Sliced:
    """How a family of parts of a result is computed.

    rules     the slice rule for the part of each device
    families  for each source: its parts, or None if every device needs all of it
    """

    rules: tuple[Slice, ...]
    families: tuple[Family | None, ...]


def divided(total: int, shares: Sequence[float], unit: int = 1) -> Family | None:
    """`total` elements along axis 0 in consecutive parts of whole units, as nearly as possible in
    proportion to `shares`; each has at least one unit. None if there are too few."""
    units, remainder = divmod(total, unit)
    if remainder or units < len(shares):
        return None
    quotas = [units * share / sum(shares) for share in shares]
    counts = [max(1, int(quota)) for quota in quotas]
    while sum(counts) != units:
        step = 1 if sum(counts) < units else -1
        able = [i for i, count in enumerate(counts) if count + step >= 1]
        nearest = max(able, key=lambda i: (step * (quotas[i] - counts[i]), -i))
        counts[nearest] += step
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return tuple(Part(0, unit * s, unit * n) for s, n in zip(starts, counts))


def interleaved(axis: int, total: int, count: int) -> Family | None:
    """Element i on device i % count. None if the parts would not be equal."""
    if total % count:
        return None
    return tuple(Part(axis, first, total // count, count) for first in range(count))


def along(axis: int, family: Family) -> Family:
    """The same parts along another axis."""
    return tuple(replace(part, axis=axis) for part in family)


def covers(family: Family, ne: Ne) -> bool:
    """Whether the parts are consecutive and together the whole tensor."""
    ends = [(part.start, part.start + part.n) for part in family]
    joined = all(a[1] == b[0] for a, b in pairwise(ends))
    plain = all(part.step == 1 for part in family)
    return plain and joined and ends[0][0] == 0 and ends[-1][1] == ne[family[0].axis]


def is_whole(part: Part, ne: Ne) -> bool:
    return part.n == ne[part.axis]


def through(cut: Cut, part: Part) -> Part | None:
    """The part of a source that `part` of a result reads; None if it is not one part."""
    if part.step > 1:
        plain = cut.mul == cut.div == 1 and not cut.mod
        return replace(part, axis=cut.axis, start=part.start + cut.add) if plain else None
    start, n = part.start * cut.mul, part.n * cut.mul
    first, last = start // cut.div, (start + n - 1) // cut.div
    if start % cut.div or n % cut.div:
        if first != last:
            return None  # neither whole groups nor inside of one
        n = cut.div
    start, n = first, n // cut.div
    if cut.mod and n >= cut.mod:
        if start % cut.mod or n % cut.mod:
            return None
        start, n = 0, cut.mod
    elif cut.mod:
        start %= cut.mod
        if start + n > cut.mod:
            return None
    return Part(cut.axis, start + cut.add, n)


def sliced(node: Node, family: Family, axis: Axis | None = None) -> Sliced | None:
    """How parts of `node` are computed from parts of its sources; None if its slice rule forbids
    them.

    axis  the name of a reduction, whose elements `family` divides
    """
    axis = family[0].axis if axis is None else axis
    rules = [slice_of(node, axis, part.n) for part in family]
    legal = [rule for rule in rules if rule is not None]
    merges = isinstance(axis, str)
    if len(legal) < len(rules) or any((rule.merge is not None) != merges for rule in legal):
        return None
    families: list[Family | None] = []
    for i, source in enumerate(node.src):
        cuts = [rule.cuts[i] for rule in legal]
        if source is None or cuts[0] is None:
            families.append(None)
            continue
        parts = [through(cut, part) for cut, part in zip(cuts, family) if cut is not None]
        mapped = [_of(node, source, part) for part in parts if part is not None]
        reads = [part for part in mapped if part is not None and _in_blocks(part, source)]
        if len(reads) < len(family):
            return None
        every = all(is_whole(part, source.ne) for part in reads)
        families.append(None if every else tuple(reads))
    return Sliced(tuple(legal), tuple(families))


def _of(node: Node, source: Node, part: Part) -> Part | None:
    """An interleaved part of a view of the first rows is the start of that part of all rows."""
    if node.op is not view_op or part.step == 1:
        return part
    n, remainder = divmod(source.ne[part.axis], part.step)
    if remainder or node.attrs["start"][part.axis]:
        return None
    return replace(part, n=n)


def _in_blocks(part: Part, source: Node) -> bool:
    """Whether the part is whole blocks of the source's type."""
    block = source.dtype.block
    return part.axis > 0 or block == 1 or (part.start % block == 0 and part.n % block == 0)

"""A plan as text: splits, copies and steps with their sizes; what repeats is shown once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pyggml.backends.base import Step
from pyggml.node import Node, labels
from pyggml.passes.work import Split, Work
from pyggml.runtime.reports import mib
from pyggml.transfer import origin, transfer

#: Longest repeated part that is looked for, in rows: more than a layer of any model has.
LONGEST = 512


@dataclass(frozen=True, slots=True)
class Fold:
    """Rows `start` to `start + period`, which stand `times` times one after another."""

    start: int
    period: int
    times: int


def folds(rows: Sequence[object]) -> Iterator[Fold]:
    """The rows cut into parts that repeat and single ones; equal rows are those that are ==."""
    at = 0
    while at < len(rows):
        best = Fold(at, 1, 1)
        for period in range(1, min(LONGEST, (len(rows) - at) // 2) + 1):
            if rows[at] != rows[at + period]:
                continue
            part, times = rows[at : at + period], 1
            while rows[at + times * period : at + (times + 1) * period] == part:
                times += 1
            if times > 1 and period * times > best.period * best.times:
                best = Fold(at, period, times)
        yield best
        at += best.period * best.times


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a plan, and what must be equal for another to be the same over again.

    step  what it shows; None for the head of a split
    """

    text: str
    key: object
    step: Step | None = None


def plan_text(work: Work) -> str:
    """The splits in order; of each its copies, its steps, and what it waits for."""
    return "\n".join([*_head(work), *_folded(rows_of(work))])


def rows_of(work: Work) -> list[Row]:
    """Every line of a plan, nothing folded."""
    return [row for i, split in enumerate(work.splits) for row in _split_rows(work, i, split)]


def counted(n: int, one: str, many: str = "") -> str:
    """`1 step`, `2 steps`; `many` where the plural is not `one` with an s."""
    return f"{n} {one if n == 1 else many or one + 's'}"


def _head(work: Work) -> Iterator[str]:
    copies = [step for step in work.steps if step.node.op is transfer]
    steps = len(work.steps) - len(copies)
    line = f"{counted(len(work.splits), 'split')}, {counted(steps, 'step')}"
    if copies:
        size = mib(sum(step.nbytes for step in copies))
        line += f", {counted(len(copies), 'copy', 'copies')} of {size} MiB"
    if work.placed.copied_parts:
        line += f", {counted(work.placed.copied_parts, 'part')} of concats copied"
    if not work.fuse:
        line += ", nothing fused"
    yield line
    for device, arena in work.placed.arenas.items():
        if not arena.nbytes:
            continue
        place = next(b.place for b in work.backends if b.device == device)
        yield f"arena of {place}: {mib(arena.nbytes)} MiB"
    told = Counter((e.op, e.place, e.reason) for e in work.expanded)
    for (op, place, reason), count in told.items():
        yield f"{count} x {op} in simpler ops on {place}: {reason}"


def _split_rows(work: Work, number: int, split: Split) -> Iterator[Row]:
    after = f", after split {', '.join(map(str, split.waits))}" if split.waits else ""
    copies, steps = len(split.copies), len(split.steps)
    told = f"{counted(copies, 'copy', 'copies')}, {counted(steps, 'step')}{after}"
    yield Row(
        f"split {number} on {split.backend.place}: {told}",
        ("split", split.backend.place, copies, steps),
    )
    for step in (*split.copies, *split.steps):
        yield _row(work, step)


def _row(work: Work, step: Step) -> Row:
    node, at = step.node, work.placed.places[step.node]
    op, label, note = node.op.name, _label(node), ""
    if node.op is transfer:
        source = origin(node)
        op, label = "copy", _label(source) or source.op.name
        note = f" from {work.home(source).place}, {mib(step.nbytes)} MiB"
    elif step.loop is not None:
        inner = ", ".join(s.node.op.name for s in step.bodies[-1].steps)
        note = f" loop {step.loop} of {inner}"
    elif len(step.nodes) > 1:
        note = f" of {', '.join(n.op.name for n in step.nodes)}"
    if step.scratch:
        note = f" scratch {step.scratch}" + note
    where = f"@{at.offset}" if at.base is None else f"in {_label(at.base) or at.base.op.name}"
    text = f"  {op:16} {label:24} {node.spec!s:28} {where}{note}"
    return Row(text, (op, re.sub(r"\d+", "#", label), node.spec, re.sub(r"\d+", "#", note)), step)


def _label(node: Node) -> str:
    found = labels(node)
    return found[-1] if found else ""


def _folded(rows: Sequence[Row]) -> Iterator[str]:
    for fold in folds([row.key for row in rows]):
        part = rows[fold.start : fold.start + fold.period]
        if fold.times == 1 or fold.period * (fold.times - 1) < 3:
            yield from (row.text for row in rows[fold.start :][: fold.period * fold.times])
            continue
        yield from _folded(part) if fold.period > 1 else (row.text for row in part)
        what = "row" if fold.period == 1 else f"{fold.period} rows"
        again = "once" if fold.times == 2 else f"{fold.times - 1} times"
        yield f"  ... the last {what} {again} more"

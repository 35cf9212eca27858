"""A plan's steps as text, with repeated parts shown once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pyggml.backends.step import LoadStep, LoopStep, Step
from pyggml.joint import places_of, turn_of
from pyggml.node import Node, labels
from pyggml.operation import cost_of
from pyggml.passes.ahead import bytes_ahead
from pyggml.passes.work import Split, Work
from pyggml.runtime.memory import mib
from pyggml.transfer import origin, transfer
from pyggml.words import counted

#: The longest repeated part that `folds` finds, in rows: longer than a layer of any model.
LONGEST = 512


@dataclass(frozen=True, slots=True)
class Fold:
    """Rows `start` to `start + period`, which occur `times` times in succession."""

    start: int
    period: int
    times: int


def folds(rows: Sequence[object]) -> Iterator[Fold]:
    """Divide rows into repeated parts and single rows. Rows are compared with ==."""
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
    """A line of a plan.

    key   equal for rows that count as repetitions of each other
    step  the step that it shows; None for the head of a split
    """

    text: str
    key: object
    step: Step | None = None


def plan_text(work: Work) -> str:
    """The splits in order, each with its copies, its steps and the splits that it waits for."""
    return "\n".join([*_head(work), *_folded(rows_of(work))])


def rows_of(work: Work) -> list[Row]:
    """All lines of a plan, including repeated ones."""
    return [row for i, split in enumerate(work.splits) for row in _split_rows(work, i, split)]


def _head(work: Work) -> Iterator[str]:
    copies = [step for step in work.steps if step.node.op is transfer]
    n_steps = len(work.steps) - len(copies)
    line = f"{counted(len(work.splits), 'split')}, {counted(n_steps, 'step')}"
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
        steps = [s for split in work.splits if split.backend.device == device for s in split.steps]
        ahead = bytes_ahead(steps)
        note = f", up to {mib(ahead)} of them weights that are read ahead" if ahead else ""
        yield f"arena of {place}: {mib(arena.nbytes)} MiB{note}; @N is byte N of it"
    yield from expansions(work)


def expansions(work: Work) -> Iterator[str]:
    """Ops that simpler ones replace, and why."""
    expanded = Counter((e.op, e.place, e.reason) for e in work.expanded)
    for (op, place, reason), count in expanded.items():
        yield f"{count} x {op} in simpler ops on {place}: {reason}"


def _split_rows(work: Work, number: int, split: Split) -> Iterator[Row]:
    after = f", after split {', '.join(map(str, split.waits))}" if split.waits else ""
    copies, steps = len(split.copies), len(split.steps)
    text = f"{counted(copies, 'copy', 'copies')}, {counted(steps, 'step')}{after}"
    yield Row(
        f"split {number} on {split.backend.place}: {text}",
        ("split", split.backend.place, copies, steps),
    )
    for step in (*split.copies, *split.steps):
        yield _row(work, step)


def _row(work: Work, step: Step) -> Row:
    node, at, note = step.node, work.placed.spots[step.node], ""
    if node.op is transfer:
        note = f" from {work.home(origin(node)).place}, {mib(step.nbytes)} MiB"
        if isinstance(step, LoadStep):
            note += ", of chosen experts" * (step.ids is not None) + ", ahead" * step.ahead
    elif isinstance(step, LoopStep):
        inner = ", ".join(s.node.op.name for s in step.bodies[-1].steps)
        note = f" loop {step.loop} of {inner}"
    elif len(step.nodes) > 1:
        note = f" of {', '.join(n.op.name for n in step.nodes)}"
    if (joint := step.joint) is not None:
        others = [place for i, place in enumerate(places_of(joint)) if i != joint.attrs["index"]]
        note += f" with {', '.join(others)}, turn {turn_of(joint)}"
    if step.scratch:
        note = f" scratch {step.scratch} bytes" + note
    where = f"@{at.offset}" if at.base is None else f"in {name_of(at.base)}"
    text = text_of(step)
    if len(text) > 40:  # the columns go on in a line of their own
        text = f"{text}\n  {'':40}"
    line = f"  {text:40} {node.spec!s:20} {where}{note}"
    return Row(line, tuple(re.sub(r"\d+", "#", part) for part in (text, note)) + (node.spec,), step)


def text_of(step: Step) -> str:
    """A step's label, op and sources: `Qcur-0 = mul_mat(blk.0.attn_q.weight, norm-0)`."""
    node = step.node
    if node.op is transfer:
        return f"copy({name_of(origin(node))})"
    sources = node.src if len(step.nodes) == 1 else step.reads
    call = f"{node.op.name}({', '.join(name_of(s) for s in sources if s is not None)})"
    return f"{_label(node)} = {call}" if _label(node) else call


def main_op(step: Step) -> str:
    """The op that most of a step's work is: of its nodes, that with the most flops or bytes.

    Experts of a token, for example, end with an `add`, but are `moe_up_gate`.
    """

    def work(node: Node) -> tuple[float, float]:
        cost = cost_of(node)
        return cost.flops, cost.nbytes

    return max(reversed(step.nodes), key=work).op.name


def name_of(node: Node) -> str:
    """The newest label of a tensor, or of the source of a view or transfer; else the op's name."""
    label = _label(node)
    while not label and node.src and (node.op.view is not None or node.op is transfer):
        assert node.src[0] is not None
        node = node.src[0]
        label = _label(node)
    return label or node.op.name


def _label(node: Node) -> str:
    names = labels(node)
    return names[-1] if names else ""


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

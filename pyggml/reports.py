"""What a plan says of itself: memory before it is spent, steps, time by step and by op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyggml.backends.base import Step
from pyggml.graph import cost_of, label_of
from pyggml.passes.work import Work


def mib(nbytes: float) -> str:
    """Bytes as MiB; two decimals, four below 1."""
    return f"{nbytes / 2**20:.{2 if nbytes >= 2**20 or not nbytes else 4}f}"


@dataclass(frozen=True, slots=True)
class Memory:
    """The bytes a plan will use on a device; exact, and known before anything is allocated.

    weights, states, inputs   resident in the store (shared with its other plans)
    compute                   this plan's arena; the store keeps one as large as its largest plan's
    peak_step, peak_live      the step with most live bytes, and how many: packing's lower bound
    score_peak                most bytes of attention scores and expanded K and V at once
    score_peak_plain          the same without a budget;  amb  the budget in bytes, or None
    live                      live bytes in each step, for pictures
    """

    device: str
    weights: int
    states: int
    inputs: int
    compute: int
    peak_step: str
    peak_live: int
    score_peak: int
    score_peak_plain: int
    amb: int | None
    live: tuple[int, ...]

    @staticmethod
    def of(work: Work, plain: Work, device: str) -> Memory:
        """The memory of `work`; `plain` is the same graph without a budget."""
        by_kind = {"constant": 0, "state": 0, "input": 0}
        for leaf in work.leaves:
            size = leaf.spec.nbytes
            if leaf.op.name == "constant":
                size = work.backend.weight_layout(leaf, work.graph.users[leaf]).nbytes
            by_kind[leaf.op.name] += size
        live = work.placed.live
        top = max(range(len(live)), key=lambda i: live[i], default=-1)
        return Memory(
            device,
            by_kind["constant"],
            by_kind["state"],
            by_kind["input"],
            work.placed.arena,
            label_of(work.steps[top].node) if live else "",
            live[top] if live else 0,
            work.placed.score_peak,
            plain.placed.score_peak,
            work.amb,
            live,
        )

    @property
    def total(self) -> int:
        return self.weights + self.states + self.inputs + self.compute

    def __str__(self) -> str:
        budget = "none" if self.amb is None else f"{mib(self.amb)} MiB"
        columns = (
            "device",
            "weights",
            "states",
            "inputs",
            "compute",
            "total",
            "score peak",
            "plain",
        )
        sizes = (self.weights, self.states, self.inputs, self.compute, self.total)
        row = (self.device, *map(mib, (*sizes, self.score_peak, self.score_peak_plain)))
        widths = [max(len(c), len(r)) for c, r in zip(columns, row)]
        lines = [
            " | ".join(text.rjust(w) for text, w in zip(cells, widths)) for cells in (columns, row)
        ]
        lines.append(
            f"MiB. Peak at {self.peak_step or 'no step'} with {mib(self.peak_live)} live; "
            f"attention budget: {budget}."
        )
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Timing:
    """One step's time in seconds beside what it had to do."""

    label: str
    op: str
    seconds: float
    flops: float
    nbytes: float


@dataclass(frozen=True, slots=True)
class Profile:
    """Times of all steps. `print` shows the slowest and the sums by op."""

    rows: tuple[Timing, ...]

    @staticmethod
    def of(steps: Sequence[Step], seconds: Sequence[float]) -> Profile:
        rows = []
        for step, time in zip(steps, seconds):
            costs = [cost_of(node) for node in step.nodes]
            flops, nbytes = sum(c.flops for c in costs), sum(c.nbytes for c in costs)
            rows.append(Timing(label_of(step.node), step.node.op.name, time, flops, nbytes))
        return Profile(tuple(rows))

    @property
    def seconds(self) -> float:
        return sum(row.seconds for row in self.rows)

    def by_op(self) -> list[Timing]:
        """Sums by op, slowest first."""
        sums: dict[str, list[float]] = {}
        for row in self.rows:
            have = sums.setdefault(row.op, [0.0, 0.0, 0.0, 0.0])
            for i, value in enumerate((row.seconds, row.flops, row.nbytes, 1.0)):
                have[i] += value
        made = [Timing(f"{int(n)} steps", op, s, f, b) for op, (s, f, b, n) in sums.items()]
        return sorted(made, key=lambda row: -row.seconds)

    def __str__(self) -> str:
        slowest = sorted(self.rows, key=lambda row: -row.seconds)[:12]
        head = f"{'':24} {'op':18} {'ms':>9} {'%':>6} {'GFLOP/s':>9} {'GB/s':>8}"
        lines = [f"{len(self.rows)} steps, {self.seconds * 1e3:.3f} ms", head]
        lines += [self._line(row) for row in slowest]
        return "\n".join([*lines, "by op", *(self._line(row) for row in self.by_op())])

    def _line(self, row: Timing) -> str:
        time = max(row.seconds, 1e-9)
        share = 100 * row.seconds / max(self.seconds, 1e-9)
        return (
            f"{row.label[:24]:24} {row.op[:18]:18} {row.seconds * 1e3:9.3f} {share:6.1f} "
            f"{row.flops / time / 1e9:9.2f} {row.nbytes / time / 1e9:8.2f}"
        )


def plan_text(work: Work, device: str) -> str:
    """The steps in order: op, label, size, place in the arena, scratch; loops with their cuts."""
    lines = [f"{len(work.steps)} steps on {device}, arena {mib(work.placed.arena)} MiB"]
    if work.placed.copied_parts:
        lines[0] += f", {work.placed.copied_parts} parts of concats copied"
    for i, step in enumerate(work.steps):
        node, at = step.node, work.placed.places[step.node]
        where = f"@{at.offset}" if at.base is None else f"in {label_of(at.base)}"
        line = f"{i:4} {node.op.name:16} {label_of(node):24} {node.spec!s:28} {where}"
        if step.scratch:
            line += f" scratch {step.scratch}"
        if step.loop is not None:
            inner = ", ".join(s.node.op.name for s in step.bodies[-1].steps)
            line += f" loop {step.loop} of {inner}"
        lines.append(line)
    return "\n".join(lines)

"""The profile of a plan: what each step costs, as rows and as sums by op, label or layer.

The times are those of complete runs (`backends/timing.py`); `measure` drives the stopwatches of all
splits in the same runs. The split whose stopwatch needs most runs decides how many there are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from pyggml.backends.base import Backend, Event, Kernels
from pyggml.backends.step import Step
from pyggml.backends.timing import Stopwatch, Timeable, step_by_step
from pyggml.errors import UnknownNameError
from pyggml.node import Node, labels, line_of
from pyggml.operation import cost_of
from pyggml.passes.work import Work
from pyggml.runtime.execution import Copy, Execution
from pyggml.runtime.kernels import kernels_of
from pyggml.runtime.report import expansions, name_of, text_of
from pyggml.transfer import origin, transfer
from pyggml.words import counted

if TYPE_CHECKING:
    from pyggml.runtime.ceilings import Ceiling

#: Parts of names that are numbers of layers: `blk.3.`, `kq-3`, `cache_k_l3`.
_LAYER = re.compile(r"(?<=blk\.)(\d+)(?=\.)|(?<=-)(\d+)(?=$|\))|(?<=_l)(\d+)(?=$|\))")


@dataclass(frozen=True, slots=True)
class Timing:
    """One step, or copy between devices, and what it costs.

    text     label, op and sources: `Qcur-0 = mul_mat(blk.0.attn_q.weight, norm-0)`
    label    the newest label of its result, or else of what it reads first; may be empty
    layer    the number of its layer; None outside of layers
    spec     type and sizes of the result
    place    where it runs; of a copy, where it goes
    split    the number of its split
    line     `file:line` of the code that built the node
    kernels  what is launched, and why not the fast kernel
    seconds  inside a run, with its own launches and waits; on cpu also a reading of the clock
             for each kernel, 25 ns
    flops, nbytes  the least work of its nodes (`pyggml.operation.cost_of`)
    """

    text: str
    op: str
    label: str
    layer: int | None
    spec: str
    place: str
    split: int
    line: str
    kernels: Kernels
    seconds: float
    flops: float
    nbytes: float

    @property
    def launches(self) -> int:
        return len(self.kernels.names)


@dataclass(frozen=True, slots=True)
class Sum:
    """Steps that have something in common, together.

    name   what they have in common
    place  where they run; empty for several places
    """

    name: str
    place: str
    steps: int
    launches: int
    seconds: float
    flops: float
    nbytes: float


@dataclass(frozen=True, slots=True)
class Phases:
    """The host's share of one run: the seconds to upload inputs, issue the splits, wait for the
    devices. On the host's own backends, issuing a split runs it."""

    upload: float
    issue: float
    wait: float

    @property
    def seconds(self) -> float:
        return self.upload + self.issue + self.wait


@dataclass(frozen=True, slots=True, repr=False)
class Profile:
    """The times of all steps. As text: the slowest steps, sums by op, and the slow paths.

    phases    the fastest run that was not divided into steps
    whole     the seconds of each split's steps in the fastest run that is not divided into steps;
              0 if that is not known
    waits     of each split: the splits that it waits for
    expanded  ops that simpler ones replace, and why
    ceilings  by place: what its device can do (`with_ceilings`)
    """

    rows: tuple[Timing, ...]
    phases: Phases
    whole: tuple[float, ...] = ()
    waits: tuple[tuple[int, ...], ...] = ()
    expanded: tuple[str, ...] = ()
    ceilings: Mapping[str, Ceiling] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<profile: {counted(len(self.rows), 'step')}, {self.seconds * 1e3:.3f} ms>"

    def _repr_html_(self) -> str:
        """For notebooks."""
        from pyggml.page.snippets import profile_html

        return profile_html(self)

    @property
    def seconds(self) -> float:
        """The sum of all steps."""
        return sum(row.seconds for row in self.rows)

    @property
    def launches(self) -> int:
        return sum(row.launches for row in self.rows)

    def by_op(self) -> list[Sum]:
        """Sums by op, slowest first."""
        return self.by("op")

    def by(self, what: str) -> list[Sum]:
        """Sums by "op", "label", "layer", "kernel" or "place", slowest first; layers in order.

        In labels, the number of the layer is `*`, so that all layers are one row.
        """
        names: dict[str, Callable[[Timing], str]] = {
            "op": lambda row: row.op,
            "label": lambda row: collapsed(row.label or row.op),
            "layer": lambda row: "" if row.layer is None else str(row.layer),
            "kernel": lambda row: str(row.kernels) or row.op,
            "place": lambda row: row.place,
        }
        if what not in names:
            raise UnknownNameError(f"by({what!r}) must be one of {', '.join(names)}")
        groups: dict[str, list[Timing]] = {}
        for row in self.rows:
            groups.setdefault(names[what](row), []).append(row)
        sums = [_sum(name, rows) for name, rows in groups.items()]
        return sums if what == "layer" else sorted(sums, key=lambda row: -row.seconds)

    def slow_paths(self) -> list[tuple[str, list[Timing]]]:
        """Reasons why steps do not take a fast kernel, each with its steps, slowest first."""
        groups: dict[str, list[Timing]] = {}
        for row in self.rows:
            if row.kernels.why:
                groups.setdefault(row.kernels.why, []).append(row)
        return sorted(groups.items(), key=lambda group: -sum(row.seconds for row in group[1]))

    # -- ceilings -----------------------------------------------------------------------------

    def with_ceilings(self) -> Profile:
        """This profile with what each device can do, measured now: a large copy, a large product.

        Takes up to half a second and 256 MiB of memory on each device; where that does not fit, the
        ceiling is unknown.
        """
        from pyggml.runtime.ceilings import ceiling

        places = dict.fromkeys(row.place for row in self.rows)
        measured = {place: ceiling(place) for place in places}
        known = {place: c for place, c in measured.items() if c is not None}
        return replace(self, ceilings=known)

    def share(self, row: Timing | Sum) -> float | None:
        """The fraction of the time that the device would need at its ceilings; None if unknown.

        It is the larger one of the bytes at the speed of a copy and the flops at that of a product.
        Above 1 it means less work than `nbytes` or `flops` say, for example because data is in a
        cache.
        """
        ceiling = self.ceilings.get(row.place)
        if ceiling is None or row.seconds <= 0.0:
            return None
        return max(row.nbytes / ceiling.copy, row.flops / ceiling.product) / row.seconds

    # -- text ---------------------------------------------------------------------------------

    def __str__(self) -> str:
        slowest = sorted(self.rows, key=lambda row: -row.seconds)[:12]
        lines = [
            self.head(),
            f"{'':62} {'us':>9} {'%':>6} {'GFLOP/s':>9} {'GB/s':>8} {'ceiling':>8}",
        ]
        lines += [self._line(row.text, row) for row in slowest]
        lines.append("by op")
        lines += [
            self._line(f"{row.name}, {counted(row.steps, 'step')}", row) for row in self.by_op()
        ]
        lines += self.expanded
        return "\n".join([*lines, *self.slow_path_lines()])

    def slow_path_lines(self) -> Iterator[str]:
        """`slow_paths` as text."""
        for why, rows in self.slow_paths():
            ops = ", ".join(dict.fromkeys(row.op for row in rows))
            yield f"not the fast kernel: {counted(len(rows), 'step')} of {ops}: {why}"

    def head(self) -> str:
        """Steps, launches and times in one line."""
        text = (
            f"{counted(len(self.rows), 'step')}, {counted(self.launches, 'launch', 'launches')}, "
            f"{self.seconds * 1e3:.3f} ms; a run takes {self.phases.seconds * 1e3:.3f} ms"
        )
        if all(self.whole) and self.whole:
            text += f", its steps alone {sum(self.whole) * 1e3:.3f} ms"
        return text

    def _line(self, text: str, row: Timing | Sum) -> str:
        time = max(row.seconds, 1e-9)
        percent = 100 * row.seconds / max(self.seconds, 1e-9)
        share = self.share(row)
        return (
            f"{text[:62]:62} {row.seconds * 1e6:9.1f} {percent:6.1f} "
            f"{row.flops / time / 1e9:9.2f} {row.nbytes / time / 1e9:8.2f} "
            + ("" if share is None else f"{share:8.0%}")
        ).rstrip()

    # -- trace --------------------------------------------------------------------------------

    def trace(self) -> dict[str, Any]:
        """A Chrome trace, in its JSON object format (`pyggml.runtime.trace`)."""
        from pyggml.runtime.trace import trace

        return trace(self)

    def write_trace(self, path: str | Path) -> None:
        """Write the trace to a file for Perfetto (ui.perfetto.dev) or Chromium's DevTools."""
        from pyggml.runtime.trace import write

        write(self, Path(path))


def collapsed(label: str) -> str:
    """A label with `*` in place of the number of its layer."""
    return _LAYER.sub("*", label)


def _sum(name: str, rows: Sequence[Timing]) -> Sum:
    places = {row.place for row in rows}
    return Sum(
        name,
        places.pop() if len(places) == 1 else "",
        len(rows),
        sum(row.launches for row in rows),
        sum(row.seconds for row in rows),
        sum(row.flops for row in rows),
        sum(row.nbytes for row in rows),
    )


# -- measuring ------------------------------------------------------------------------------------


class _Undivided:
    """A run as any other. It keeps the shortest time of each split on the host, where issuing a
    split runs it."""

    def __init__(self, execution: Execution) -> None:
        self.runners = execution.runners
        self.on_host = [split.backend.device == "host" for split in execution.splits]
        self.whole: dict[int, float] = {}

    def copy(self, number: int, call: Copy, ends: Collection[Backend]) -> Event | None:
        return call()

    def compute(self, split: int) -> None:
        start = perf_counter()
        self.runners[split].run()
        time = perf_counter() - start
        if self.on_host[split]:
            self.whole[split] = min(time, self.whole.get(split, time))


class _Run:
    """A run under stopwatches; it sees the steps of one turn."""

    def __init__(self, watches: Sequence[Stopwatch], turn: int, copies: dict[int, float]) -> None:
        self.watches, self.turn, self.copies = watches, turn, copies

    def copy(self, number: int, call: Copy, ends: Collection[Backend]) -> None:
        """Make a copy alone, with nothing else in the queues."""
        for end in ends:
            end.synchronize()
        start = perf_counter()
        event = call()
        if event is not None:
            event.wait()
        for end in ends:
            end.synchronize()
        time = perf_counter() - start
        self.copies[number] = min(time, self.copies.get(number, time))

    def compute(self, split: int) -> None:
        self.watches[split].run(self.turn % self.watches[split].turns)


def measure(execution: Execution, give: Callable[[], None], runs: int) -> Profile:
    """Profile an execution: each of its steps in `runs` runs."""
    work = execution.work
    execution.run(give)
    undivided = _Undivided(execution)
    phases = [Phases(*execution.phases(give, undivided)) for _ in range(runs + 1)]
    watches = [
        runner.stopwatch()
        if isinstance(runner, Timeable)
        else step_by_step(runner, len(split.steps), split.backend.synchronize)
        for runner, split in zip(execution.runners, work.splits)
    ]
    copies: dict[int, float] = {}
    for _ in range(runs):
        for turn in range(max((watch.turns for watch in watches), default=0)):
            execution.watched(_Run(watches, turn, copies))
            for watch in watches:
                watch.read()
    rows = tuple(_rows(work, execution, watches, copies))
    return Profile(
        rows,
        min(phases, key=lambda each: each.seconds),
        tuple(undivided.whole.get(i, watch.whole()) for i, watch in enumerate(watches)),
        tuple(split.waits for split in work.splits),
        tuple(expansions(work)),
    )


def _rows(
    work: Work, execution: Execution, watches: Sequence[Stopwatch], copies: Mapping[int, float]
) -> Iterator[Timing]:
    kernels = iter(kernels_of(work, execution.runners))
    number, layer = 0, None
    for i, split in enumerate(work.splits):
        place = split.backend.place
        for step in split.copies:
            yield _timing(step, i, place, None, next(kernels), copies[number])
            number += 1
        for step, seconds in zip(split.steps, watches[i].seconds()):
            layer = _layer(step, layer)
            yield _timing(step, i, place, layer, next(kernels), seconds)
            number += 1


def _timing(
    step: Step, split: int, place: str, layer: int | None, kernels: Kernels, seconds: float
) -> Timing:
    node = step.node
    costs = [cost_of(inner) for inner in step.nodes]
    flops, nbytes = sum(c.flops for c in costs), sum(c.nbytes for c in costs)
    if node.op is transfer:
        flops, nbytes = 0.0, float(step.nbytes)
    return Timing(
        text=text_of(step), op=node.op.name, label=_label(step), layer=layer, spec=str(node.spec),
        place=place, split=split, line=line_of(origin(node)), kernels=kernels, seconds=seconds,
        flops=flops, nbytes=nbytes,
    )  # fmt: skip


def _label(step: Step) -> str:
    """The newest label of a step's result, else its op and the name of what it reads."""
    node = step.node
    if node.op is transfer:
        return f"copy({name_of(origin(node))})"
    names = labels(node)
    if names:
        return names[-1]
    weights = [name_of(source) for source in _named(step.reads)]
    return f"{node.op.name}({weights[0]})" if weights else node.op.name


def _named(nodes: Iterable[Node]) -> Iterator[Node]:
    """The weights and states among nodes."""
    return (origin(node.root) for node in nodes if origin(node.root).op.leaf)


def _layer(step: Step, before: int | None) -> int | None:
    """The layer in the names of a step; that of the step before if it has no names."""
    own = [text for node in step.nodes for text in labels(node)]
    names = own + [text for node in _named(step.reads) for text in labels(node)]
    for text in names:
        match = _LAYER.search(text)
        if match is not None:
            return int(match[match.lastindex or 0])
    return None if names else before

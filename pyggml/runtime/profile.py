"""The profile of a plan: what each step costs, as rows and as sums by op, label or layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyggml.backends.base import Kernels
from pyggml.errors import UnknownNameError
from pyggml.runtime.layers import collapsed
from pyggml.words import counted

if TYPE_CHECKING:
    from pyggml.runtime.ceilings import Ceiling
    from pyggml.runtime.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Timing:
    """One step, or copy between devices, and what it costs.

    text     label, op and sources: `Qcur-0 = mul_mat(blk.0.attn_q.weight, norm-0)`
    op       what most of its work is, where it computes several nodes
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
    elsewhere places of other processes. The time of a copy from there includes the wait for what is
              copied
    """

    rows: tuple[Timing, ...]
    phases: Phases
    whole: tuple[float, ...] = ()
    waits: tuple[tuple[int, ...], ...] = ()
    expanded: tuple[str, ...] = ()
    ceilings: Mapping[str, Ceiling] = field(default_factory=dict)
    elsewhere: frozenset[str] = frozenset()

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

    def with_ceilings(self, ranks: Ranks | None = None) -> Profile:
        """This profile with what each device can do, measured now: a large copy, a large product.

        Takes up to half a second and 256 MiB of memory on each device; where that does not fit, the
        ceiling is unknown. `ranks`, which all call it, measure their own devices.
        """
        from pyggml.runtime.ceilings import Ceiling, ceiling

        places = dict.fromkeys(row.place for row in self.rows if row.place not in self.elsewhere)
        measured = {place: ceiling(place) for place in places}
        known = {place: c for place, c in measured.items() if c is not None}
        if ranks is not None:
            texts = ranks.gather(json.dumps({p: (c.copy, c.product) for p, c in known.items()}))
            pairs = [pair for text in texts for pair in json.loads(text).items()]
            known = {place: Ceiling(*speeds) for place, speeds in pairs}
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

"""The data of a page: plans, their memory, and what other options would change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from pyggml.errors import PyggmlError
from pyggml.page.names import Texts
from pyggml.page.tables import Tables
from pyggml.runtime.memory import Memory

if TYPE_CHECKING:
    from pyggml.backends.step import Step
    from pyggml.runtime.plan import Plan
    from pyggml.runtime.profile import Profile


@dataclass(frozen=True, slots=True)
class View:
    """A plan on a page.

    name   what tells it from the page's other plans: "a batch of 512 tokens"
    times  a profile of it, or the seconds of its steps; None if it was not measured
    """

    name: str
    plan: Plan
    times: Profile | Mapping[Step, float] | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    """The memory with other options.

    change  the options: "-amb 256"
    memory  None if that cannot be planned, and `reason` says why
    """

    change: str
    memory: Memory | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    """What a page shows.

    title, about  a heading, and short texts below it
    views         at least one plan
    memory        of all plans together
    variants      the options as they are first, then others
    command       prints this page again; "" if no command does
    """

    title: str
    views: Sequence[View]
    memory: Memory
    about: Sequence[str] = ()
    variants: Sequence[Variant] = ()
    command: str = ""

    def data(self) -> dict[str, Any]:
        """The page's data, to be written as JSON."""
        texts = Texts()
        plans = [_plan(view, texts) for view in self.views]
        return {
            "version": _version(),
            "title": self.title,
            "about": list(self.about),
            "command": self.command,
            "memory": _memory(self.memory),
            "variants": [_variant(variant) for variant in self.variants],
            "plans": plans,
            "texts": texts.all,
        }


def _version() -> str:
    """Of the installed package; "" if it runs from a folder."""
    try:
        return metadata.version("pyggml")
    except metadata.PackageNotFoundError:
        return ""


def seconds_of(view: View) -> list[float] | None:
    """The seconds of each step; PyggmlError if they are of another plan."""
    steps, times = view.plan.steps, view.times
    if times is None:
        return None
    if isinstance(times, Mapping):
        if not all(step in times for step in steps):
            raise PyggmlError("page(): the times are of another plan: a step has none")
        return [float(times[step]) for step in steps]
    if len(times.rows) != len(steps):
        raise PyggmlError(
            f"page(): the profile is of another plan: it has {len(times.rows)} steps, and this "
            f"plan has {len(steps)}"
        )
    return [float(row.seconds) for row in times.rows]


def _plan(view: View, texts: Texts) -> dict[str, Any]:
    work = view.plan._work
    tables = Tables(view.plan, texts)
    expanded = Counter((e.op, e.place, e.reason) for e in work.expanded)
    return {
        "caption": view.name,
        "places": tables.places,
        "devices": [_arena(tables, device) for device in work.placed.arenas],
        "memory": _memory(view.plan.memory),
        "nodes": tables.node_columns(),
        "steps": tables.step_columns(seconds_of(view)),
        "splits": tables.split_rows(),
        "blocks": tables.block_columns(),
        "sections": [asdict(section) for section in tables.sections()],
        "outputs": {name: tables.number[node] for name, node in work.graph.outputs.items()},
        "expanded": [[*key, count] for key, count in expanded.items()],
        "copied_parts": work.placed.copied_parts,
        "fused": work.fuse,
    }


def _arena(tables: Tables, device: str) -> dict[str, Any]:
    """The arena of a device, and the first step with the most live bytes."""
    arena = tables.work.placed.arenas[device]
    live = max(arena.live, default=0)
    place = next(b.place for b in tables.work.backends if b.device == device)
    return {
        "device": device, "place": place, "nbytes": arena.nbytes, "peak_live": live,
        "peak_step": arena.live.index(live) if arena.live else 0, "score_peak": arena.score_peak,
    }  # fmt: skip


def _memory(memory: Memory) -> dict[str, Any]:
    return {
        "amb": memory.amb,
        "peak_step": memory.peak_step,
        "peak_live": memory.peak_live,
        "score_peak": memory.score_peak,
        "score_peak_plain": memory.score_peak_plain,
        "devices": [
            {
                "device": row.device, "weights": row.weights, "states": row.states,
                "inputs": row.inputs, "compute": row.compute, "workspace": row.workspace,
                "boxes": row.boxes, "total": row.total, "staging": row.staging, "size": row.size,
                "size_text": row.size_text, "score_peak": row.score_peak,
                "score_peak_plain": row.score_peak_plain,
            }
            for row in memory.devices
        ],
    }  # fmt: skip


def _variant(variant: Variant) -> dict[str, Any]:
    memory = None if variant.memory is None else _memory(variant.memory)
    return {"change": variant.change, "memory": memory, "reason": variant.reason}

"""The bytes that a plan uses on each device, computed before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pyggml.backends.base import Joins
from pyggml.joint import places_of
from pyggml.node import label_of
from pyggml.passes.ahead import bytes_ahead
from pyggml.passes.work import Work
from pyggml.runtime.leaves import Need
from pyggml.runtime.messages import message_bytes
from pyggml.runtime.places import Place, parse
from pyggml.transfer import origin


def mib(nbytes: float) -> str:
    """Bytes in MiB, with two decimals, or four below 1 MiB."""
    return f"{nbytes / 2**20:.{2 if nbytes >= 2**20 or not nbytes else 4}f}"


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The bytes that a plan uses on one device.

    weights, states, inputs   resident in the store, shared with its other plans
    compute                   the plan's arena; the store's arena is as large as its largest plan's
    ahead                     of compute: the most bytes of weights of the host that are there
                              before the step that reads them (`read_ahead=False`: none)
    workspace                 of the device's libraries: one block for all plans on the device
    boxes                     for sums with other devices: memory that these write to, for all plans
                              over the same devices
    connections               an estimate of what a library takes to connect the device with others;
                              not part of `total`
    staging                   pinned host memory that copies to and from the device go through: one
                              block for all plans, not part of `total`
    messages                  host memory that messages to and from other processes pass through, if
                              each device has one (`--nproc`): one block for all plans, not part of
                              `total`
    score_peak                largest sum of attention scores and expanded K and V alive at once
    score_peak_plain          the same without a budget
    live                      live bytes in each step, the lower bound of any packing
    size, size_text           bytes of a place with a size, and its text ("24GiB"); else None and ""
    """

    device: str
    weights: int
    states: int
    inputs: int
    compute: int
    workspace: int
    score_peak: int
    score_peak_plain: int
    live: tuple[int, ...]
    size: int | None
    size_text: str
    staging: int
    messages: int = 0
    ahead: int = 0
    boxes: int = 0
    connections: int = 0

    @property
    def total(self) -> int:
        leaves = self.weights + self.states + self.inputs
        return leaves + self.compute + self.workspace + self.boxes

    def row(self) -> list[str]:
        return [self.device, *(mib(getattr(self, column)) for column in _COLUMNS)]


#: The columns of the table and their heads.
_SIZES = ("weights", "states", "inputs", "compute", "workspace", "total")
_COLUMNS = (*_SIZES, "score_peak", "score_peak_plain")
#: Of several plans of a store, that of the plan with most.
_LARGEST = (
    "workspace", "staging", "messages", "boxes", "connections", "score_peak", "score_peak_plain"
)  # fmt: skip
_HEADS = ["device", *_SIZES, "score peak", "plain"]


@dataclass(frozen=True, slots=True, repr=False)
class Memory:
    """The bytes that a plan will use: exact, and known before anything is allocated.

    weights, states, inputs, compute, workspace and total are sums over `devices`; `score_peak` is
    the largest of the devices.

    devices               one row each
    amb                   the attention memory budget in bytes, or None
    peak_step, peak_live  the step with the most live bytes on one device, and those bytes
    """

    devices: tuple[DeviceMemory, ...]
    amb: float | None
    peak_step: str
    peak_live: int

    @staticmethod
    def of(work: Work, needs: Sequence[Need], sizes: Mapping[str, Place]) -> Memory:
        """The memory of `work`.

        needs  the plan's leaves
        sizes  places with a size, by device
        """
        rows = []
        top, where = 0, ""
        used = {need.backend.device for need in needs}
        messages = message_bytes(work)
        for device, arena in work.placed.arenas.items():
            if not (arena.nbytes or device in used or device == work.backends[0].device):
                continue
            row = _row(work, device, [need for need in needs if need.backend.device == device])
            row = replace(row, messages=messages.get(device, 0))
            if work.plain is not None:
                row = replace(row, score_peak_plain=work.plain.arenas[device].score_peak)
            if (place := sizes.get(device)) is not None:
                row = replace(row, size=place.size, size_text=place.size_text)
            rows.append(row)
            if max(arena.live, default=0) > top or not where:
                top = max(arena.live, default=0)
                steps = [s for s, live in zip(work.steps, arena.live) if live == top]
                where = label_of(steps[0].node) if steps else ""
        return Memory(tuple(rows), work.amb, where, top)

    @staticmethod
    def joint(plans: Sequence[tuple[Memory, Sequence[Need]]]) -> Memory:
        """The memory of several plans of one store, each given with its leaves.

        Plans share leaves, and on each device the largest arena and workspace.
        """
        needs = {need.key: need for _, each in plans for need in each}.values()
        by_device: dict[str, list[DeviceMemory]] = {}
        for memory, _ in plans:
            for row in memory.devices:
                by_device.setdefault(parse(row.device).backend.device, []).append(row)
        rows = []
        for device, same in by_device.items():
            largest = max(same, key=lambda row: row.compute)
            sizes: dict[str, Any] = leaf_bytes(
                [need for need in needs if need.backend.device == device]
            )
            sizes |= {name: max(getattr(row, name) for row in same) for name in _LARGEST}
            rows.append(replace(largest, **sizes))
        top = max((memory for memory, _ in plans), key=lambda memory: memory.peak_live)
        return replace(top, devices=tuple(rows))

    def _sum(self, what: str) -> int:
        return sum(getattr(row, what) for row in self.devices)

    @property
    def weights(self) -> int:
        return self._sum("weights")

    @property
    def states(self) -> int:
        return self._sum("states")

    @property
    def inputs(self) -> int:
        return self._sum("inputs")

    @property
    def compute(self) -> int:
        return self._sum("compute")

    @property
    def workspace(self) -> int:
        return self._sum("workspace")

    @property
    def total(self) -> int:
        return self._sum("total")

    @property
    def score_peak(self) -> int:
        return max(row.score_peak for row in self.devices)

    @property
    def score_peak_plain(self) -> int:
        return max(row.score_peak_plain for row in self.devices)

    @property
    def live(self) -> tuple[int, ...]:
        """Live bytes in each step, summed over all devices."""
        return tuple(map(sum, zip(*(row.live for row in self.devices))))

    def __repr__(self) -> str:
        parts = ", ".join(f"{mib(row.total)} MiB on {row.device}" for row in self.devices)
        return f"<memory: {parts}>"

    def _repr_html_(self) -> str:
        """For notebooks."""
        from pyggml.page.snippets import memory_html

        return memory_html(self)

    def __str__(self) -> str:
        budget = "none" if self.amb is None else f"{mib(self.amb)} MiB"
        rows = [_HEADS, *(row.row() for row in self.devices)]
        if len(self.devices) > 1:
            rows.append(["all", *(mib(getattr(self, column)) for column in _COLUMNS)])
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [" | ".join(text.rjust(w) for text, w in zip(cells, widths)) for cells in rows]
        lines.append(
            f"MiB. Peak at {self.peak_step or 'no step'} with {mib(self.peak_live)} live; "
            f"attention budget: {budget}."
        )
        lines.append("Score peak: most attention scores alive at once; plain: without a budget.")
        for row in self.devices:
            if row.boxes:
                lines.append(
                    f"Sums with other devices: {mib(row.boxes)} MiB on {row.device}, part of its "
                    "total."
                )
            if row.connections:
                lines.append(
                    f"To connect {row.device} with others takes about {mib(row.connections)} MiB "
                    "more (estimate)."
                )
            if row.staging:
                pinned = f"{mib(row.staging)} MiB of pinned host memory"
                lines.append(f"Copies to and from {row.device} use another {pinned}.")
            if row.ahead:
                lines.append(
                    f"{mib(row.ahead)} MiB of compute on {row.device} are weights of the host, "
                    "read ahead; read_ahead=False (--read-ahead off) does without."
                )
            if row.messages:
                lines.append(
                    f"In a process of its own, messages of {row.device} pass through another "
                    f"{mib(row.messages)} MiB of host memory."
                )
            if row.size is not None:
                short = row.total - row.size
                fits = (
                    f"fits, {mib(-short)} MiB left"
                    if short <= 0
                    else f"does NOT fit: {mib(short)} MiB over"
                )
                lines.append(f"{row.device} (assumed {row.size_text}): {fits}.")
        return "\n".join(lines)


def leaf_bytes(needs: Iterable[Need]) -> dict[str, int]:
    """The bytes of weights, states and inputs."""
    nbytes = {"constant": 0, "state": 0, "input": 0}
    for need in needs:
        nbytes[origin(need.node).op.name] += need.nbytes
    return {f"{'weight' if name == 'constant' else name}s": n for name, n in nbytes.items()}


def _row(work: Work, device: str, needs: Sequence[Need]) -> DeviceMemory:
    """The memory of a plan with these leaves on a device, without a size."""
    backend = next(b for b in work.backends if b.device == device)
    steps = [s for split in work.splits if split.backend.device == device for s in split.steps]
    arena = work.placed.arenas[device]
    joint = [step.joint for step in steps]
    counts = [len(places) for places in {places_of(node) for node in joint if node is not None}]
    return DeviceMemory(
        device=backend.place,
        **leaf_bytes(needs),
        compute=arena.nbytes,
        workspace=max((step.workspace for step in steps), default=0),
        score_peak=arena.score_peak,
        score_peak_plain=arena.score_peak,
        live=arena.live,
        size=None,
        size_text="",
        staging=backend.staging_bytes if steps or needs else 0,
        ahead=bytes_ahead(steps),
        boxes=sum(backend.box_bytes(n) for n in counts) if isinstance(backend, Joins) else 0,
        connections=len(counts) * backend.connection_bytes if isinstance(backend, Joins) else 0,
    )

"""Which copies between the host and devices are part of their runners' runs.

When a decode step's experts run on the host, every layer sends a few KB both ways. For those, a
device's runner can do better than a queued copy for each tensor (`Carries`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pyggml.backends.base import Backend, Carries, Crossing, Event, Runner
from pyggml.backends.step import Address
from pyggml.node import Node
from pyggml.passes.work import Split, Work
from pyggml.transfer import origin


def carry(
    work: Work, runners: Sequence[Runner], at: Mapping[Node, Address]
) -> dict[int, Event | None]:
    """Let runners carry what they can: split -> the event of its copies, if it is the host's.

    A device's split gets what it reads from the host. What a split of the host reads is sent by the
    last split of the device before it, if no other split of the host reads from that one: its
    copies arrive when the host waits, and may overwrite what an earlier split reads.
    """
    splits = work.splits
    senders = dict(_senders(work))  # split of a device -> split of the host
    carried: dict[int, Event | None] = {}
    for i, (split, runner) in enumerate(zip(splits, runners)):
        if split.backend.device == "host" or not isinstance(runner, Carries):
            continue
        source = _only_source(work, split)
        arrivals = [
            Crossing(at[origin(step.node)], at[step.node], step.node.spec)
            for step in (split.copies if source and source.device == "host" else ())
        ]
        reader = senders.get(i)
        departures = [
            Crossing(at[step.node], at[origin(step.node)], step.node.spec)
            for step in (() if reader is None else splits[reader].copies)
        ]
        if not arrivals and not departures:
            continue
        event = runner.carry(arrivals, departures)
        if event is not None:
            carried |= {i: None} if arrivals else {}
            carried |= {} if reader is None else {reader: event}
    return carried


def _senders(work: Work) -> Iterator[tuple[int, int]]:
    """Splits of devices that can send all that a split of the host reads, with this split."""
    last: dict[Backend, int] = {}
    taken: set[int] = set()
    for i, split in enumerate(work.splits):
        if split.backend.device == "host" and split.copies:
            source = _only_source(work, split)
            sender = last.get(source) if source is not None else None
            if sender is not None and sender not in taken:
                taken.add(sender)
                yield sender, i
        elif split.steps:
            last[split.backend] = i


def _only_source(work: Work, split: Split) -> Backend | None:
    """The backend from which all copies of a split come; None if there are several."""
    homes = {work.home(origin(step.node)) for step in split.copies}
    return homes.pop() if len(homes) == 1 else None

"""Joint steps of null devices: a stand-in for a library of collectives.

Each device brings a copy of its part, in its queue. The result is computed when a device's queue
comes to it, from the parts of all. If another device has not come yet, its queue runs until it has;
if it belongs to a rank in another thread, this one waits. A device that comes to its joint steps in
another order finds that nobody comes, which is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, reduce
from threading import Condition, get_ident
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.null.queue import Mark
from pyggml.errors import DeviceError
from pyggml.joint import joint_gather, joint_receive, joint_reduce, joint_send, places_of
from pyggml.node import Node

Values = NDArray[Any]


@dataclass(eq=False)
class _Meeting:
    """One joint step of one run.

    parts    device -> what it has brought
    marks    device -> when its part is there, and the thread that runs its queue
    entered  how many devices have come to it
    """

    entered: int = 0
    parts: dict[int, Values] = field(default_factory=dict)
    marks: dict[int, tuple[Mark, int]] = field(default_factory=dict)

    def has(self, index: int) -> bool:
        return index in self.parts


class Meetings:
    """All joint steps of a process. A device counts its own: step k of one is step k of all.

    patience  seconds that a rank waits for others
    """

    def __init__(self) -> None:
        self.patience = 10.0
        self._changed = Condition()
        self._open: dict[tuple[tuple[str, ...], int], _Meeting] = {}
        self._counts: dict[tuple[tuple[str, ...], int], int] = {}
        self._running: set[str] = set()

    def forget(self) -> None:
        """After an error: steps that not all devices came to."""
        self._open.clear()
        self._counts.clear()

    def enter(self, node: Node) -> _Meeting:
        """The next joint step of the node's device."""
        places, index = places_of(node), int(node.attrs["index"])
        with self._changed:
            count = self._counts[places, index] = self._counts.get((places, index), 0) + 1
            meeting = self._open.setdefault((places, count), _Meeting())
            meeting.entered += 1
            if meeting.entered == len(places):  # nobody else will look for it
                del self._open[places, count]
            return meeting

    def bring(self, meeting: _Meeting, node: Node, values: Values) -> None:
        with self._changed:
            meeting.parts[int(node.attrs["index"])] = values.copy()
            self._changed.notify_all()

    def announce(self, meeting: _Meeting, node: Node, mark: Mark) -> None:
        """Say when the part will be there: at this point of the device's queue."""
        with self._changed:
            meeting.marks[int(node.attrs["index"])] = mark, get_ident()

    def result(self, meeting: _Meeting, node: Node) -> Values:
        places = places_of(node)
        if node.op is joint_receive:
            places = places[:1]
        for index, place in enumerate(places):
            mark, thread = meeting.marks.get(index, (None, 0))
            if index not in meeting.parts and mark is not None and thread == get_ident():
                self._run_to(place, mark)
            with self._changed:
                if not self._changed.wait_for(partial(meeting.has, index), self.patience):
                    turn = node.attrs["turn"]
                    raise DeviceError(f"{place} does not come to joint step {turn} of {places}")
        return combined(node, [meeting.parts[i] for i in range(len(places))])

    def _run_to(self, place: str, mark: Mark) -> None:
        """Run the queue of another device; not one that already runs for somebody who waits."""
        if place in self._running:
            raise DeviceError(f"{place} waits for a device that waits for it, in joint steps")
        self._running.add(place)
        try:
            mark.wait()
        finally:
            self._running.discard(place)


MEETINGS = Meetings()


def combined(node: Node, parts: list[Values]) -> Values:
    """The result of a joint step on the device of `node`, flat, from the parts of all."""
    flat = [part.reshape(-1) for part in parts]
    if node.op is joint_receive:
        return flat[0]
    if node.op is joint_gather:
        return np.concatenate(flat)
    total = reduce(lambda a, b: (a + b).astype(a.dtype), flat)
    if node.op is joint_reduce:
        return total
    n, index = node.spec.elements, int(node.attrs["index"])
    return total[index * n : (index + 1) * n]


def tasks_of(
    node: Node, read: Callable[[], Values], write: Callable[[Values], None]
) -> tuple[Callable[[], None], Callable[[], None], Callable[[Mark], None]]:
    """What a device's queue does in a run of a joint step: bring its part, then take the result;
    and a function that says at which point of the queue the first is done."""
    meeting = MEETINGS.enter(node)
    brings, takes = node.op is not joint_receive, node.op is not joint_send
    return (
        lambda: MEETINGS.bring(meeting, node, read()) if brings else None,
        lambda: write(MEETINGS.result(meeting, node)) if takes else None,
        lambda mark: MEETINGS.announce(meeting, node, mark),
    )

"""Sums over GPUs by our own kernels (kernels/include/rounds.cuh): which launches send and add.

Steps are recorded as if a collective added. When they are bound for GPUs that reach each other's
memory, the launch in front of it sends the part and the one behind it adds up parts, if they can;
else peer_sum.cu does what they leave. Each GPU chooses by its own steps, for all agree on the
numbers of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pyggml.backends.cuda import peer_sum
from pyggml.backends.cuda.argument import pack
from pyggml.backends.cuda.launch import Collective, Launch, Record
from pyggml.backends.cuda.peers import Boxes, Round
from pyggml.backends.step import Step


def with_own_sums(
    steps: Sequence[Step],
    records: Sequence[Sequence[Record]],
    boxes_of: Callable[[tuple[str, ...]], Boxes | None],
    overlap: bool,
) -> list[list[Record]]:
    """The records of these steps, with our own kernels in place of sums if they are small.

    boxes_of  the boxes of these places, if they reach each other's memory
    """
    result = [[*own] for own in records]
    turns: dict[Boxes, int] = {}
    last: dict[Boxes, int] = {}  # the step that reads the last small sum
    for index, own in enumerate(records):
        total = next((record for record in own if isinstance(record, Collective)), None)
        boxes = None if total is None else boxes_of(total.places)
        if total is None or boxes is None or not peer_sum.suits(total):
            continue
        if total.row:
            result[index] = _replaced(
                result[index], total, [peer_sum.rows_launch(total, boxes, overlap)]
            )
            continue
        turns[boxes] = turns.get(boxes, 0) + 1
        number = peer_sum.round_of(boxes, turns[boxes])
        sender, reader = _sender(steps, result, index, total), _reader(steps, result, index, total)
        sent = sender is not None and _meets(result, sender, number)
        if sent and reader is not None and total.tail is None and _meets(result, reader, number):
            result[index], last[boxes] = _replaced(result[index], total, []), reader[0]
            continue
        launch = peer_sum.launch_of(total, number, sent, overlap)
        result[index], last[boxes] = _replaced(result[index], total, [launch]), index
    for boxes, index in last.items():
        args = pack([np.uint64(peer_sum.round_of(boxes, 0).rounds), np.int32(turns[boxes])])
        result[index].append(Launch(peer_sum.FILE, "end_of_run", *ONE, args, 0, overlap))
    return result


ONE = (1, 1, 1), (1, 1, 1)


def _replaced(
    records: Sequence[Record], total: Collective, launches: Sequence[Launch]
) -> list[Record]:
    """The records of a step with these launches in place of a sum, and of what they cover."""
    covered = set(map(id, () if total.tail is None else total.tail.covers))
    return [
        x
        for record in records
        if id(record) not in covered
        for x in (launches if record is total else (record,))
    ]


#: A launch, as the numbers of its step and its record.
Place = tuple[int, int]


def _meets(records: list[list[Record]], at: Place, number: Round) -> bool:
    """Put the launch that meets others in place of this one."""
    launch = records[at[0]][at[1]]
    assert isinstance(launch, Launch) and launch.meeting is not None
    records[at[0]][at[1]] = launch.meeting.launch(number)
    return True


def _sender(
    steps: Sequence[Step], records: Sequence[Sequence[Record]], index: int, total: Collective
) -> Place | None:
    """The launch that computes the part, if it can send it."""
    part = steps[index].reads[0].base
    for i in reversed(range(index)):
        if steps[i].node is part:
            return _meeting(records, i, total.source, sends=True)
    return None


def _reader(
    steps: Sequence[Step], records: Sequence[Sequence[Record]], index: int, total: Collective
) -> Place | None:
    """The launch that reads the sum, which is where the part was, if it can add up parts and no
    other step reads it."""
    node = steps[index].node
    readers = [i for i, step in enumerate(steps) if any(x.base is node for x in step.reads)]
    if len(readers) != 1 or total.source != total.target:
        return None
    return _meeting(records, readers[0], total.target, sends=False)


def _meeting(records: Sequence[Sequence[Record]], step: int, at: int, sends: bool) -> Place | None:
    for place, record in enumerate(records[step]):
        meeting = record.meeting if isinstance(record, Launch) else None
        if meeting is not None and (meeting.at, meeting.sends) == (at, sends):
            return step, place
    return None

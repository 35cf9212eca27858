"""Runs that read and write the host's memory: a decode step's inputs and its logits.

A copy of the logits behind the graph takes 16 us, in which the GPU does nothing else. The product
that computes them reads its weights for 40 us; 400 kB in pinned memory, written across the bus by
the same blocks, are on their way meanwhile. Where a result goes is an argument of a launch, so each
place in pinned memory has graphs of its own. There are `PLACES` of them: a caller still has a
token's logits while the next ones are computed. If no place is free, the result is copied.

The first kernel of these graphs brings the inputs from pinned memory (relay.cu). It takes the GPU 2
to 3 us, and the call that queues a copy takes the host 4 to 10, by what is left in its caches.

Two designs that lost: a place that the kernel reads from a word needs a copy of that word in front
of each run; a fixed place needs a copy by the host, which takes longer than all else that it does
for a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.cuda import relay
from pyggml.backends.cuda.device.parts import Part
from pyggml.backends.cuda.device.pinned import Staging
from pyggml.backends.cuda.device.prepared import Downloads, Group, Uploads
from pyggml.backends.cuda.fusion import CudaStep
from pyggml.backends.cuda.launch import Launch
from pyggml.backends.cuda.linear.common import VEC
from pyggml.backends.cuda.runner import CudaRunner

PLACES = 2

Action = Callable[[], None]


class Direct:
    """Runs of a plan whose only output is the result of step `index`.

    mail  pinned memory for the inputs; the last run's are no longer read when a run begins, because
          each waits for its end
    """

    def __init__(
        self,
        staging: Staging,
        groups: Sequence[Group],
        mail: Part,
        runner: CudaRunner,
        index: int,
        download: Downloads,
    ) -> None:
        assert staging.results is not None
        self._parts = staging.results.parts
        self._room = self._parts.room(download.nbytes)
        self._runner, self._index, self._download = runner, index, download
        self._mail = np.asarray(mail).data  # keeps the part
        starts = relay.places(group.nbytes for group in groups)
        copies = [(g.ptr, mail.address + at, g.nbytes) for g, at in zip(groups, starts)]
        self._bring = relay.actions(staging.context, copies)
        #: The number of each input, and where it is in `mail`.
        self._pieces = [
            (number, at + start, at + start + nbytes)
            for group, at in zip(groups, starts)
            for number, start, nbytes in group.pieces
        ]
        #: First unit of a part for the result -> graphs that write there.
        self._graphs: dict[int, list[Action]] = {}

    def queue(self, arrays: Sequence[NDArray[Any]]) -> NDArray[Any] | None:
        """Queue a run; its result, complete once all queued work has been waited for. None if
        nothing was queued, because there is no room or the first run is still to come. The context
        is current."""
        parts, room = self._parts, self._room
        for place in self._graphs:
            if parts.free.startswith(room, place):
                break
        else:
            new = self._new_place()
            if new is None:
                return None
            place = new
        mail = self._mail
        for number, start, end in self._pieces:
            mail[start:end] = arrays[number].tobytes()
        self._runner.replay(self._graphs[place])
        # All else comes after the launch, because the GPU is working then.
        return self._download.within(parts.part_at(self._download.nbytes, place))

    def _new_place(self) -> int | None:
        """Capture graphs that write to a part which is free."""
        if not self._runner.replays or len(self._graphs) == PLACES:
            return None
        part = self._parts.part(self._download.nbytes)
        if part is None:
            return None
        self._graphs[part.first] = self._runner.writing(self._index, part.address, self._bring)
        return part.first


def direct(
    staging: Staging,
    uploads: Sequence[Uploads],
    runner: CudaRunner,
    downloads: Sequence[Downloads],
) -> Direct | None:
    """Such runs with these inputs and outputs; None if a kernel cannot bring the inputs, or if no
    product writes the only output."""
    if len(downloads) != 1 or not downloads[0].stays:
        return None
    index = _writer(runner, downloads[0])
    groups = [group for upload in uploads for group in upload.groups]
    if index is None or any(upload.others for upload in uploads) or not _can_bring(groups):
        return None
    with staging.context:
        staging.prepare()
        assert staging.mail is not None
        staging.settle()  # a run whose plan is gone may still read a part that is free
        mail = staging.mail.part(relay.places(group.nbytes for group in groups)[-1])
        return None if mail is None else Direct(staging, groups, mail, runner, index, downloads[0])


def _can_bring(groups: Sequence[Group]) -> bool:
    """Whether one launch of relay.cu can."""
    small = all(group.nbytes <= relay.LARGEST and group.ptr % 16 == 0 for group in groups)
    return small and len(groups) <= relay.MOST


def _writer(runner: CudaRunner, download: Downloads) -> int | None:
    """The number of the step that writes the result, if it is a product with few columns and no
    step reads what it writes."""
    for index, step in reversed([*enumerate(runner.steps)]):
        node = step.node
        at = runner.at[node]
        if (at.buffer.ptr + at.offset, node.spec.nbytes) != (download.ptr, download.nbytes):
            continue
        records = runner.records[index]
        is_product = all(isinstance(each, Launch) and each.file == VEC for each in records)
        is_read = any(read.base is node for each in runner.steps for read in each.reads)
        is_whole = isinstance(step, CudaStep) and bool(records)
        return index if is_whole and is_product and not is_read else None
    return None

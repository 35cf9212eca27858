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

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.cuda import relay
from pyggml.backends.cuda.device.context import Context
from pyggml.backends.cuda.device.parts import Part
from pyggml.backends.cuda.device.pinned import Staging
from pyggml.backends.cuda.device.prepared import Downloads, Group, Uploads
from pyggml.backends.cuda.fusion import CudaStep
from pyggml.backends.cuda.launch import Launch
from pyggml.backends.cuda.linear.common import VEC
from pyggml.backends.cuda.runner import CudaRunner
from pyggml.backends.cuda.together import Together
from pyggml.backends.step import Step
from pyggml.joint import joint_gather

PLACES = 2

Action = Callable[[], object]


class Replays(Protocol):
    """Who replays graphs: a runner of one GPU, or of several."""

    @property
    def replays(self) -> bool: ...

    def replay(self, graphs: Sequence[Any]) -> None: ...


class Direct:
    """Runs of a plan whose only output a product writes, or one of each GPU.

    mail     pinned memory for the inputs; the last run's are no longer read when a run begins,
             because each waits for its end
    capture  captures graphs that bring the inputs, and write the output to an address
    """

    def __init__(
        self,
        staging: Staging,
        groups: Sequence[Group],
        mail: Part,
        runner: Replays,
        capture: Callable[[int], Sequence[Action]],
        download: Downloads,
    ) -> None:
        assert staging.results is not None
        self._parts = staging.results.parts
        self._room = self._parts.room(download.nbytes)
        self._runner, self._capture, self._download = runner, capture, download
        self._mail = np.asarray(mail).data  # keeps the part
        #: The number of each input, and where it is in `mail`.
        self._pieces = [
            (number, at + start, at + start + nbytes)
            for group, at in zip(groups, relay.places(group.nbytes for group in groups))
            for number, start, nbytes in group.pieces
        ]
        #: First unit of a part for the result -> graphs that write there.
        self._graphs: dict[int, Sequence[Action]] = {}

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
        self._graphs[part.first] = self._capture(part.address)
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
    groups = _groups(uploads)
    mail = None if index is None or groups is None else _mail(staging, groups)
    if index is None or groups is None or mail is None:
        return None
    bring = _bringing(staging.context, groups, mail, range(len(groups)))

    def capture(ptr: int) -> Sequence[Action]:
        return runner.writing(index, ptr, bring)

    return Direct(staging, groups, mail, runner, capture, downloads[0])


def direct_of_several(
    staging: Staging,
    uploads: Sequence[Uploads],
    together: Together,
    downloads: Sequence[Downloads],
) -> Direct | None:
    """The same of several GPUs that each compute a part of the output. None also if the parts are
    not put together by the last step that all take.

    staging  that of the GPU with the whole output
    """
    if len(downloads) != 1 or not downloads[0].stays:
        return None
    writers, groups = _writers(together, downloads[0]), _groups(uploads)
    mail = None if writers is None or groups is None else _mail(staging, groups)
    if writers is None or groups is None or mail is None:
        return None
    contexts = [runner.context for runner in together.runners]
    owners = [each.context for upload in uploads for each in [upload] * len(upload.groups)]
    brings = [
        _bringing(context, groups, mail, [i for i, own in enumerate(owners) if own is context])
        for context in contexts
    ]

    def capture(ptr: int) -> Sequence[Action]:
        instead = []
        for runner, writer in zip(together.runners, writers):
            with runner.context:
                actions = runner.rewritten(writer.product, ptr + writer.start)
            instead.append({writer.product: actions, writer.gather: ()})
        return together.writing(brings, instead)

    return Direct(staging, groups, mail, together, capture, downloads[0])


def _groups(uploads: Sequence[Uploads]) -> list[Group] | None:
    """The groups of inputs, if one launch of relay.cu can bring those of each GPU."""
    if any(upload.others or not _can_bring(upload.groups) for upload in uploads):
        return None
    return [group for upload in uploads for group in upload.groups]


def _mail(staging: Staging, groups: Sequence[Group]) -> Part | None:
    """Pinned memory for them, which all GPUs can read."""
    with staging.context:
        staging.prepare()
        assert staging.mail is not None
        staging.settle()  # a run whose plan is gone may still read a part that is free
        return staging.mail.part(relay.places(group.nbytes for group in groups)[-1])


def _bringing(
    context: Context, groups: Sequence[Group], mail: Part, own: Iterable[int]
) -> list[Callable[[], None]]:
    """The launch that brings the groups with these numbers."""
    starts = relay.places(group.nbytes for group in groups)
    copies = [(groups[i].ptr, mail.address + starts[i], groups[i].nbytes) for i in own]
    with context:
        return relay.actions(context, copies)


def _can_bring(groups: Sequence[Group]) -> bool:
    """Whether one launch of relay.cu can."""
    small = all(group.nbytes <= relay.LARGEST and group.ptr % 16 == 0 for group in groups)
    return small and len(groups) <= relay.MOST


def _writer(runner: CudaRunner, download: Downloads) -> int | None:
    """The number of the step that writes the result, if it is a product with few columns and no
    step reads what it writes."""
    index = _last_to(runner, download)
    return (
        index
        if index is not None and _is_product(runner, index) and not _readers(runner, index)
        else None
    )


def _last_to(runner: CudaRunner, download: Downloads) -> int | None:
    """The number of the last step that writes to the memory of the output."""
    for index, step in reversed([*enumerate(runner.steps)]):
        node = step.node
        at = runner.at[node]
        if (at.buffer.ptr + at.offset, node.spec.nbytes) == (download.ptr, download.nbytes):
            return index
    return None


def _is_product(runner: CudaRunner, index: int) -> bool:
    records = runner.records[index]
    products = all(isinstance(each, Launch) and each.file == VEC for each in records)
    return isinstance(runner.steps[index], CudaStep) and bool(records) and products


def _readers(runner: CudaRunner, index: int) -> list[Step]:
    node = runner.steps[index].node
    return [step for step in runner.steps if any(read.base is node for read in step.reads)]


class Writer(NamedTuple):
    """Of a GPU: the step that computes its part of an output, the step that puts parts together,
    and where the part is in the output."""

    product: int
    gather: int
    start: int


def _writers(together: Together, download: Downloads) -> list[Writer] | None:
    """Those of each GPU, if each part is written by a product and read by nothing else, and nothing
    reads the output."""
    last = [_last_to(runner, download) for runner in together.runners]
    turns = {
        runner.steps[i].node.attrs["turn"]
        for runner, i in zip(together.runners, last)
        if i is not None and runner.steps[i].node.op is joint_gather
    }
    writers = [_writer_of(runner, turn) for runner in together.runners for turn in turns]
    alone = len(turns) == 1 and len(writers) == len(together.runners)
    found = [writer for writer in writers if writer is not None]
    return found if alone and len(found) == len(writers) else None


def _writer_of(runner: CudaRunner, turn: int) -> Writer | None:
    for gather, step in enumerate(runner.steps):
        node = step.joint
        if node is None or node.op is not joint_gather or node.attrs["turn"] != turn:
            continue
        part = node["part"].base
        product = next((i for i in range(gather) if runner.steps[i].node is part), None)
        if product is None or not node["part"].contiguous or _readers(runner, gather):
            return None
        if not _is_product(runner, product) or _readers(runner, product) != [step]:
            return None
        start = sum(node.attrs["sizes"][: node.attrs["index"]])
        return Writer(product, gather, node.dtype.row_bytes(start))
    return None

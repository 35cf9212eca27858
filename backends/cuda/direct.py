"""Results that a product writes into the host's memory itself: the logits of a decode step.

A copy behind the graph takes 16 us, in which the GPU does nothing else. The product that computes
logits reads its weights for 40 us; 400 kB in pinned memory, written across the bus by the same
blocks, are on their way meanwhile. Where a result goes is an argument of a launch, so each place in
pinned memory has graphs of its own. There are `PLACES` of them: a caller still has a token's logits
while the next ones are computed. Results for which no place is free are copied.

Two designs that lost: an address that the kernel reads from a word needs a copy of that word in
front of each run; a fixed place needs a copy by the host, which takes longer than all else that it
does for a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyggml.backends.cuda.device.parts import Part, Parts
from pyggml.backends.cuda.device.pinned import Staging
from pyggml.backends.cuda.device.prepared import Downloads
from pyggml.backends.cuda.fusion import CudaStep
from pyggml.backends.cuda.launch import Launch
from pyggml.backends.cuda.linear.common import VEC
from pyggml.backends.cuda.runner import CudaRunner

PLACES = 2


class Direct:
    """Runs whose step `index` writes the result of a download into pinned memory."""

    def __init__(self, parts: Parts, runner: CudaRunner, index: int, download: Downloads) -> None:
        self._parts, self._runner, self._index = parts, runner, index
        self.download = download
        #: First unit of a part -> graphs that write there.
        self._graphs: dict[int, list[Callable[[], None]]] = {}

    def queue(self) -> Part | None:
        """Queue a run; where its result will be, or None if that has to be copied. The context is
        current."""
        place = self._place() if self._runner.replays else None
        if place is None:
            self._runner.queue()
            return None
        self._runner.queue(self._graphs[place])
        return self._parts.part(self.download.nbytes, place)  # now: the GPU is already working

    def _place(self) -> int | None:
        """The first unit of a part that is free, and for which there are graphs."""
        parts, nbytes = self._parts, self.download.nbytes
        for first in self._graphs:
            if parts.is_free(nbytes, first):
                return first
        part = parts.part(nbytes) if len(self._graphs) < PLACES else None
        if part is None:
            return None
        self._graphs[part.first] = self._runner.writing(self._index, part.address)
        return part.first


def direct(staging: Staging, runner: CudaRunner, downloads: Sequence[Downloads]) -> Direct | None:
    """The runs that write one of these downloads into pinned memory; None if no product can."""
    for download in downloads:
        others = [each for each in downloads if each is not download]
        if download.stays and not any(download.overlaps(other) for other in others):
            index = _writer(runner, download)
            if index is not None:
                staging.prepare()
                assert staging.results is not None
                return Direct(staging.results.parts, runner, index, download)
    return None


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

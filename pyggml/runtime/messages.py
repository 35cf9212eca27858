"""The messages of a rank in a run of a plan, and the host memory that they pass through.

Both follow from the planned graph, so `plan.memory` knows them before anything is allocated. A
tensor that is not contiguous in host memory is copied to a block before it is sent; its part of the
block is planned like an arena, from the split that computes the tensor to the last one that reads
it. One more part is for such a tensor that arrives; they come one at a time.
"""

from __future__ import annotations

from typing import NamedTuple

from pyggml.backends.base import in_host_memory
from pyggml.node import Node
from pyggml.passes.arena import Interval, pack
from pyggml.passes.work import Work
from pyggml.runtime.ranks import FIRST, owner_of
from pyggml.transfer import origin

#: Tensors in the block begin at multiples of it, in bytes.
ALIGNMENT = 64


class Sent(NamedTuple):
    """A tensor that other ranks read.

    node     the tensor, on a device of this rank
    readers  (rank, tag, split) of each message
    """

    node: Node
    readers: list[tuple[int, int, int]]


class Received(NamedTuple):
    """A copy on a device of this rank of a tensor that `owner` has."""

    node: Node
    owner: int
    tag: int


class Messages:
    """The messages of one rank.

    sent      split -> what is sent after it is issued
    received  copy -> its message
    staged    tensor that is not sent from where it is -> its place in the block
    landing   where tensors that are not received in place arrive in the block
    nbytes    of the block
    """

    def __init__(self, work: Work, rank: int) -> None:
        self.sent: dict[int, dict[Node, Sent]] = {}
        self.received: dict[Node, Received] = {}
        self._find(work, rank)
        intervals: dict[Node, Interval] = {}
        for i, nodes in self.sent.items():
            for node, sent in nodes.items():
                if not is_plain(work, node):
                    last = max(split for _, _, split in sent.readers)
                    intervals[node] = Interval(i, last, node.spec.nbytes)
        offsets, end = pack(list(intervals.values()), ALIGNMENT)
        self.staged = dict(zip(intervals, offsets))
        self.landing = -(-end // ALIGNMENT) * ALIGNMENT
        arriving = (node.spec.nbytes for node in self.received if not is_plain(work, node))
        self.nbytes = self.landing + max(arriving, default=0)

    def _find(self, work: Work, rank: int) -> None:
        """The messages of all splits."""
        splits = work.splits
        producer = {n: i for i, split in enumerate(splits) for s in split.steps for n in s.nodes}
        first = FIRST  # the tag of the split's first step
        for i, split in enumerate(splits):
            reader = owner_of(work.shard, split.backend)
            for tag, step in enumerate(split.copies, first):
                source = origin(step.node)
                owner = owner_of(work.shard, work.home(source))
                if owner != reader == rank:
                    self.received[step.node] = Received(step.node, owner, tag)
                if reader != owner == rank:
                    after = self.sent.setdefault(producer.get(source.base, i), {})
                    after.setdefault(source, Sent(source, [])).readers.append((reader, tag, i))
            first += len(split.copies) + len(split.steps)


def is_plain(work: Work, node: Node) -> bool:
    """Whether a tensor is contiguous in host memory."""
    spot = work.placed.spots[node]
    layout = work.layouts.get(node if spot.base is None else spot.base)
    plain = layout is None or layout.name == "plain"
    return plain and in_host_memory(work.home(node)) and spot.nb == node.spec.nb


def message_bytes(work: Work) -> dict[str, int]:
    """Device of the shard -> the bytes of the block, if each device has a process of its own."""
    devices = () if work.shard is None else work.shard.devices
    return {backend.device: Messages(work, rank).nbytes for rank, backend in enumerate(devices)}

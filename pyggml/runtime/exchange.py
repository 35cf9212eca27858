"""The messages of a plan: copies from and to the devices of other ranks.

A copy between the devices of two ranks is a message. All ranks walk the splits in one order. A rank
sends a tensor as soon as the split that computes it has been issued, and receives one when it comes
to the split that reads it. It waits for the end of a send before its next split after the reader's:
memory that a plan reuses is free by then, as it is for devices of one process (`Split.spares`).

No rank waits in a circle. A rank that waits at some split waits for another one to get to a split
not later than that, and a message was sent before that split is reached. So the rank that is at the
earliest split can always go on.

A contiguous tensor in host memory is sent and received where it is. Others pass through a block of
host memory that is planned (messages.py) and shared by all plans of the process.

Waiting for the reader before anything is sent (both at the place of the copy) lost: with two
devices that exchange parts, the second would begin to send when the first has received and gone on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.base import Backend
from pyggml.backends.step import Address
from pyggml.node import Node
from pyggml.passes.work import Work
from pyggml.runtime.arrays import raw_shape, raw_type
from pyggml.runtime.messages import Messages, is_plain
from pyggml.runtime.ranks import FIRST, Bytes, Ranks, Request
from pyggml.spec import Spec


class Pending(NamedTuple):
    """A message on its way, and the split that reads it."""

    request: Request
    peer: int
    split: int


class Exchange:
    """The messages of one execution on one rank.

    owns  whether a device is this rank's
    """

    def __init__(self, work: Work, at: Mapping[Node, Address], ranks: Ranks) -> None:
        self.ranks, self._work, self._at = ranks, work, at
        self.owns = ranks.owns(work)
        self._messages = Messages(work, ranks.rank)
        self._sent, self._received = self._messages.sent, self._messages.received
        self._pending: list[Pending] = []
        self._outputs = FIRST + len(work.steps)  # their first tag
        ranks.reserve(self.nbytes)

    @property
    def nbytes(self) -> int:
        """The bytes of host memory that tensors pass through."""
        return self._messages.nbytes

    def _owner(self, backend: Backend) -> int:
        return self.ranks.owner(self._work.shard, backend)

    # -- a run --------------------------------------------------------------------------------

    def before(self, i: int) -> None:
        """Before split `i` is issued, or passed over: memory of earlier messages becomes free."""
        split = self._work.splits[i]
        if self.owns(split.backend) or i in self._sent:
            self._complete(i)

    def after(self, i: int) -> None:
        """After split `i` was issued or passed over: send what it computed, and what no split of
        this run computes, such as a state, if split `i` reads it."""
        for sent in self._sent.get(i, {}).values():
            data = self._data(sent.node)
            for peer, tag, split in sent.readers:
                self._pending.append(Pending(self.ranks.send(data, peer, tag), peer, split))

    def receives(self, node: Node) -> bool:
        """Whether a transfer comes from another rank."""
        return node in self._received

    def receive(self, node: Node) -> None:
        """Wait for the message of a transfer, and put it at its address."""
        received, at, spec = self._received[node], self._at[node], node.spec
        home = self._work.home(node)
        if is_plain(self._work, node):
            self.ranks.receive(_bytes_at(at, spec), received.owner, received.tag)
            return
        data = self.ranks.block[self._messages.landing :][: spec.nbytes]
        self.ranks.receive(data, received.owner, received.tag)
        home.upload(at, spec, _array_of(data, spec))

    def finish(self) -> None:
        """Wait until all that was sent has been received."""
        self._complete(len(self._work.splits))

    def _complete(self, i: int) -> None:
        """Wait for the messages that splits before `i` read."""
        rest = []
        for pending in self._pending:
            if pending.split < i:
                self.ranks.wait(pending.request, pending.peer)
            else:
                rest.append(pending)
        self._pending = rest

    def _data(self, node: Node) -> Bytes:
        """The bytes of a tensor, in place or in `staging`. Waits for the device that has it."""
        home, at, spec = self._work.home(node), self._at[node], node.spec
        offset = self._messages.staged.get(node)
        if offset is None:
            return _bytes_at(at, spec)
        block = self.ranks.block
        home.send(at, Address(block, offset, spec.nb), spec).wait()
        return block[offset : offset + spec.nbytes]

    # -- outputs ------------------------------------------------------------------------------

    def output(
        self, number: int, node: Node, arrival: Callable[[], NDArray[Any]] | None
    ) -> Callable[[], NDArray[Any]]:
        """A function that returns an output on every rank.

        number   of the output
        arrival  waits for it and returns a copy; None if its device is another rank's
        """
        owner, tag = self._owner(self._work.home(node)), self._outputs + number

        def shared() -> NDArray[Any]:
            if arrival is None:
                data = np.empty(node.spec.nbytes, np.uint8)
                self.ranks.spread(data, owner, tag)
                return _array_of(data, node.spec)
            try:
                array = np.ascontiguousarray(arrival())
            except BaseException as error:
                self.ranks.failed(error)
                raise
            self.ranks.spread(array.reshape(-1).view(np.uint8), owner, tag)
            return array

        return shared


def _bytes_at(at: Address, spec: Spec) -> Bytes:
    """The bytes of a tensor that is plain."""
    data: Bytes = at.buffer[at.offset : at.offset + spec.nbytes]
    return data


def _array_of(data: Bytes, spec: Spec) -> NDArray[Any]:
    """Bytes as the array that a tensor stores."""
    kind = np.dtype(spec.dtype.numpy) if spec.dtype.numpy else raw_type(spec.dtype)
    return data.view(kind).reshape(raw_shape(spec))

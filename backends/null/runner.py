"""Steps on a null device: NumPy's kernels on its memory, put into its queue one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pyggml.backends.null.memory import PRIVATE
from pyggml.backends.step import Address, Buffer, Step, WeightLayout
from pyggml.node import Node
from pyggml.ops.leaf import data_of
from pyggml.transfer import origin

if TYPE_CHECKING:
    from pyggml.backends.null.device import NullDevice

#: Scratch of each unpacked weight begins at a multiple of this.
STEP = 64


def _room(nbytes: int) -> int:
    return -(-nbytes // STEP) * STEP


def room_for_weights(step: Step, layouts: Mapping[Node, WeightLayout]) -> int:
    """Bytes in which a step's private weights stand plain while it runs."""
    kept = {n for n in step.reads if n in layouts and layouts[n].name == PRIVATE}
    return sum(_room(node.spec.nbytes) for node in kept)


class NullRunner:
    """Steps bound to a null device's memory."""

    def __init__(
        self,
        device: NullDevice,
        steps: Sequence[Step],
        at: Mapping[Node, Address],
        scratch: Buffer,
        scratch_at: Sequence[int],
    ) -> None:
        self.device = device
        memory = device.bytes_of(scratch)
        self._tasks = [
            self._loading(step, at[step.node])
            if step.layout is not None
            else self._task(step, at, Address(memory, offset, (1, 1, 1, 1)))
            for step, offset in zip(steps, scratch_at)
        ]

    def run(self) -> None:
        """Put every step into the queue."""
        for task in self._tasks:
            self.device.queue.add(task)

    def run_step(self, index: int) -> None:
        """Put one step into the queue."""
        self.device.queue.add(self._tasks[index])

    def _loading(self, step: Step, at: Address) -> Callable[[], None]:
        assert step.layout is not None
        nbytes, weight = step.layout.nbytes, data_of(origin(step.node))
        return lambda: self.device.load(at, nbytes, weight)

    def _task(self, step: Step, at: Mapping[Node, Address], scratch: Address) -> Callable[[], None]:
        """The step on NumPy: weights unpacked into its scratch, its own scratch behind them."""
        needed = [n for n in (step.node, *step.nodes, *step.reads, *step.node.src) if n is not None]
        mine = {node: self.device.seen(at[node]) for node in needed}
        unpack: list[tuple[Address, Address, int]] = []
        offset = scratch.offset
        for node in dict.fromkeys(step.reads):
            if at[node].layout == PRIVATE:
                mine[node] = Address(scratch.buffer, offset, node.spec.nb)
                unpack.append((at[node], mine[node], node.spec.nbytes))
                offset += _room(node.spec.nbytes)
        own = replace(step, scratch=step.scratch - (offset - scratch.offset))
        runner = self.device.host.bind([own], mine, scratch.buffer, [offset])

        def task() -> None:
            for kept, plain, nbytes in unpack:
                into = plain.buffer[plain.offset : plain.offset + nbytes]
                self.device.unpacked(kept, into)
            runner.run()

        return task

"""Steps on a null device: NumPy's kernels on its memory, queued one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter_ns
from typing import TYPE_CHECKING

from pyggml.backends.base import Kernels
from pyggml.backends.host_memory import aligned
from pyggml.backends.null.memory import PRIVATE
from pyggml.backends.step import Address, Addresses, Buffer, Layouts, LoadStep, Step
from pyggml.backends.timing import Fastest, Stopwatch, differences
from pyggml.ops.leaf import data_of
from pyggml.transfer import origin

if TYPE_CHECKING:
    from pyggml.backends.null.device import NullDevice


def weight_scratch(step: Step, layouts: Layouts) -> int:
    """Bytes of scratch for plain copies of the private weights that a step reads."""
    weights = {n for n in step.reads if n in layouts and layouts[n].name == PRIVATE}
    return sum(aligned(node.spec.nbytes) for node in weights)


class NullRunner:
    """Steps bound to a null device's memory."""

    def __init__(
        self,
        device: NullDevice,
        steps: Sequence[Step],
        at: Addresses,
        scratch: Buffer,
        scratch_at: Sequence[int],
    ) -> None:
        self.device = device
        self._steps, self._at = tuple(steps), at
        memory = device.bytes_of(scratch)
        self._tasks = [
            self._load_task(step, at[step.node])
            if isinstance(step, LoadStep)
            else self._kernel_task(step, at, Address(memory, offset, (1, 1, 1, 1)))
            for step, offset in zip(steps, scratch_at)
        ]

    def run(self) -> None:
        """Queue every step."""
        for task in self._tasks:
            self.device.queue.add(task)

    def run_step(self, index: int) -> None:
        """Queue one step."""
        self.device.queue.add(self._tasks[index])

    def kernels(self, index: int) -> Kernels:
        return self.device.kernels_of(self._steps[index], self._at, 0)

    def stopwatch(self) -> Stopwatch:
        """The clock is read in the queue, before the first task and after each."""

        def take() -> Callable[[], list[float]]:
            marks: list[int] = []
            self.device.queue.add(lambda: marks.append(perf_counter_ns()))
            for task in self._tasks:
                self.device.queue.add(task)
                self.device.queue.add(lambda: marks.append(perf_counter_ns()))
            return lambda: differences(marks)

        return Fastest(take)

    def _load_task(self, step: LoadStep, at: Address) -> Callable[[], None]:
        nbytes, weight = step.layout.nbytes, data_of(origin(step.node))
        return lambda: self.device.load(at, nbytes, weight)

    def _kernel_task(self, step: Step, at: Addresses, scratch: Address) -> Callable[[], None]:
        """Unpack the step's private weights into its scratch, then run it on NumPy with the rest of
        the scratch."""
        needed = [n for n in (step.node, *step.nodes, *step.reads, *step.node.src) if n is not None]
        places = {node: self.device.on_host(at[node]) for node in needed}
        unpack: list[tuple[Address, Address, int]] = []
        offset = scratch.offset
        for node in dict.fromkeys(step.reads):
            if at[node].layout == PRIVATE:
                places[node] = Address(scratch.buffer, offset, node.spec.nb)
                unpack.append((at[node], places[node], node.spec.nbytes))
                offset += aligned(node.spec.nbytes)
        plain_step = replace(step, scratch=step.scratch - (offset - scratch.offset))
        runner = self.device.host.bind([plain_step], places, scratch.buffer, [offset])

        def task() -> None:
            for weight, plain, nbytes in unpack:
                out = plain.buffer[plain.offset : plain.offset + nbytes]
                self.device.unpack(weight, out)
            runner.run()

        return task

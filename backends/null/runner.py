"""Steps on a null device: NumPy's kernels on its memory, queued one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.base import Crossing, Event, Kernels
from pyggml.backends.host_memory import aligned
from pyggml.backends.null.meeting import tasks_of
from pyggml.backends.null.memory import PRIVATE
from pyggml.backends.step import Address, Addresses, Buffer, Layouts, LoadStep, Step
from pyggml.backends.timing import Fastest, Stopwatch, differences
from pyggml.joint import joint_send, rounds
from pyggml.node import Node
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
        self._arrivals: tuple[Crossing, ...] = ()
        self._departures: _Departures | None = None
        memory = device.bytes_of(scratch)
        self.nodes = [step.node for step in steps]
        #: Weights that are loaded while other steps run -> what their first readers wait for.
        self._arriving: dict[Node, Event] = {}
        self.joint = [step.joint for step in steps]
        self._tasks = [
            self._load_task(step, at)
            if isinstance(step, LoadStep)
            else self._kernel_task(step, at, Address(memory, offset, (1, 1, 1, 1)))
            if not step.node.op.joint
            else None
            for step, offset in zip(steps, scratch_at)
        ]

    def carry(self, arrivals: Sequence[Crossing], departures: Sequence[Crossing]) -> Event | None:
        if any(each.spec.nbytes > self.device.carries for each in (*arrivals, *departures)):
            return None
        self._arrivals, self._departures = tuple(arrivals), _Departures(self.device, departures)
        return self._departures

    def run(self) -> None:
        """Queue every step, and the copies that it carries."""
        host, on_host = self.device.host, self.device.on_host
        for each in self._arrivals:
            values = host.download(each.host, each.spec)
            put = partial(host.upload, on_host(each.device), each.spec, values)
            self.device.queue.add(put)
        for index in range(len(self._tasks)):
            self.run_step(index)
        if self._departures is not None:
            self._departures.leave()

    def run_step(self, index: int) -> None:
        """Queue one step."""
        task = self._tasks[index]
        if task is None:  # the other devices are of ranks that are threads
            take = self.meet(index)
            self.device.queue.run_all()  # a GPU goes on while its host waits for a message
            take()
            return
        step, queue = self._steps[index], self.device.queue
        if isinstance(step, LoadStep) and step.ahead:
            before = queue.mark()
            self.device.loads.add(before.wait)
            self.device.loads.add(task)
            self._arriving[step.node] = self.device.loads.mark()
            return
        for read in dict.fromkeys(read.base for read in step.reads):
            if (arrival := self._arriving.pop(read, None)) is not None:
                queue.add(arrival.wait)
        queue.add(task)

    def meet(self, index: int) -> Callable[[], None]:
        """Queue the first half of a joint step; returns a function that queues the second."""
        node = self.nodes[index]
        part = node.src[0] if node.src else None
        source = None if part is None else self.device.on_host(self._at[part])
        here, kind = self.device.on_host(self._at[node]), np.dtype(node.dtype.numpy or np.uint8)
        if node.op is joint_send:
            kind = np.dtype(np.uint8)

        def read() -> NDArray[Any]:
            assert source is not None and part is not None
            start = source.offset
            values: NDArray[Any] = source.buffer[start : start + part.spec.nbytes]
            return values.view(kind)

        def write(values: NDArray[Any]) -> None:
            raw = values.view(np.uint8)
            here.buffer[here.offset : here.offset + len(raw)] = raw

        bring, take, announce = tasks_of(node, read, write)
        self.device.queue.add(bring)
        announce(self.device.queue.mark())
        return lambda: self.device.queue.add(take)

    def kernels(self, index: int) -> Kernels:
        return self.device.kernels_of(self._steps[index], self._at, 0)

    def stopwatch(self) -> Stopwatch:
        """The clock is read in the queue, before the first task and after each."""

        def take() -> Callable[[], list[float]]:
            marks: list[int] = []
            self.device.queue.add(lambda: marks.append(perf_counter_ns()))
            for index in range(len(self._tasks)):
                self.run_step(index)
                self.device.queue.add(lambda: marks.append(perf_counter_ns()))
            return lambda: differences(marks)

        return Fastest(take)

    def _load_task(self, step: LoadStep, at: Addresses) -> Callable[[], None]:
        """Load a weight; in place of experts that no id chooses come bytes that stand for NaN."""
        here, nbytes, weight = at[step.node], step.layout.nbytes, data_of(origin(step.node))
        if step.ids is None:
            return lambda: self.device.load(here, nbytes, weight)
        ids, spec = self.device.on_host(at[step.ids]), step.ids.spec
        n_expert = step.node.ne[2]
        experts = np.ascontiguousarray(weight).reshape(n_expert, -1).view(np.uint8)

        def task() -> None:
            chosen = np.isin(np.arange(n_expert), self.device.host.download(ids, spec))
            self.device.load(here, nbytes, np.where(chosen[:, None], experts, np.uint8(255)))

        return task

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


class Together:
    """Splits of several devices of this process with joint steps of the same turns: all devices
    queue what comes before a turn, then all bring their parts, then all take the result."""

    def __init__(self, runners: Sequence[NullRunner]) -> None:
        self._runners = runners

    def run(self) -> None:
        done = [0] * len(self._runners)

        def go(number: int, end: int) -> None:
            for index in range(done[number], end):
                self._runners[number].run_step(index)
            done[number] = end

        for turn in rounds([runner.joint for runner in self._runners]):
            for number, index in turn.items():
                go(number, index)
            takes = [self._runners[number].meet(index) for number, index in turn.items()]
            for take, number in zip(takes, turn):
                take()
                done[number] += 1
        for number, runner in enumerate(self._runners):
            go(number, len(runner.nodes))

    def run_step(self, index: int) -> None:
        raise AssertionError("steps of several devices have no common numbers")


class _Departures:
    """The copies to the host that are part of a run. As on a GPU, they reach the host's memory only
    in a wait."""

    def __init__(self, device: NullDevice, crossings: Sequence[Crossing]) -> None:
        self._device, self._crossings = device, tuple(crossings)
        self._mark: Event = device.queue.mark()
        self._values: list[NDArray[Any]] = []

    def leave(self) -> None:
        """Queue them."""
        device = self._device
        values: list[NDArray[Any]] = []

        def task() -> None:
            values.extend(
                device.host.download(device.on_host(each.device), each.spec)
                for each in self._crossings
            )

        device.queue.add(task)
        self._mark, self._values = device.queue.mark(), values

    def wait(self) -> None:
        self._mark.wait()
        for each, value in zip(self._crossings, self._values):
            self._device.host.upload(each.host, each.spec, value)

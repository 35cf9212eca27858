"""A plan's splits bound to memory, and how they are issued to the devices' queues."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import Any, Protocol

from numpy.typing import NDArray

from pyggml.backends.base import (
    Backend,
    Event,
    Joins,
    Runner,
    RunsWhole,
    StaysReady,
    WholeRun,
)
from pyggml.backends.step import Address, Buffer
from pyggml.joint import cliques
from pyggml.node import Node
from pyggml.passes.work import Split, Work
from pyggml.runtime.carried import carry
from pyggml.runtime.exchange import Exchange
from pyggml.runtime.inputs import Bound, Inputs, same_memory
from pyggml.runtime.outputs import Output, Outputs
from pyggml.runtime.slots import Slots
from pyggml.runtime.store import Arena
from pyggml.transfer import origin

Copy = Callable[[], Event | None]


class Watch(Protocol):
    """Times the parts of a run.

    carries  whether `compute` runs a split as always, with the copies that are part of that
    copy     makes a copy, given the step's number and both ends; returns what has to be waited for
    compute  runs the steps of a split
    """

    carries: bool

    def copy(self, number: int, call: Copy, ends: Collection[Backend]) -> Event | None: ...

    def compute(self, split: int) -> None: ...


class Execution:
    """Splits with their runners.

    Devices work asynchronously. The host waits only for what it reads, and once at the end.

    slots, outputs  copies of inputs and outputs, prepared for this memory
    exchange        messages to and from other ranks; None if this process has all devices
    runners         of all splits; those of other ranks do nothing
    """

    def __init__(
        self,
        work: Work,
        at: Mapping[Node, Address],
        arenas: Mapping[str, Buffer],
        bound: Bound,
        inputs: Inputs,
        exchange: Exchange | None = None,
    ) -> None:
        self.splits, self.exchange = work.splits, exchange
        self.slots, self.outputs = Slots(inputs, at), Outputs(work, at, exchange)
        self.work = work
        self.at = at
        self.arenas, self.bound = arenas, bound
        self.runners: list[Runner] = []
        self.first: list[int] = []  # split -> the number of its first step in the plan
        count = 0
        scratch_at = work.placed.scratch_at
        for split in self.splits:
            self.first.append(count)
            count += len(split.copies)
            starts = scratch_at[count : count + len(split.steps)]
            count += len(split.steps)
            if not self._owns(split.backend):
                self.runners.append(_Elsewhere())
                continue
            arena = arenas[split.backend.device]
            self.runners.append(split.backend.bind(split.steps, at, arena, starts))
        self.together = _together(self.runners, self.splits) if exchange is None else {}
        self.last = {i: max(members) for members in self.together for i in members}
        _tell_what_follows(self.splits, self.runners)
        # Of splits whose copies are part of runs: the event to wait for, of a split on the host.
        alone = exchange is None and not self.together
        self.carried = carry(work, self.runners, at) if alone else {}
        # A backend without splits may still have uploads in its queue. One without leaves either
        # is left out: its device need not exist.
        used = [split.backend for split in self.splits] + [work.home(n) for n in work.leaves]
        self.backends = tuple(filter(self._owns, dict.fromkeys(used)))
        # A copy to the host is issued in the queue of the device that computed the tensor, so it
        # needs no other event.
        # The host has finished its own splits when it issues the next one.
        waits = [() if s.backend.device == "host" else self._here(s.waits) for s in self.splits]
        self.waits = [
            tuple(k for k in each if self.splits[k].backend.device != "host") for each in waits
        ]
        self.waited = {i for each in self.waits for i in each}
        self.spared = {i for split in self.splits for i in split.spares}
        self._actions = self._prepared()
        self._wholes: dict[tuple[tuple[str, ...], tuple[str, ...]], WholeRun | None] = {}

    def _owns(self, backend: Backend) -> bool:
        return self.exchange is None or self.exchange.owns(backend)

    def _here(self, splits: tuple[int, ...]) -> tuple[int, ...]:
        """Those of these splits that this process runs. Messages order it with the others."""
        return tuple(i for i in splits if self._owns(self.splits[i].backend))

    def serves(self, work: Work, bound: Bound, arenas: Mapping[str, Arena]) -> bool:
        """Whether it was built for this work, with these bound arrays and these arenas."""
        for device, buffer in self.arenas.items():
            if device not in arenas or arenas[device].buffer is not buffer:
                return False
        return self.work is work and (self.bound is bound or same_memory(self.bound, bound))

    def settle(self) -> None:
        """Wait until all queues are empty, including what bind put there."""
        for backend in self.backends:
            backend.synchronize()

    def run(
        self,
        give: Callable[[], None] | None = None,
        repeat: int = 1,
        names: Collection[str] = (),
    ) -> dict[str, Output]:
        """Upload the inputs with `give`, run all splits `repeat` times, and wait for the end.

        The outputs' copies are queued before that wait, so it is the only one. After an error or
        an interrupt no device is still working.
        """
        return self._run(give, repeat, names)

    def whole(self, keys: tuple[str, ...], names: tuple[str, ...]) -> WholeRun | None:
        """A run on host arrays for these inputs, with these outputs, as one call of the device.

        None if the device does not offer that, or if others take part.
        """
        key = keys, names
        if key not in self._wholes:
            self._wholes[key] = self._prepared_whole(keys, names)
        return self._wholes[key]

    def _prepared_whole(self, keys: tuple[str, ...], names: tuple[str, ...]) -> WholeRun | None:
        backend, runner = next(iter(self.backends), None), self._only_runner()
        if runner is None or not isinstance(backend, RunsWhole):
            return None
        downloads, uploads = self.outputs.downloads(names), self.slots.uploads(keys)
        if downloads is None or any(own != keys for own, _ in uploads):
            return None
        return backend.whole([upload for _, upload in uploads], runner, downloads)

    def _only_runner(self) -> Runner | None:
        """The runner of all steps, if there is one, and no copies."""
        if len(self.backends) == 1:
            return self.runners[0] if len(self._actions or ()) == 1 else None
        whole = {(*range(len(self.splits)),)} == {*self.together}
        if not whole or any(split.copies for split in self.splits) or self.waited or self.spared:
            return None
        return next(iter(self.together.values()))

    def run_whole(
        self, whole: WholeRun, arrays: Sequence[NDArray[Any]], repeat: int, names: Sequence[str]
    ) -> dict[str, Any]:
        """What `run` does, by that call, and copies of the outputs."""
        try:
            return dict(zip(names, whole(arrays, repeat)))
        except BaseException:
            self.abandon()
            raise

    def submit(self, give: Callable[[], None], names: Collection[str]) -> dict[str, Output]:
        """Like `run`, without waiting for the end."""
        return self._run(give, names=names, waits=False)

    def watched(self, watch: Watch) -> None:
        """Run all splits once, under a watch, and wait for the end."""
        self._run(None, watch=watch)

    def phases(self, give: Callable[[], None], watch: Watch) -> tuple[float, float, float]:
        """Run all splits once; the seconds to upload the inputs, to issue the splits, to wait."""
        marks = [perf_counter()]

        def timed() -> None:
            give()
            marks.append(perf_counter())

        self._run(timed, watch=watch, waits=False)
        marks.append(perf_counter())
        try:
            self.settle()
        except BaseException:
            self.abandon()
            raise
        marks.append(perf_counter())
        upload, issue, wait = (end - start for start, end in pairwise(marks))
        return upload, issue, wait

    def _run(
        self,
        give: Callable[[], None] | None,
        repeat: int = 1,
        names: Collection[str] = (),
        watch: Watch | None = None,
        waits: bool = True,
    ) -> dict[str, Output]:
        if self.exchange is not None:
            self.exchange.ranks.check_usable()
        try:
            if give is not None:
                give()
            for turn in range(repeat):
                if turn and len(self.backends) > 1:
                    self.follow(self.backends)
                self._issue(watch)
            outputs = self.outputs.collect(names)
            if waits:
                self.settle()
        except BaseException as error:
            if self.exchange is not None:
                self.exchange.ranks.failed(error)
            self.abandon()
            raise
        return outputs

    def abandon(self) -> None:
        """Wait for all devices after an error; errors of their own are ignored then."""
        for backend in self.backends:
            with suppress(Exception):
                backend.abandon()

    def follow(self, others: Collection[Backend]) -> None:
        """Make each device wait for what is now in the queues of these devices.

        They may still read what it is about to overwrite.
        """
        ends = {backend: backend.record() for backend in others}
        for backend in self.backends:
            for other, end in ends.items():
                if other is not backend:
                    backend.wait_for(end)

    def _prepared(self) -> list[Callable[[], object]] | None:
        """What `_issue` does without a watch, if only runners and waits of the host are left of it.

        While a layer's experts run on the host, they fill its caches, and then every line of Python
        takes a microsecond or more.
        """
        if self.exchange is not None or self.together or self.waited or self.spared:
            return None
        actions: list[Callable[[], object]] = []
        sent: list[Event] = []
        for i, (split, runner) in enumerate(zip(self.splits, self.runners)):
            if split.copies and i not in self.carried:
                return None
            event = self.carried.get(i)
            if event is not None:
                sent.append(event)
            if split.steps and split.backend.device == "host":
                actions += [each.wait for each in sent]
                sent.clear()
            if split.steps:
                actions.append(runner.run)
        return actions + [each.wait for each in sent]

    def _issue(self, watch: Watch | None) -> None:
        if watch is None and self._actions is not None:
            for action in self._actions:
                action()
            return
        done: dict[int, Event] = {}
        copied: dict[int, Event] = {}
        sent: list[Event] = []  # copies to the host that it has not waited for
        for i, split in enumerate(self.splits):
            if self.exchange is not None:
                self.exchange.before(i)
                if not self.exchange.owns(split.backend):
                    self.exchange.after(i)
                    continue
            for k in self.waits[i]:
                split.backend.wait_for(done[k])
            for k in split.spares:
                if k in copied:
                    split.backend.wait_for(copied[k])
            if split.copies:
                self._copy(i, split, watch, sent)
            if i in self.spared:
                copied[i] = split.backend.record()
            if split.steps and split.backend.device == "host":
                _wait(sent)
            for k in self._compute(i, watch):
                if k in self.waited:
                    done[k] = self.splits[k].backend.record()
            if self.exchange is not None:
                self.exchange.after(i)
        _wait(sent)
        if self.exchange is not None:
            self.exchange.finish()

    def _compute(self, i: int, watch: Watch | None) -> tuple[int, ...]:
        """Run the steps of split `i`; return the splits that have been issued now. Those that run
        together are issued with the last of them, when the copies of all have been."""
        if self.last.get(i, i) > i:
            return ()
        members = next((each for each in self.together if i in each), (i,))
        if watch is not None:
            for k in members:
                watch.compute(k)
        elif len(members) > 1:
            self.together[members].run()
        else:
            self.runners[i].run()
        return members

    def _copy(self, i: int, split: Split, watch: Watch | None, sent: list[Event]) -> None:
        """Issue the split's copies from other devices.

        A device fetches. To the host the devices send, and `sent` gets the events.
        """
        if i in self.carried and (watch is None or watch.carries):
            event = self.carried[i]
            if event is not None:
                sent.append(event)
            return
        for k, step in enumerate(split.copies):
            if self.exchange is not None and self.exchange.receives(step.node):
                message = partial(self.exchange.receive, step.node)
                if watch is None:
                    message()
                else:
                    watch.copy(self.first[i] + k, message, (split.backend,))
                continue
            source, target = origin(step.node), split.backend
            sender = self.work.home(source)
            there, here, spec = self.at[source], self.at[step.node], source.spec
            if target.device != "host":
                call: Copy = partial(target.fetch, there, sender, here, spec)
            else:
                call = partial(sender.send, there, here, spec)
            if watch is None:
                event = call()
            else:
                event = watch.copy(self.first[i] + k, call, (sender, target))
            if event is not None:
                sent.append(event)


def _together(runners: Sequence[Runner], splits: Sequence[Split]) -> dict[tuple[int, ...], Runner]:
    """Splits of this process that run together -> their runner."""
    result = {}
    for members in cliques([[step.joint for step in split.steps] for split in splits]):
        backend = splits[members[0]].backend
        if len(members) > 1:
            assert isinstance(backend, Joins)
            result[members] = backend.together([runners[i] for i in members])
    return result


class _Elsewhere:
    """The runner of a split that another rank runs."""

    def run(self) -> None:
        return None

    def run_step(self, index: int) -> None:
        return None


def _tell_what_follows(splits: Sequence[Split], runners: Sequence[Runner]) -> None:
    """Tell runners with threads whether their backend runs another split later."""
    later: set[Backend] = set()
    for split, runner in zip(reversed(splits), reversed(runners)):
        if split.steps and isinstance(runner, StaysReady):
            runner.more = split.backend in later
            later.add(split.backend)


def _wait(sent: list[Event]) -> None:
    """Wait for copies to the host, and clear the list."""
    for event in sent:
        event.wait()
    sent.clear()


def addresses(
    work: Work,
    leaves: Mapping[Node, Address],
    arenas: Mapping[str, Buffer],
    owns: Callable[[Backend], bool] | None = None,
) -> dict[Node, Address]:
    """The address of every tensor of a placed graph, from those of leaves and arenas.

    owns  whether a device is this process's; tensors on others have no address
    """
    at: dict[Node, Address] = {}
    for node, spot in work.placed.spots.items():
        if owns is not None and not owns(work.home(node)):
            continue
        if spot.base is None:
            layout = work.layouts.get(node)
            name = layout.name if layout is not None else "plain"
            at[node] = Address(arenas[work.home(node).device], spot.offset, spot.nb, name)
        else:
            base = leaves[spot.base]
            at[node] = Address(base.buffer, base.offset + spot.offset, spot.nb, base.layout)
    return at

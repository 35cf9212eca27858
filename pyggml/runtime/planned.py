"""A request of compile, and what the passes plan for it and a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from pyggml import passes
from pyggml.backends.base import Backend
from pyggml.backends.step import LoadStep
from pyggml.errors import GraphError
from pyggml.node import Node
from pyggml.ops.leaf import state_op
from pyggml.passes.work import Work
from pyggml.runtime.inputs import Inputs
from pyggml.runtime.leaves import Need
from pyggml.runtime.memory import Memory
from pyggml.runtime.misuse import limits
from pyggml.runtime.places import Place
from pyggml.runtime.ranks import Ranks
from pyggml.runtime.store import Store
from pyggml.where import warn


@dataclass(frozen=True, slots=True)
class Planned:
    """A planned graph: its steps and places, the leaves it needs, its memory, its inputs.

    owns  whether a device is this process's; None: all are
    """

    work: Work
    needs: tuple[Need, ...]
    memory: Memory
    inputs: Inputs
    owns: Callable[[Backend], bool] | None = None

    @property
    def backends(self) -> tuple[Backend, ...]:
        """Those of this process."""
        every = self.work.backends
        return every if self.owns is None else tuple(filter(self.owns, every))

    def arena_sizes(self) -> dict[Backend, int]:
        """The bytes of the arena of each device of this process that the plan uses."""
        used = {need.backend.device for need in self.needs}
        used |= {split.backend.device for split in self.work.splits}
        arenas = self.work.placed.arenas
        by_device = {backend.device: backend for backend in self.backends}
        return {b: arenas[device].nbytes for device, b in by_device.items() if device in used}

    def fits(self, store: Store) -> bool:
        """Whether each state that the store already has is where the plan reads it."""
        homes = store.homes
        return all(
            homes.get(need.node.attrs["name"], need.backend).device == need.backend.device
            for need in self.needs
            if need.node.op is state_op
        )


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of compile, before a store decides where states are.

    work        the graph, its places, pins and budget
    sizes       places with a size, which are for planning only, by device
    read_ahead  whether devices read weights of the host ahead; None: if they have the memory
    """

    work: Work
    sizes: Mapping[str, Place]
    read_ahead: bool | None = None

    def plan(self, store: Store) -> Planned:
        """Plan the graph, with states where the store has them. Does not change the store."""
        planned = self._planned(store, self.read_ahead is not False)
        if self.read_ahead is None and _reads_ahead(planned.work) and not _fits(planned):
            planned = self._planned(store, False)
        for text in planned.work.warnings:
            warn(text)
        return planned

    def _planned(self, store: Store, read_ahead: bool) -> Planned:
        settled = _settled(self.work, store)
        work = passes.run(replace(self.work, settled=settled, read_ahead=read_ahead))
        store.check(work.leaves)
        ranks = store.ranks
        owns = None if ranks is None else ranks.owns(work)
        needs = tuple(_need(work, node, ranks) for node in work.leaves)
        return Planned(
            work,
            needs,
            Memory.of(work, needs, self.sizes),
            Inputs(needs, limits(self.work.graph)),
            owns,
        )


def _reads_ahead(work: Work) -> bool:
    return any(isinstance(step, LoadStep) and step.ahead for step in work.steps)


def _fits(planned: Planned) -> bool:
    """Whether each device whose size is known has room for the plan and its driver."""
    drivers = {backend.place: backend.driver_bytes for backend in planned.work.backends}
    return all(
        row.size is None or row.total + drivers[row.device] <= row.size
        for row in planned.memory.devices
    )


def _need(work: Work, node: Node, ranks: Ranks | None) -> Need:
    home = work.home(node)
    owner = None if ranks is None else ranks.owner(work.shard, home)
    if ranks is not None and owner == ranks.rank:
        owner = None
    return Need(node, home, work.layouts.get(node), owner)


def _settled(work: Work, store: Store) -> dict[str, Backend]:
    """Name -> where the store has the graph's state."""
    names = {node.attrs["name"] for node in work.graph.nodes if node.op is state_op}
    settled = {name: home for name, home in store.homes.items() if name in names}
    for name, home in settled.items():
        if home not in work.backends:
            raise GraphError(
                f"this store has the state {name!r} on {home.place}, which is not among the places "
                f"{', '.join(b.place for b in work.backends)}; add it to backends="
            )
    return settled

"""Connections between the devices that take joint steps together, made before a plan is bound."""

from __future__ import annotations

from pyggml.backends.base import Backend, Joins
from pyggml.joint import by_turn, places_of
from pyggml.passes.work import Work
from pyggml.runtime.ranks import Ranks


def connect(work: Work, ranks: Ranks | None = None) -> None:
    """Connect the devices of all joint steps of a planned graph. All ranks call it.

    Errors: those of the backend; of another rank, PeerError.
    """
    for devices in _meeting(work):
        if ranks is None:
            _joins(devices[0]).connect(devices, None, None)
            continue
        places = tuple(device.device for device in devices)
        if places in ranks.connected:
            continue
        owners = [ranks.owner(work.shard, device) for device in devices]
        index = owners.index(ranks.rank) if ranks.rank in owners else None
        try:
            _joins(devices[index or 0]).connect(devices, index, ranks)
        except BaseException as error:
            ranks.failed(error)
            raise
        ranks.connected.add(places)


def _meeting(work: Work) -> list[tuple[Backend, ...]]:
    """The devices of the joint steps, each set once."""
    by_name = {backend.device: backend for backend in work.backends}
    sets = {places_of(nodes[0]): None for nodes in by_turn(work.graph.nodes).values()}
    return [tuple(by_name[place] for place in places) for places in sets]


def _joins(backend: Backend) -> Joins:
    assert isinstance(backend, Joins)
    return backend

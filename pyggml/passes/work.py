"""What travels through the passes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from pyggml.backends.base import Backend
from pyggml.backends.step import Spot, Step, WeightLayout
from pyggml.graph import Graph
from pyggml.node import Node, labels
from pyggml.transfer import is_resident

Pins = tuple[tuple[re.Pattern[str], Backend], ...]


@dataclass(frozen=True, slots=True)
class Split:
    """Steps of one device that run without a look at another.

    copies   what it needs from elsewhere; they run before its steps
    waits    splits that must be done before this one begins
    spares   splits that must have made their copies of this device's memory, which this one reuses
    """

    backend: Backend
    copies: tuple[Step, ...]
    steps: tuple[Step, ...]
    waits: tuple[int, ...] = ()
    spares: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Arena:
    """The arena of one device.

    nbytes      its size
    live        bytes needed in each step (no packing can do with less than their maximum)
    score_peak  most bytes alive at once of what the attention budget counts, scratch included
    """

    nbytes: int
    live: tuple[int, ...]
    score_peak: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where everything stands, and how much of each device's arena is used when.

    copied_parts sources of a concat that could not be written into their place
    """

    spots: Mapping[Node, Spot]
    scratch_at: tuple[int, ...]
    arenas: Mapping[str, Arena]
    copied_parts: int

    @property
    def score_peak(self) -> int:
        """The largest of all devices."""
        return max(arena.score_peak for arena in self.arenas.values())


@dataclass(frozen=True, slots=True)
class Expanded:
    """A node that was said in simpler ops: its label and op, on which place, and why."""

    label: str
    op: str
    place: str
    reason: str


@dataclass(frozen=True, slots=True)
class Work:
    """A graph on its way to a plan. Every pass returns a new one with its part filled in.

    backends   in order of preference
    pins       patterns of labels, and where what they match goes; the first match counts
    settled    where states of the store already are, by name
    amb        the attention memory budget in bytes, None for no budget
    fuse       whether backends may compute several nodes in one step
    homes      where each node is; views are with what they look at, others on the first backend
    scores     tensors that the budget counts (those inside loops too)
    exempt     tensors that it would count if the attention around them could be cut
    plain      where everything would be without the budget, None if there is none
    order      all nodes in the order in which they run
    layouts    how weights are kept, by constant (or its transfer)
    warnings   what the user should hear
    """

    graph: Graph
    backends: tuple[Backend, ...]
    pins: Pins = ()
    settled: Mapping[str, Backend] = field(default_factory=dict)
    amb: int | None = None
    fuse: bool = True
    homes: Mapping[Node, Backend] = field(default_factory=dict)
    expanded: tuple[Expanded, ...] = ()
    scores: frozenset[Node] = frozenset()
    exempt: frozenset[Node] = frozenset()
    plain: Placement | None = None
    order: tuple[Node, ...] = ()
    layouts: Mapping[Node, WeightLayout] = field(default_factory=dict)
    splits: tuple[Split, ...] = ()
    placement: Placement | None = None
    warnings: tuple[str, ...] = ()

    @property
    def several(self) -> bool:
        """Whether there are borders: more than one device."""
        return len({backend.device for backend in self.backends}) > 1

    @property
    def placed(self) -> Placement:
        assert self.placement is not None
        return self.placement

    @property
    def leaves(self) -> tuple[Node, ...]:
        """What the store holds: leaves, and leaves given to a further device."""
        return tuple(node for node in self.order if is_resident(node))

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps in order, copies included."""
        return tuple(step for split in self.splits for step in (*split.copies, *split.steps))

    def home(self, node: Node) -> Backend:
        """The backend on which `node` is made or kept."""
        found = self.homes.get(node)
        return found or self.homes.get(node.base) or self.backends[0]

    def pinned(self, node: Node) -> Backend | None:
        """Where the first pin that matches a label of `node` puts it."""
        names = labels(node)
        return next((b for p, b in self.pins if any(map(p.search, names))), None)


def runs(node: Node) -> bool:
    """Whether some step computes the node."""
    return not is_resident(node) and node.op.view is None

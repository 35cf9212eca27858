"""Work: a graph on its way through the passes, and what they find out about it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pyggml.backends.base import Backend
from pyggml.backends.step import Spot, Step, WeightLayout
from pyggml.graph import Graph
from pyggml.node import Node, labels
from pyggml.transfer import is_resident

if TYPE_CHECKING:
    from pyggml.passes.stages import Shard

Pins = tuple[tuple[re.Pattern[str], Backend], ...]


@dataclass(frozen=True, slots=True)
class Split:
    """Consecutive steps on one device that depend on no other device once their copies have
    arrived.

    copies  transfers from other devices, which run before the steps
    waits   splits that must end before this one begins
    spares  splits that must have copied what they read from this device, because this split may
            overwrite it
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
    live        live bytes in each step; no packing needs less than their maximum
    score_peak  largest sum of tensors that the attention budget counts, and the scratch of the
                steps that use them, alive at once
    """

    nbytes: int
    live: tuple[int, ...]
    score_peak: int


@dataclass(frozen=True, slots=True)
class Placement:
    """The address of every tensor, and the arena of each device.

    spots         in an arena, or in the memory of a leaf
    scratch_at    offset of each step's scratch in the arena of its device
    arenas        by device
    copied_parts  sources of a concat that could not be written in place
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
    """A node that its meaning in simpler ops replaced: its label and op, the place, the reason."""

    label: str
    op: str
    place: str
    reason: str


@dataclass(frozen=True, slots=True)
class Work:
    """A graph on its way to a plan. Each pass returns a new one with its part filled in.

    backends   in order of preference
    pins       label pattern and the backend of what it matches; the first match counts
    settled    where the store has states, by name
    amb        the attention memory budget in bytes, or None
    shard      how the graph is spread over devices; None: each node runs once
    decode_weights  whether weights are kept decoded on backends that can
    read_ahead      whether devices load weights of the host while they compute (ahead.py)
    fuse       whether backends may compute several nodes in one step
    homes      where nodes run. Views are where their base is, other nodes on the first backend
    expanded   nodes that simpler ops replaced
    scores     tensors that the budget counts, including those inside loops
    exempt     tensors that it would count if the attention around them could be cut
    plain      the placement without the budget; None if there is no budget
    order      all nodes in the order in which they run
    layouts    how weights are stored, by constant (or its transfer)
    splits     all steps in order, divided by device
    placement  where everything is in memory
    warnings   for the user
    """

    graph: Graph
    backends: tuple[Backend, ...]
    pins: Pins = ()
    settled: Mapping[str, Backend] = field(default_factory=dict)
    amb: float | None = None
    fuse: bool = True
    decode_weights: bool = False
    read_ahead: bool = True
    shard: Shard | None = None
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
        """Whether the backends use more than one device."""
        return len({backend.device for backend in self.backends}) > 1

    @property
    def placed(self) -> Placement:
        """The placement, after `place` has run."""
        assert self.placement is not None
        return self.placement

    @property
    def leaves(self) -> tuple[Node, ...]:
        """The nodes whose memory is in the store: leaves, and their copies for further devices."""
        return tuple(node for node in self.order if is_resident(node))

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps in order, including copies."""
        return tuple(step for split in self.splits for step in (*split.copies, *split.steps))

    def home(self, node: Node) -> Backend:
        """The backend that computes or stores `node`."""
        home = self.homes.get(node)
        return home or self.homes.get(node.base) or self.backends[0]

    def pinned(self, node: Node) -> Backend | None:
        """The backend of the first pin that matches a label of `node`."""
        names = labels(node)
        return next((b for p, b in self.pins if any(map(p.search, names))), None)


def runs(node: Node) -> bool:
    """Whether a step computes the node."""
    return not is_resident(node) and node.op.view is None


def viewed(view: Node) -> Node:
    """The source of a view: operand 0, whatever its name."""
    source = view.src[0]
    assert source is not None
    return source


def written(write: Node) -> Node:
    """The operand of a write that it writes into."""
    assert write.op.writes is not None
    target = write.src[write.op.writes]
    assert target is not None
    return target

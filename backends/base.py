"""What a backend must offer. The pure half works on a description; the runtime half on a device."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from pyggml.graph import Ne, Node, Spec
from pyggml.loop import Body, Loop

Buffer = Any  # a backend's own handle of a block of memory


@dataclass(frozen=True, slots=True)
class Address:
    """Where a tensor is: byte `offset` in `buffer`, byte strides `nb`."""

    buffer: Buffer
    offset: int
    nb: Ne


@dataclass(frozen=True, slots=True)
class Place:
    """Where a planned tensor will be: byte `offset` and strides `nb` in a leaf's memory.

    base  the leaf (or, inside a loop, the body's result) whose memory it is; None for the arena
    """

    base: Node | None
    offset: int
    nb: Ne


@dataclass(eq=False, slots=True)
class BodyPlan:
    """A body of a loop, lowered and placed. Its arena is part of the loop's scratch.

    places      every node of the body; strides of what looks at a piece are settled at bind
    scratch_at  where each step's scratch begins in the body's arena
    """

    body: Body
    steps: tuple[Step, ...]
    places: Mapping[Node, Place]
    scratch_at: tuple[int, ...]
    nbytes: int
    score_peak: int


@dataclass(eq=False, slots=True)
class Step:
    """What a runner executes: one kernel covering one or more nodes.

    node     the node whose result it leaves; `nodes` all that it covers
    reads    the nodes it reads, as the kernel sees them (views included)
    scratch  bytes it needs while it runs; for a loop the larger of its bodies' arenas
    inplace  sources whose memory the result may take over
    strided  whether the result may be a strided part of a larger tensor
    sync     whether the host must wait for it
    """

    node: Node
    nodes: tuple[Node, ...]
    reads: tuple[Node, ...]
    scratch: int = 0
    inplace: tuple[Node, ...] = ()
    strided: bool = True
    sync: bool = False
    loop: Loop | None = None
    bodies: tuple[BodyPlan, ...] = ()


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """How a backend keeps a weight: bytes it takes, and a name for tables."""

    nbytes: int
    name: str


class Runner(Protocol):
    """Steps bound to addresses. `run` allocates nothing that was not declared."""

    def run(self) -> None:
        """Execute every step in order."""

    def run_step(self, index: int) -> None:
        """Execute one step; profiling and tests call it."""


class Backend(Protocol):
    """A set of kernels on a device.

    The pure half: `supports`, `weight_layout`, `lower`. It needs no device and allocates nothing.
    """

    name: str
    alignment: int

    def supports(self, node: Node) -> str | None:
        """None if a kernel here runs `node`, else the reason why not, as a phrase."""

    def weight_layout(self, constant: Node, uses: Collection[Node]) -> WeightLayout:
        """How the constant is kept, from its type, size and all its uses."""

    def lower(self, nodes: Sequence[Node], keep: Collection[Node]) -> list[Step]:
        """Steps that compute `nodes` (sources first). Nodes in `keep` must be left in memory."""

    # -- the runtime half ----------------------------------------------------------------------

    def alloc(self, nbytes: int) -> Buffer:
        """A zeroed block of memory; OutOfMemoryError says what was asked for."""

    def weight(self, constant: Node, layout: WeightLayout, data: NDArray[Any]) -> Buffer:
        """The constant's values on the device."""

    def upload(self, at: Address, spec: Spec, array: NDArray[Any]) -> None:
        """Write an array (NumPy shape; raw rows for bf16 and block types) at an address."""

    def download(self, at: Address, spec: Spec, copy: bool = True) -> NDArray[Any]:
        """The array at an address, in NumPy shape; a view valid until the next run without copy."""

    def copy(self, source: Address, target: Address, spec: Spec) -> None:
        """Copy a tensor between two addresses of this device."""

    def bind(
        self,
        steps: Sequence[Step],
        at: Mapping[Node, Address],
        scratch: Buffer,
        scratch_at: Sequence[int],
    ) -> Runner:
        """Steps ready to run: every tensor's address, and each step's scratch in `scratch`."""

    def synchronize(self) -> None:
        """Wait until everything started here is done."""

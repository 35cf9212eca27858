"""The interface of a backend: a pure half that needs no device, and a runtime half on a device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from pyggml.errors import PyggmlError
from pyggml.loop import Body, Chain, Loop
from pyggml.node import Node, label_of, line_of
from pyggml.spec import Ne, Spec
from pyggml.transfer import origin

Buffer = Any  # a backend's handle of a block of memory


@dataclass(frozen=True, slots=True)
class Finding:
    """The status of one thing that a backend needs. A backend may offer them by `findings()`.

    what   the thing: a package, a library, a device
    text   its version, or what is wrong with it
    fix    the command that fixes it; empty if there is nothing to fix
    state  "ok"; "absent": missing, but this machine does not need it; "broken": it should work
    """

    what: str
    text: str
    fix: str = ""
    state: Literal["ok", "absent", "broken"] = "ok"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a tensor is: byte `offset` in `buffer`, byte strides `nb`.

    layout  for a weight, the name of its `WeightLayout`; unless that is "plain", ignore `nb`
    """

    buffer: Buffer
    offset: int
    nb: Ne
    layout: str = "plain"


@dataclass(frozen=True, slots=True)
class Given:
    """A caller's array in a device's memory, as described by the library that owns it.

    buffer, offset  its memory in the form of this backend's addresses; keeps the array alive
    address         of its first byte; `alignment`: kernels require a multiple of it
    shape, type     NumPy's shape; NumPy's name of the element type, or "bfloat16"
    contiguous      whether it has no gaps, in C order
    ready           makes the device's queue wait for the library's pending work on the array
    """

    buffer: Buffer
    offset: int
    address: int
    alignment: int
    shape: tuple[int, ...]
    type: str
    contiguous: bool
    ready: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Spot:
    """The planned place of a tensor: byte `offset` and strides `nb` in the memory of `base`.

    base  the leaf (or, inside a loop, the body's result) that owns the memory; None for the arena
    """

    base: Node | None
    offset: int
    nb: Ne


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """How a backend stores a weight: its size in bytes, and a name.

    name  "plain": as in a file, row after row. Other names are private to the backend
    """

    nbytes: int
    name: str = "plain"


@dataclass(eq=False, slots=True)
class BodyPlan:
    """A body of a loop, lowered and placed. Its arena is part of the loop's scratch.

    spots       every node of the body; views of pieces get their strides at bind
    scratch_at  offset of each step's scratch in the body's arena
    """

    body: Body
    steps: tuple[Step, ...]
    spots: Mapping[Node, Spot]
    scratch_at: tuple[int, ...]
    nbytes: int
    score_peak: int


@dataclass(eq=False, slots=True)
class Step:
    """The unit that a runner executes: one kernel covering one or more nodes.

    node       the node whose result it writes
    nodes      all nodes it covers; they may include the backend's private nodes, which only its
               own steps read
    reads      the nodes it reads, as the kernel sees them (views included)
    scratch    bytes it needs while it runs; for a loop, the larger of its bodies' arenas
    workspace  bytes of work memory for a library of the device; all steps of all plans on the
               device share one block
    inplace    sources whose memory the result may take over
    strided    whether the result may be a strided part of a larger tensor
    layout     for a step that transfers a weight from the host: how to store it while needed
    """

    node: Node
    nodes: tuple[Node, ...]
    reads: tuple[Node, ...]
    scratch: int = 0
    inplace: tuple[Node, ...] = ()
    strided: bool = True
    loop: Loop | None = None
    bodies: tuple[BodyPlan, ...] = ()
    layout: WeightLayout | None = None
    workspace: int = 0

    @property
    def nbytes(self) -> int:
        """Size of the result in bytes."""
        return self.layout.nbytes if self.layout is not None else self.node.spec.nbytes


def own_nodes(nodes: Collection[Node], steps: Iterable[Step]) -> Iterator[Node]:
    """The nodes that steps compute besides the graph's `nodes`: private nodes of the backend."""
    known = set(nodes)
    return (node for step in steps for node in step.nodes if node not in known)


def pieces_of(
    step: Step, at: Mapping[Node, Address]
) -> Iterator[tuple[Body, tuple[int, ...], dict[Node, Address]]]:
    """The pieces of a loop step in order: the body, its start along each dimension, and the
    addresses of the body's result, carry and leaves."""
    loop, node = step.loop, step.node
    assert loop is not None
    for body, starts in loop.pieces():
        filled = enumerate(loop.fill)
        chains = [Chain(dim, axis, ()) for dim, axis in filled if isinstance(axis, int)]
        out = _part(at[node], node, chains, starts)
        places = {body.out: out}
        if body.carry is not None:
            places[body.carry] = out
        for take in body.takes:
            source = node.src[take.source]
            assert source is not None
            places[take.piece] = _part(at[source], source, take.chains, starts)
        yield body, starts, places


def _part(at: Address, node: Node, chains: Sequence[Chain], starts: Sequence[int]) -> Address:
    """The address of the piece at the offsets that `chains` compute from `starts`."""
    offset = at.offset
    for chain in chains:
        first = chain.at(starts[chain.dim])
        offset += (first // node.dtype.block if chain.axis == 0 else first) * at.nb[chain.axis]
    return Address(at.buffer, offset, at.nb)


def looked_at(node: Node, places: Mapping[Node, Address]) -> Address:
    """The address of a view of a piece, from the address of its source."""
    source = node.src[0]
    assert source is not None and node.op.view is not None
    at = places[source]
    view = node.op.view(node, at.nb)
    assert view is not None
    offset, nb = view
    return Address(at.buffer, at.offset + offset, nb)


def attributes(body: Body, node: Node, starts: Sequence[int]) -> dict[str, Any]:
    """The attributes of a body's node in the piece at `starts`."""
    attrs = dict(node.attrs)
    for shift in body.shifts:
        if shift.node is node:
            attrs[shift.attr] += shift.per * shift.chain.at(starts[shift.chain.dim])
    return attrs


def named(error: Exception, node: Node) -> Exception:
    """The error of a kernel, with the node and the line that built it added to its message; errors
    of other libraries get them as a note."""
    sources = ", ".join(label_of(origin(s)) for s in node.src if s is not None)
    call, line = f"{node.op.name}({sources})", f"at {line_of(node)}"
    if isinstance(error, PyggmlError):
        error.args = (f"{call}: {error}; {line}", *error.args[1:])
    else:
        error.add_note(f"in the kernel of {call}, {line}")
    return error


class Event(Protocol):
    """A point in a device's queue."""

    def wait(self) -> None:
        """Block the host until the queue has reached it."""


class Runner(Protocol):
    """Steps bound to addresses. `run` allocates no memory beyond what the steps declared."""

    def run(self) -> None:
        """Execute every step in order; on a device, queue them."""

    def run_step(self, index: int) -> None:
        """Execute one step, for profiling and tests."""


class Backend(Protocol):
    """A set of kernels on a device.

    The pure half is `supports`, `numeric`, `weight_layout` and `lower`: it needs no device and
    allocates nothing.

    name    its folder: "cuda"
    place   its name in `backends=` and `pins=`: "numpy", "cuda:1"
    device  the device whose memory it uses: "host", "cuda:1". Tensors are copied only between
            different devices
    lock    taken while the device is used: it has one queue, shared by the plans of all stores
    alignment      of every tensor in its memory, in bytes
    staging_bytes  bytes of host memory that it keeps for copies
    """

    name: str
    place: str
    device: str
    alignment: int
    lock: AbstractContextManager[object]
    staging_bytes: int

    def supports(self, node: Node) -> str | None:
        """None if a kernel here runs `node`, else the reason as a phrase."""

    def numeric(self, node: Node) -> str:
        """The precision class in which it computes `node`, a key of `parity.tolerance.CLASSES`:
        "f32" if operands and sums are f32 and nothing is quantized on the way, whatever the
        types."""

    def weight_layout(self, constant: Node, uses: Collection[Node]) -> WeightLayout:
        """How to store the constant, given its type, size and all its uses."""

    def lower(
        self,
        nodes: Sequence[Node],
        keep: Collection[Node],
        layouts: Mapping[Node, WeightLayout],
        *,
        fuse: bool = True,
    ) -> list[Step]:
        """The steps that compute `nodes` (sources first). Nodes in `keep` must be in memory
        afterwards.

        layouts  the layouts of the weights that they read
        fuse     False: one step per node, to check whether a fusion changes the result
        """

    # -- the runtime half ----------------------------------------------------------------------

    def alloc(self, nbytes: int) -> Buffer:
        """A zeroed block of memory; OutOfMemoryError with the requested size."""

    def weight(self, constant: Node, layout: WeightLayout, data: NDArray[Any]) -> Buffer:
        """The constant's values on the device."""

    def upload(self, at: Address, spec: Spec, array: NDArray[Any]) -> None:
        """Write an array (NumPy shape; raw rows for bf16 and block types) at an address."""

    def download(self, at: Address, spec: Spec) -> NDArray[Any]:
        """A copy of the tensor at an address, in NumPy shape and as it is stored."""

    def view(self, at: Address, spec: Spec) -> Any:
        """The tensor itself, read-only: on the host a NumPy array, elsewhere an object through
        which the device's libraries read it in place and `np.asarray` copies it."""

    def given(self, array: object) -> Given | None:
        """A caller's array as memory of this device; None if it is somewhere else.

        Errors: DTypeError if its library refuses to share it.
        """

    def fetch(self, source: Address, other: Backend, target: Address, spec: Spec) -> None:
        """Queue on this device: copy a tensor into its memory from the memory of `other` (this
        device, another one, or the host)."""

    def send(self, source: Address, target: Address, spec: Spec) -> Event:
        """Queue on this device: copy a tensor to host memory. It has arrived once the event has
        been waited for, which does not wait for later work in the queue."""

    def bind(
        self,
        steps: Sequence[Step],
        at: Mapping[Node, Address],
        scratch: Buffer,
        scratch_at: Sequence[int],
    ) -> Runner:
        """Bind steps to the address of every tensor, and to each step's scratch in `scratch`.

        A step with a `layout` is a `transfer` of a constant: it loads the host's values (`data_of`)
        to its address, stored in that layout.
        """

    def record(self) -> Event:
        """The current point in the queue."""

    def wait_for(self, event: Event) -> None:
        """Make all work queued from now on wait for `event`, of any device."""

    def synchronize(self) -> None:
        """Wait until all queued work is done; raises the errors of queued steps."""

    def abandon(self) -> None:
        """Clean up after an error: wait for all queued work, and drop copies to the host that
        nobody has waited for, so that none arrives later."""

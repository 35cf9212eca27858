"""What a backend must offer. The pure half works on a description; the runtime half on a device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from pyggml.errors import PyggmlError
from pyggml.loop import Body, Chain, Loop
from pyggml.node import Ne, Node, Spec, label_of, line_of
from pyggml.transfer import origin

Buffer = Any  # a backend's own handle of a block of memory


@dataclass(frozen=True, slots=True)
class Finding:
    """What a backend found of one thing that it needs. A backend may offer `findings()` of them.

    what   the thing: a package, a library, a device
    text   its version, or what is wrong
    fix    the command that helps; empty where there is nothing to fix
    state  "ok"; "absent": not here, and nothing here needs it; "broken": it ought to work
    """

    what: str
    text: str
    fix: str = ""
    state: Literal["ok", "absent", "broken"] = "ok"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a tensor is: byte `offset` in `buffer`, byte strides `nb`.

    layout  for a weight the name of its `WeightLayout`: then `nb` says nothing unless it is "plain"
    """

    buffer: Buffer
    offset: int
    nb: Ne
    layout: str = "plain"


@dataclass(frozen=True, slots=True)
class Given:
    """A caller's array in a device's memory, as the library that made it describes it.

    buffer, offset  its memory as this backend's addresses say it; holds the array
    address         of its first byte, and `alignment`, what kernels need that to be a multiple of
    shape, type     NumPy's shape; NumPy's name of the element type, or "bfloat16"
    contiguous      whether it lies without gaps, in C order
    ready           puts into the device's queue a wait for what its library still does to it
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
    """Where a planned tensor will be: byte `offset` and strides `nb` in a leaf's memory.

    base  the leaf (or, inside a loop, the body's result) whose memory it is; None for the arena
    """

    base: Node | None
    offset: int
    nb: Ne


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """How a backend keeps a weight: bytes it takes, and a name.

    name  "plain": as in a file, rows after rows. Other names are the backend's own
    """

    nbytes: int
    name: str = "plain"


@dataclass(eq=False, slots=True)
class BodyPlan:
    """A body of a loop, lowered and placed. Its arena is part of the loop's scratch.

    spots       every node of the body; strides of what looks at a piece are settled at bind
    scratch_at  where each step's scratch begins in the body's arena
    """

    body: Body
    steps: tuple[Step, ...]
    spots: Mapping[Node, Spot]
    scratch_at: tuple[int, ...]
    nbytes: int
    score_peak: int


@dataclass(eq=False, slots=True)
class Step:
    """What a runner executes: one kernel covering one or more nodes.

    node     the node whose result it leaves; `nodes` all that it covers, among them perhaps nodes
             of the backend's own, which only its steps read
    reads    the nodes it reads, as the kernel sees them (views included)
    scratch  bytes it needs while it runs; for a loop the larger of its bodies' arenas
    workspace  bytes that a library of its device works in: one block of them, which every step of
             every plan on that device shares
    inplace  sources whose memory the result may take over
    strided  whether the result may be a strided part of a larger tensor
    layout   for a step that brings a weight from the host: how it is kept while it is needed
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
        """Bytes of the result."""
        return self.layout.nbytes if self.layout is not None else self.node.spec.nbytes


def own_nodes(nodes: Collection[Node], steps: Iterable[Step]) -> Iterator[Node]:
    """What steps make beside the `nodes` of the graph: a backend's own, for further steps of it."""
    known = set(nodes)
    return (node for step in steps for node in step.nodes if node not in known)


def pieces_of(
    step: Step, at: Mapping[Node, Address]
) -> Iterator[tuple[Body, tuple[int, ...], dict[Node, Address]]]:
    """The pieces of a loop step in order: body, where it starts along each dimension, and where
    the body's result, carry and leaves are."""
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
    """The address of the piece that begins where `chains` lead from `starts`."""
    offset = at.offset
    for chain in chains:
        first = chain.at(starts[chain.dim])
        offset += (first // node.dtype.block if chain.axis == 0 else first) * at.nb[chain.axis]
    return Address(at.buffer, offset, at.nb)


def looked_at(node: Node, places: Mapping[Node, Address]) -> Address:
    """Where a view of a piece is, from where its source is."""
    source = node.src[0]
    assert source is not None and node.op.view is not None
    seen = places[source]
    looked = node.op.view(node, seen.nb)
    assert looked is not None
    return Address(seen.buffer, seen.offset + looked[0], looked[1])


def attributes(body: Body, node: Node, starts: Sequence[int]) -> dict[str, Any]:
    """The attributes of a body's node in the piece that starts there."""
    attrs = dict(node.attrs)
    for shift in body.shifts:
        if shift.node is node:
            attrs[shift.attr] += shift.per * shift.chain.at(starts[shift.chain.dim])
    return attrs


def named(error: Exception, node: Node) -> Exception:
    """A kernel's complaint with the node and the line that built it; others get them as a note."""
    sources = ", ".join(label_of(origin(s)) for s in node.src if s is not None)
    what, where = f"{node.op.name}({sources})", f"at {line_of(node)}"
    if isinstance(error, PyggmlError):
        error.args = (f"{what}: {error}; {where}", *error.args[1:])
    else:
        error.add_note(f"in the kernel of {what}, {where}")
    return error


class Event(Protocol):
    """A point in a device's queue."""

    def wait(self) -> None:
        """Block the host until the queue has got there."""


class Runner(Protocol):
    """Steps bound to addresses. `run` allocates nothing that was not declared."""

    def run(self) -> None:
        """Execute every step in order; on a device, put them into its queue."""

    def run_step(self, index: int) -> None:
        """Execute one step; profiling and tests call it."""


class Backend(Protocol):
    """A set of kernels on a device.

    The pure half: `supports`, `numeric`, `weight_layout`, `lower`. It needs no device and allocates
    nothing.

    name    of its folder: "cuda"
    place   what `backends=` and `pins=` call it: "numpy", "cuda:1"
    device  whose memory it uses: "host", "cuda:1". Copies are made between different devices only
    lock    held by whoever uses the device: its queue is one, whatever store a plan belongs to
    alignment      of every tensor in its memory, in bytes
    staging_bytes  of the host's memory that it keeps for copies
    """

    name: str
    place: str
    device: str
    alignment: int
    lock: AbstractContextManager[object]
    staging_bytes: int

    def supports(self, node: Node) -> str | None:
        """None if a kernel here runs `node`, else the reason why not, as a phrase."""

    def numeric(self, node: Node) -> str:
        """The class of its numbers in `node`, a key of `parity.tolerance.CLASSES`: "f32" where
        operands and sums are f32 and nothing is quantized on the way, whatever the types are."""

    def weight_layout(self, constant: Node, uses: Collection[Node]) -> WeightLayout:
        """How the constant is kept, from its type, size and all its uses."""

    def lower(
        self,
        nodes: Sequence[Node],
        keep: Collection[Node],
        layouts: Mapping[Node, WeightLayout],
        *,
        fuse: bool = True,
    ) -> list[Step]:
        """Steps that compute `nodes` (sources first). Nodes in `keep` must be left in memory.

        layouts  of the weights that they read
        fuse     False: a step for each node, to find out whether a fusion computes something else
        """

    # -- the runtime half ----------------------------------------------------------------------

    def alloc(self, nbytes: int) -> Buffer:
        """A zeroed block of memory; OutOfMemoryError says what was asked for."""

    def weight(self, constant: Node, layout: WeightLayout, data: NDArray[Any]) -> Buffer:
        """The constant's values on the device."""

    def upload(self, at: Address, spec: Spec, array: NDArray[Any]) -> None:
        """Write an array (NumPy shape; raw rows for bf16 and block types) at an address."""

    def download(self, at: Address, spec: Spec) -> NDArray[Any]:
        """A copy of the tensor at an address, in NumPy shape and as it is stored."""

    def view(self, at: Address, spec: Spec) -> Any:
        """The tensor itself, not to be written to: NumPy's array on the host, else an object by
        which libraries of that device read it where it is, and `np.asarray` copies it."""

    def given(self, array: object) -> Given | None:
        """A caller's array as memory of this device; None where it is not in it.

        Errors: DTypeError where its library does not let it be shared.
        """

    def fetch(self, source: Address, other: Backend, target: Address, spec: Spec) -> None:
        """Put into this device's queue: copy a tensor from the memory of `other`, this device or
        another or the host, into this one's."""

    def send(self, source: Address, target: Address, spec: Spec) -> Event:
        """Put into this device's queue: copy a tensor into the host's memory. It is there once the
        event has been waited for; later work in the queue need not be done by then."""

    def bind(
        self,
        steps: Sequence[Step],
        at: Mapping[Node, Address],
        scratch: Buffer,
        scratch_at: Sequence[int],
    ) -> Runner:
        """Steps ready to run: every tensor's address, and each step's scratch in `scratch`.

        A step with a `layout` is a `transfer` of a constant: it loads the host's values (`data_of`)
        into its address, kept like that.
        """

    def record(self) -> Event:
        """This point in the queue."""

    def wait_for(self, event: Event) -> None:
        """Nothing put into this queue from now on begins before `event`, of any device."""

    def synchronize(self) -> None:
        """Wait until everything started here is done; errors of queued steps are raised here."""

    def abandon(self) -> None:
        """After an error: wait for what was started here, and let go of copies to the host that
        nobody has waited for, so that none arrives later."""

"""The interface of a backend: a pure half that needs no device, and a runtime half on a device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from numpy.typing import NDArray

from pyggml.backends.step import Address, Addresses, Buffer, Layouts, Step, WeightLayout
from pyggml.node import Node
from pyggml.spec import Spec


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
class Kernels:
    """What is launched for a step.

    names  of the kernels and copies, in order; one for each launch
    why    why the step does not take the backend's fast kernel, as a phrase; empty if it does
    """

    names: tuple[str, ...] = ()
    why: str = ""

    def __str__(self) -> str:
        """The names, each once: a loop launches the same kernels for every piece."""
        return " + ".join(dict.fromkeys(self.names))


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


#: Queues the upload of one array to each of the tensors that it was made for, in their order.
Upload: TypeAlias = Callable[[Sequence[NDArray[Any]]], None]
#: Waits for a copy of a tensor to the host and returns it.
Arrival: TypeAlias = Callable[[], NDArray[Any]]
#: Queues a copy of the tensor that it was made for to the host.
Download: TypeAlias = Callable[[], Arrival]
#: Uploads arrays, runs steps a number of times and waits; returns copies of the outputs.
WholeRun: TypeAlias = Callable[[Sequence[NDArray[Any]], int], list[NDArray[Any]]]


class Event(Protocol):
    """A point in a device's queue."""

    def wait(self) -> None:
        """Block the host until the queue has reached it; raises the error of work before it."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """A tensor with a place on the host and one on a device, to be copied from one to the other."""

    host: Address
    device: Address
    spec: Spec


class Runner(Protocol):
    """Steps bound to addresses. `run` allocates no memory beyond what the steps declared."""

    def run(self) -> None:
        """Execute every step in order; on a device, queue them."""

    def run_step(self, index: int) -> None:
        """Execute one step, for profiling and tests."""


class Backend(Protocol):
    """A set of kernels on a device.

    The pure half is `supports`, `lends_from`, `numeric`, `weight_layout`, `borrows` and `lower`: it
    needs no device and allocates nothing.

    name    its folder: "cuda"
    place   its name in `backends=` and `pins=`: "numpy", "cuda:1"
    device  the device whose memory it uses: "host", "cuda:1", and "host:1" for a part of the host
            that is a device of its own (`shard=`). Tensors are copied only between different
            devices
    lock    taken while the device is used: it has one queue, shared by the plans of all stores
    alignment      of every tensor in its memory, in bytes
    staging_bytes  bytes of host memory that it keeps for copies
    driver_bytes   estimate of the device's memory that its driver and libraries use for themselves
    """

    name: str
    place: str
    device: str
    alignment: int
    lock: AbstractContextManager[object]
    staging_bytes: int
    driver_bytes: int

    def supports(self, node: Node) -> str | None:
        """None if a kernel here runs `node`, else the reason as a phrase."""

    def lends_from(self, node: Node) -> int:
        """From how many rows a product, which reads a weight on the host, is sooner on another
        device, although that must copy the weight first: multiply-adds with each element that it
        reads."""

    def numeric(self, node: Node) -> str:
        """The precision class in which it computes `node`, a key of `parity.tolerance.CLASSES`:
        "f32" if operands and sums are f32 and nothing is quantized on the way, whatever the
        types."""

    def weight_layout(self, constant: Node, uses: Collection[Node]) -> WeightLayout:
        """How to store a constant, or its transfer if the device reads that instead, given its
        type, size and all its uses: the nodes that read it directly or through views, each view
        before its readers. A view that is an output has none. If another device copies it in every
        run, that transfer and its readers are uses.
        """

    def borrows(self, constant: Node, lent: WeightLayout, own: WeightLayout) -> bool:
        """Whether a `LoadStep` here can read a constant that the host keeps in the layout `lent`,
        and store it in `own`."""

    def lower(
        self, nodes: Sequence[Node], keep: Collection[Node], layouts: Layouts, *, fuse: bool = True
    ) -> list[Step]:
        """The steps that compute `nodes` (sources first). Nodes in `keep` must be in memory
        afterwards.

        layouts  the layouts of the weights that they read
        fuse     False: one step per node, to check whether a fusion changes the result
        """

    # -- the runtime half ----------------------------------------------------------------------

    def alloc(self, nbytes: int) -> Buffer:
        """A zeroed block of memory; OutOfMemoryError with the requested size."""

    def adjacent(self, sizes: Sequence[int]) -> AbstractContextManager[object]:
        """Inside, blocks of these sizes may be allocated as parts of one, which is freed with the
        last of them."""

    def weight(self, constant: Node, layout: WeightLayout, data: NDArray[Any]) -> Buffer:
        """The constant's values on the device."""

    def upload(self, at: Address, spec: Spec, array: NDArray[Any]) -> None:
        """Write an array (NumPy shape; raw rows for bf16 and block types) at an address."""

    def download(self, at: Address, spec: Spec) -> NDArray[Any]:
        """A copy of the tensor at an address, in NumPy shape and as it is stored."""

    def uploads(self, tensors: Sequence[tuple[Address, Spec]]) -> Upload:
        """A function that does what `upload` does, for these tensors, in many runs.

        Tensors side by side may be written by one copy, padding between them included.
        """

    def downloads(self, at: Address, spec: Spec) -> Download:
        """A function that queues what `download` returns, in many runs. Its result waits for that
        copy only, not for later work, and the copy is the caller's: `abandon` does not drop it."""

    def view(self, at: Address, spec: Spec) -> Any:
        """The tensor itself, read-only: on the host a NumPy array, elsewhere an object through
        which the device's libraries read it in place and `np.asarray` copies it."""

    def given(self, array: object) -> Given | None:
        """A caller's array as memory of this device; None if it is somewhere else.

        Errors: DTypeError if its library refuses to share it.
        """

    def fetch(self, source: Address, other: Backend, target: Address, spec: Spec) -> None:
        """Queue on this device: copy a tensor into its memory from the memory of `other` (this
        device, another one, or the host; `host_values` suits all of them)."""

    def send(self, source: Address, target: Address, spec: Spec) -> Event:
        """Queue on this device: copy a tensor to host memory. It has arrived once the event has
        been waited for, which does not wait for later work in the queue."""

    def bind(
        self, steps: Sequence[Step], at: Addresses, scratch: Buffer, scratch_at: Sequence[int]
    ) -> Runner:
        """Bind steps to the address of every tensor, and to each step's scratch in `scratch`.

        A `LoadStep` loads a constant from the host to its address, stored in its layout: from where
        the plan has it there if it `borrows` that layout, else its values (`data_of`).
        """

    def record(self) -> Event:
        """The current point in the queue."""

    def wait_for(self, event: Event) -> None:
        """Make all work queued from now on wait for `event`, of any device."""

    def synchronize(self) -> None:
        """Wait until all queued work is done; raises the errors of queued steps."""

    def abandon(self) -> None:
        """Clean up after an error: wait for all queued work, and drop copies by `send` that nobody
        has waited for, so that none arrives later."""


@runtime_checkable
class KeepsDecoded(Protocol):
    """A backend that can keep weights decoded (`compile(decode_weights=True)`)."""

    def decoded_layout(self, constant: Node, uses: Collection[Node]) -> WeightLayout:
        """`weight_layout` for that; plain for a constant that it cannot or need not decode."""


@runtime_checkable
class RunsWhole(Protocol):
    """A backend that does a whole run in one call. Whatever the host does before the first kernel
    starts and after the last copy has arrived makes each decode step longer."""

    def whole(
        self, uploads: Sequence[Upload], runner: Runner, downloads: Sequence[Download]
    ) -> WholeRun:
        """A function that calls `uploads`, each with all arrays, `runner.run` as often as it is
        told, `downloads` and `synchronize`, and returns what has arrived. All are of this backend,
        or of those whose splits the runner runs together."""


class Peers(Protocol):
    """The other processes of a run, as a backend sees them."""

    def gather(self, text: str) -> list[str]:
        """The texts of all processes, by rank. All call it."""

    def look(self) -> None:
        """An error if one of them has failed; to be called while this process waits."""


@runtime_checkable
class Joins(Protocol):
    """A backend whose devices take collectives together: each has a joint node (joint.py), and a
    library brings the parts of the others.

    connection_bytes  estimate of the device memory that the library takes to connect it with others
    """

    connection_bytes: int

    def box_bytes(self, count: int) -> int:
        """The bytes of the device's memory that `count` devices which take steps together write to.
        Needs no device."""

    def joins(self, node: Node) -> bool:
        """Whether its devices take this joint node. Needs no device."""

    def sends(self) -> bool:
        """Whether copies between its devices are such steps, too. Needs no device."""

    def connect(self, devices: Sequence[Backend], index: int | None, peers: Peers | None) -> None:
        """Prepare the joint steps of these devices, of which this is one.

        index  the number of this process's device among them; None if it has none of them
        peers  None: this process has all of them. All processes call it, in the same order
        """

    def together(self, runners: Sequence[Runner]) -> Runner:
        """A runner of splits of several devices of this process that have joint steps of the same
        turns."""


@runtime_checkable
class StaysReady(Protocol):
    """A runner with threads that can wait awake for its next split of a run.

    more  whether another of its backend's splits follows in the run
    """

    more: bool


@runtime_checkable
class Carries(Protocol):
    """A runner on a device whose runs can include copies of small tensors from and to the host."""

    def carry(self, arrivals: Sequence[Crossing], departures: Sequence[Crossing]) -> Event | None:
        """From now on, `run` copies these from the host before its first step, with the values at
        the time of the call, and these to the host after the last one, where they are once the
        event has been waited for. None, and no copies, if it cannot."""


@runtime_checkable
class NamesKernels(Protocol):
    """A backend that can name the kernels of a step before it is bound. Needs no device.

    After that, the step's runner names them (`backends.timing.Timeable`), by the same function.
    """

    def kernels_of(self, step: Step, at: Addresses, scratch: int) -> Kernels:
        """The kernels that compute a step. For a loop: those of the first piece of each body.

        at       the address of every tensor, in buffers that may be `PlannedBuffer`s
        scratch  the address of the step's scratch
        """


def in_host_memory(backend: Backend) -> bool:
    """Whether its memory is the host's: also that of `numpy:1`, which is a device of its own."""
    return backend.device.partition(":")[0] == "host"


def host_values(backend: Backend, at: Address, spec: Spec) -> NDArray[Any]:
    """A tensor's values for the host to read: in place if they are in its memory, else a copy."""
    on_host = in_host_memory(backend)
    values: NDArray[Any] = backend.view(at, spec) if on_host else backend.download(at, spec)
    return values

"""Steps and the places of their tensors: what a planner hands to a runner."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from pyggml.errors import IdError, PyggmlError
from pyggml.loop import Body, Loop
from pyggml.node import Node, label_of, line_of
from pyggml.spec import Ne
from pyggml.transfer import origin

#: A backend's handle of a block of memory.
Buffer: TypeAlias = Any


@dataclass(frozen=True, slots=True)
class Address:
    """Where a tensor is: byte `offset` in `buffer`, byte strides `nb`.

    layout  for a weight, the name of its `WeightLayout`; unless that is "plain", ignore `nb`
    """

    buffer: Buffer
    offset: int
    nb: Ne
    layout: str = "plain"


Addresses: TypeAlias = Mapping[Node, Address]


@dataclass(frozen=True, slots=True)
class PlannedBuffer:
    """A block of memory that does not exist, at address `ptr`.

    Which kernel runs may depend on addresses; `NamesKernels` asks before anything is allocated.
    """

    ptr: int

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"data": (self.ptr, True), "shape": (0,), "typestr": "|u1", "version": 3}


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


#: The layout of each weight, by constant or by its transfer.
Layouts: TypeAlias = Mapping[Node, WeightLayout]


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
    """The unit that a runner executes: a kernel that covers one or more nodes, or a copy.

    node       the node whose result it writes
    nodes      all nodes it covers; they may include the backend's private nodes, which only its
               own steps read
    reads      the nodes it reads, as the kernel sees them (views included)
    scratch    bytes it needs while it runs
    workspace  bytes of work memory for a library of the device; all steps of all plans on the
               device share one block
    inplace    sources whose memory the result may take over
    strided    whether the result may be a strided part of a larger tensor
    """

    node: Node
    nodes: tuple[Node, ...]
    reads: tuple[Node, ...]
    scratch: int = 0
    inplace: tuple[Node, ...] = ()
    strided: bool = True
    workspace: int = 0

    @property
    def nbytes(self) -> int:
        """Size of the result in bytes."""
        return self.node.spec.nbytes

    @property
    def joint(self) -> Node | None:
        """The joint node that it covers, if there is one."""
        return next((node for node in self.nodes if node.op.joint), None)


@dataclass(eq=False, slots=True, kw_only=True)
class LoopStep(Step):
    """A step that runs bodies piece by piece. Its scratch is the larger of their arenas."""

    loop: Loop
    bodies: tuple[BodyPlan, ...]


@dataclass(eq=False, slots=True, kw_only=True)
class LoadStep(Step):
    """A step that transfers a weight from the host, stored in a layout while it is needed.

    ids    of experts, if nothing reads other experts of the weight: the device may leave out those,
           whose memory then holds anything
    ahead  whether other steps come before the first that reads the weight: the device may load it
           while it runs them
    """

    layout: WeightLayout
    ids: Node | None = None
    ahead: bool = False

    @property
    def nbytes(self) -> int:
        """Size of the weight in its layout, in bytes."""
        return self.layout.nbytes


def joint_step(node: Node) -> Step:
    """The step of a joint node. The result is in one piece, and may take over the part of a sum."""
    reads = tuple(part for part in node.src if part is not None)
    inplace = tuple(part for part in reads if part.spec == node.spec)
    return Step(node, (node,), reads, inplace=inplace, strided=False)


def innermost(step: Step) -> list[Step]:
    """The step; for a loop, the steps of one piece of each body."""
    if not isinstance(step, LoopStep):
        return [step]
    return [inner for plan in step.bodies for inner in plan.steps]


def own_nodes(nodes: Collection[Node], steps: Iterable[Step]) -> Iterator[Node]:
    """The nodes that steps compute besides the graph's `nodes`: private nodes of the backend."""
    known = set(nodes)
    return (node for step in steps for node in step.nodes if node not in known)


def kernel_error(error: Exception, node: Node) -> Exception:
    """The error of a kernel, with the node and the line that built it added to its message; errors
    of other libraries get them as a note."""
    sources = ", ".join(label_of(origin(s)) for s in node.src if s is not None)
    call, line = f"{node.op.name}({sources})", f"at {line_of(node)}"
    if isinstance(error, PyggmlError):
        error.args = (f"{call}: {error}; {line}", *error.args[1:])
    else:
        error.add_note(f"in the kernel of {call}, {line}")
    return error


def check_position(last: int, n_kv: int, stride: int = 1) -> None:
    """IdError if the last position of a causal mask is past its keys."""
    if last >= stride * (n_kv + 1) - 1:
        rows = f", each for {stride} positions" if stride > 1 else ""
        raise IdError(
            f"position {last} is past the keys: n_kv={n_kv}{rows}, counted from 0, so the token "
            "would not see its own key; a negative position sees none"
        )


def check_id(largest: int, count: int, name: str = "id", end: str = "the end") -> None:
    """IdError if the largest of some ids is past the end; negative ids choose nothing."""
    if largest >= count:
        raise IdError(
            f"{name} {largest} is past {end}: there are {count}, counted from 0; "
            f"a negative {name} means none"
        )

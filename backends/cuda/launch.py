"""Recording of kernel launches, cuBLAS products and copies. Needs no GPU.

A `.cu` file lists the kernel instances to compile ahead (tools/compile_kernels.py), one per line.
Braces expand to one line per alternative, `hot` forbids spills, and an architecture restricts a
line to that one:

    // @kernel hot add<{float|__half}, 4>
    // @kernel 90a attention<192, 128>
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from pyggml.backends.cuda.argument import Argument, Tensor, pack
from pyggml.backends.cuda.gpu import H200, Device
from pyggml.backends.cuda.table import ALIGNMENT
from pyggml.dtypes import F32, DType
from pyggml.errors import PyggmlError
from pyggml.node import Node
from pyggml.spec import Ne

Dim3 = tuple[int, int, int]

#: Bytes of workspace recommended for cuBLAS on this generation: one block per device, shared by all
#: products, which run one after another. `CudaKernel.cublas` returns whether a step needs it.
WORKSPACE = 32 << 20


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor of a step: device address, sizes, byte strides, type.

    layout  of a weight; "plain" for all other tensors. ne and nb are always those of ggml
    """

    ptr: int
    ne: Ne
    nb: Ne
    dtype: DType
    layout: str = "plain"

    @property
    def tensor(self) -> Tensor:
        """The operand as a kernel argument."""
        return Tensor(data=self.ptr, nb=self.nb, ne=self.ne)

    @property
    def pointer(self) -> np.uint64:
        """The address as a kernel argument."""
        return np.uint64(self.ptr)

    @property
    def contiguous(self) -> bool:
        """Whether it has no gaps, in ggml's order of dimensions."""
        size = self.dtype.nbytes
        units = (self.ne[0] // self.dtype.block, *self.ne[1:])
        for n, step in zip(units, self.nb):
            if n > 1 and step != size:
                return False
            size *= n
        return True

    @property
    def steps(self) -> tuple[int, ...]:
        """The byte strides of the dimensions that have more than one element, else 0."""
        return tuple(step if n > 1 else 0 for n, step in zip(self.ne, self.nb))

    def aligned(self, nbytes: int) -> bool:
        """Whether every row starts at a multiple of `nbytes`."""
        return all(x % nbytes == 0 for x in (self.ptr, *self.steps[1:]))


#: The operand that stands in for an absent tensor.
ABSENT = Operand(0, (1, 1, 1, 1), (0, 0, 0, 0), F32)


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch: the instance `name` of kernels/`file`, its geometry and packed arguments.

    overlap  whether it may start before its predecessor has ended
    early    whether it reads, before it waits, what a launch before its predecessor has written
    roomy    whether its multiprocessors have as much shared memory as they can, so that blocks of
             the next launch find some
    meeting  how it takes part in a sum over several GPUs, if it can
    patient  whether it reads nothing but constants before it waits
    soon     the instance that lets a patient successor start before it waits, if there is one
    """

    file: str
    name: str
    grid: Dim3
    block: Dim3
    args: bytes
    shared: int = 0
    overlap: bool = False
    early: bool = False
    roomy: bool = False
    meeting: Meeting | None = field(default=None, compare=False, repr=False)
    patient: bool = False
    soon: str = ""


@dataclass(frozen=True, slots=True)
class Meeting:
    """How a launch takes part in a sum of rows over several GPUs (rounds.py).

    at      where the row is
    sends   whether it computes this GPU's part, and can send it; else it reads the sum, and can add
            up parts
    launch  makes the launch that does, for the argument that says where the others are
    """

    at: int
    sends: bool
    launch: Callable[[Argument], Launch]


class Form(NamedTuple):
    """The name of such a launch, its arguments, and its grid if it has another."""

    name: str
    args: Sequence[Argument]
    grid: Dim3 | None = None


#: The fields of `Meeting`, with the form of the launch.
Meets = tuple[int, bool, Callable[[Argument], Form]]


@dataclass(frozen=True, slots=True)
class Gemm:
    """A call of cublasGemmStridedBatchedEx, with its conventions (column-major): C = op(A) op(B).

    types  of A, B and C; sums are f32, and f32 operands are not rounded to tf32
    """

    m: int
    n: int
    k: int
    ptrs: tuple[int, int, int]
    types: tuple[str, str, str]
    leading: tuple[int, int, int]
    transposed: tuple[bool, bool]
    batch: int
    strides: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Memcpy:
    """A copy within the device."""

    target: int
    source: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Tail:
    """What is around a sum in its step. Our own kernel, which adds, can do it, too.

    launch  of that kernel, without arguments
    args    its arguments, without those that say where the others are
    covers  the launches beside the record of the sum whose place it takes
    """

    launch: Launch
    args: tuple[Argument, ...]
    covers: tuple[Launch, ...]


@dataclass(frozen=True, slots=True)
class Collective:
    """A call of NCCL that the devices `places` make together; this one is number `index`.

    kind    "all_reduce", "all_gather" or "reduce_scatter"; "send" or "receive" between two
    counts  elements of the part of each device; for "reduce_scatter", of each piece
    type    of the elements: "f32", "f16" or, where they are only copied, "bytes"
    tail    what else our own kernel can do
    row     of a sum: how many elements the devices may send as a row of f16; 0: as they are
    """

    kind: str
    target: int
    source: int
    counts: tuple[int, ...]
    type: str
    places: tuple[str, ...]
    index: int
    tail: Tail | None = None
    row: int = 0


Record = Launch | Gemm | Memcpy | Collective


class Call:
    """A step being bound: its operands by name, and the records of its launches.

    call["b"] is the operand that the op names b. A fused step has the names of its pattern, and its
    further results by name as well. call.get("mask") is None if the operand is absent.

    node, attrs  the node and its attributes; in a loop, those of the current piece
    out          the result
    device       the properties that kernels may depend on
    names_only   arguments that only a driver can make may be left empty
    late, unread as in CudaStep
    awaited      names of operands that the launch right before may write; all if it is unknown
    """

    def __init__(
        self,
        node: Node,
        out: Operand,
        operands: Mapping[str, Operand],
        attrs: Mapping[str, Any],
        device: Device = H200,
        scratch: tuple[int, int] = (0, 0),
    ) -> None:
        self.node, self.out, self.attrs = node, out, attrs
        self.device = device
        self.names_only, self.late, self.unread = False, True, False
        self.awaited = frozenset(operands)
        self.records: list[Record] = []
        self._operands = operands
        self._scratch, self._limit = scratch
        self._used = 0

    def __getitem__(self, name: str) -> Operand:
        """The operand `name`; PyggmlError if it is absent."""
        operand = self._operands.get(name)
        if operand is None:
            names = ", ".join(self._operands) or "none"
            raise PyggmlError(f"the step has no operand {name!r}; its operands are: {names}")
        return operand

    def get(self, name: str) -> Operand | None:
        """The operand `name`, or None if it is absent."""
        return self._operands.get(name)

    def scratch(self, nbytes: int, align: int = ALIGNMENT) -> int:
        """The address of `nbytes` of the declared scratch; its contents are undefined."""
        start = self._used + -(self._scratch + self._used) % align
        self._used = start + nbytes
        if self._used > self._limit:
            raise PyggmlError(
                f"{self.node.op.name}: the kernel asked for {self._used} bytes of scratch "
                f"but declared {self._limit}"
            )
        return self._scratch + start

    @contextmanager
    def briefly(self) -> Iterator[None]:
        """Scratch that is taken inside can be taken again afterwards."""
        used = self._used
        yield
        self._used = used

    def launch(
        self,
        file: str,
        name: str,
        *,
        grid: tuple[int, ...] | int,
        block: tuple[int, ...] | int,
        args: Sequence[Argument],
        shared: int = 0,
        early: bool = False,
        roomy: bool = False,
        meeting: Meets | None = None,
        patient: bool = False,
        soon: str = "",
    ) -> None:
        """Record one kernel launch.

        file, name  kernels/`file`, and the C++ expression of the instance: "add<float, 4>"
        args        NumPy scalars (np.int32, np.int64, np.float32, np.uint64 for an address)
                    or Structs
        shared      bytes of dynamic shared memory
        early       as in Launch; constant weights do not count
        roomy, meeting, patient, soon
                    as in Launch; with a meeting, it is not patient
        """
        where = f"{self.node.op.name}: launch of {name}"
        size = _dim3(where, grid)
        if size[1] > 65535 or size[2] > 65535 or size[0] > 2**31 - 1:
            raise PyggmlError(f"{where}: the grid {size} exceeds the limits 2^31 - 1, 65535, 65535")
        threads, overlap = _dim3(where, block), self.device.overlaps
        launch = Launch(file, name, size, threads, pack(args), shared, overlap, early, roomy)
        if meeting is not None:
            at, sends, form = meeting

            def met(total: Argument) -> Launch:
                name, args, other = form(total)
                return replace(launch, name=name, args=pack(args), grid=other or size)

            launch = replace(launch, meeting=Meeting(at, sends, met))
        self.records.append(replace(launch, patient=patient, soon=soon))

    def gemm(
        self,
        m: int,
        n: int,
        k: int,
        a: int,
        b: int,
        c: int,
        *,
        types: tuple[str, str, str],
        leading: tuple[int, int, int],
        transposed: tuple[bool, bool] = (True, False),
        batch: int = 1,
        strides: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        """Record a cuBLAS product, which is column-major: C [m, n] = op(A) [m, k] op(B) [k, n].

        The defaults are ggml's y = a b: A is `a` [k, m] transposed, B is `b` [k, n].
        a, b, c           device addresses
        types             of A, B, C: "f32", "f16", "bf16"; sums are f32
        leading, strides  in elements; the strides are from matrix to matrix of the batch
        """
        self.records.append(Gemm(m, n, k, (a, b, c), types, leading, transposed, batch, strides))

    def memcpy(self, target: int, source: int, nbytes: int) -> None:
        """Record a copy of `nbytes` within the device."""
        self.records.append(Memcpy(target, source, nbytes))

    def collective(
        self, kind: str, source: int, counts: tuple[int, ...], type: str, row: int = 0
    ) -> None:
        """Record a call of NCCL by all devices of the joint node, into the result.

        The arguments are those of `Collective`.
        """
        places, index = self.attrs["places"], self.attrs["index"]
        self.records.append(
            Collective(kind, self.out.ptr, source, counts, type, places, index, row=row)
        )


def early_reads(awaited: frozenset[str], queries: set[str]) -> int:
    """What an attention reads before it waits for the launch before; `Early` in overlap.cuh.

    awaited  as in Call
    queries  the names of the operands that keys can be fetched without
    """
    if awaited & queries:
        return 0
    return 1 if awaited else 2


def _dim3(where: str, size: tuple[int, ...] | int) -> Dim3:
    sizes = (size,) if isinstance(size, int) else tuple(int(n) for n in size)
    full = sizes + (1,) * (3 - len(sizes))
    if len(full) != 3 or min(full) < 1:
        raise PyggmlError(f"{where}: expected one to three sizes of at least 1, got {size}")
    return full[0], full[1], full[2]

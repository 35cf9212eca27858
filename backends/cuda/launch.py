"""What a kernel's host function records: launches, products by cuBLAS, copies. Needs no GPU.

A `.cu` file says which instances of its kernels are compiled ahead (tools/compile_kernels.py), one
a line; braces stand for one line with each word, `hot` forbids spills, and an architecture
restricts it to that one:

    // @kernel hot add<{float|__half}, 4>
    // @kernel 90a attention<192, 128>
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyggml.backends.cuda.table import ALIGNMENT
from pyggml.dtypes import F32, DType
from pyggml.errors import PyggmlError
from pyggml.node import Ne, Node

Dim3 = tuple[int, int, int]

#: Bytes that cuBLAS likes to work in on this generation: one block of a device, which all products
#: share, as they follow each other. `Kernel.cublas` says which steps need it.
WORKSPACE = 32 << 20


@dataclass(frozen=True, slots=True)
class Device:
    """What kernels may depend on.

    arch    as NVRTC spells it, without "sm_": "90a"
    sms     multiprocessors
    shared  bytes of shared memory that a block can have
    l2      bytes of its cache
    """

    name: str
    arch: str
    sms: int
    shared: int
    l2: int
    memory: int

    @property
    def overlaps(self) -> bool:
        """Whether a launch may begin before its predecessor ended; every kernel waits for it
        (kernels/overlap.cuh)."""
        return not self.arch.startswith("8")


#: The device that is meant where none is there to be asked: planning and compiling ahead.
H200 = Device("H200", "90a", 132, 232_448, 60 << 20, 141 << 30)


@dataclass(frozen=True, slots=True)
class Value:
    """A struct passed by value, and where it must begin: CUtensorMap takes align=64."""

    data: bytes
    align: int = 8


Argument = Value | bytes | np.generic


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor of a step: device address, sizes, byte strides, type.

    layout  how a weight is kept, "plain" for everything else; ne and nb are then those of ggml
    """

    ptr: int
    ne: Ne
    nb: Ne
    dtype: DType
    layout: str = "plain"

    @property
    def tensor(self) -> Value:
        """The struct `Tensor` of common.cuh."""
        return Value(struct.pack("<Q4q4i", self.ptr, *self.nb, *self.ne))

    @property
    def pointer(self) -> np.uint64:
        """The address as an argument."""
        return np.uint64(self.ptr)

    @property
    def contiguous(self) -> bool:
        """Whether it lies in memory without gaps, in ggml's order."""
        size = self.dtype.nbytes
        units = (self.ne[0] // self.dtype.block, *self.ne[1:])
        for n, step in zip(units, self.nb):
            if n > 1 and step != size:
                return False
            size *= n
        return True

    def aligned(self, nbytes: int) -> bool:
        """Whether every row begins at a multiple of `nbytes`."""
        steps = [step for n, step in zip(self.ne[1:], self.nb[1:]) if n > 1]
        return all(x % nbytes == 0 for x in (self.ptr, *steps))


#: What a kernel gets in the place of a tensor that is not there.
ABSENT = Operand(0, (1, 1, 1, 1), (0, 0, 0, 0), F32)


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel: the instance `name` of kernels/`file`, its geometry and packed arguments."""

    file: str
    name: str
    grid: Dim3
    block: Dim3
    args: bytes
    shared: int = 0
    cluster: Dim3 | None = None
    overlap: bool = False


@dataclass(frozen=True, slots=True)
class Gemm:
    """cublasGemmStridedBatchedEx, in its words (column-major): C = alpha op(A) op(B) + beta C.

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
    alpha: float
    beta: float


@dataclass(frozen=True, slots=True)
class Memset:
    ptr: int
    byte: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Memcpy:
    """A copy inside the device."""

    target: int
    source: int
    nbytes: int


Record = Launch | Gemm | Memset | Memcpy


def pack(args: Sequence[Argument]) -> bytes:
    """Arguments as the driver takes them: each at a multiple of its own alignment."""
    packed = bytearray()
    for arg in args:
        if isinstance(arg, np.generic):
            data, align = arg.tobytes(), arg.dtype.itemsize
        elif isinstance(arg, Value):
            data, align = arg.data, arg.align
        elif isinstance(arg, (bytes, bytearray, memoryview)):
            data, align = bytes(arg), 8
        else:
            raise PyggmlError(
                f"a kernel's argument is a NumPy scalar (np.int32(3)), a Value or bytes, "
                f"not {arg!r}: its size must be known"
            )
        packed += bytes(-len(packed) % align) + data
    return bytes(packed)


class Call:
    """A step being bound: its operands, and a list of what it launches.

    node, attrs  the node; in a loop the attributes are those of this piece
    out, src     operands; None for an absent source
    also         further results of a step that covers several nodes
    device       what the kernels may depend on
    """

    def __init__(
        self,
        node: Node,
        out: Operand,
        src: Sequence[Operand | None],
        attrs: Mapping[str, Any],
        device: Device = H200,
        scratch: tuple[int, int] = (0, 0),
        also: Sequence[Operand] = (),
    ) -> None:
        self.node, self.out, self.src, self.attrs = node, out, tuple(src), attrs
        self.also = tuple(also)
        self.device = device
        self.records: list[Record] = []
        self._scratch, self._limit = scratch
        self._used = 0

    def operand(self, index: int) -> Operand:
        """Source number `index`, which is not absent."""
        found = self.src[index]
        assert found is not None
        return found

    def scratch(self, nbytes: int, align: int = ALIGNMENT) -> int:
        """The address of `nbytes` of the declared scratch; what it holds is undefined."""
        start = self._used + -(self._scratch + self._used) % align
        self._used = start + nbytes
        if self._used > self._limit:
            raise PyggmlError(
                f"{self.node.op.name}: the kernel asked for {self._used} bytes of scratch "
                f"but declared {self._limit}"
            )
        return self._scratch + start

    def launch(
        self,
        file: str,
        name: str,
        *,
        grid: tuple[int, ...] | int,
        block: tuple[int, ...] | int,
        args: Sequence[Argument],
        shared: int = 0,
        cluster: tuple[int, ...] | None = None,
    ) -> None:
        """Record one kernel.

        file, name  kernels/`file`, and the C++ expression of the instance: "add<float, 4>"
        args        NumPy scalars (np.int32, np.int64, np.float32, np.uint64 for an address),
                    structs as bytes or Value
        shared      bytes of dynamic shared memory
        cluster     blocks of a cluster
        """
        where = f"{self.node.op.name}: launch of {name}"
        size = _dim3(where, grid)
        if size[1] > 65535 or size[2] > 65535 or size[0] > 2**31 - 1:
            raise PyggmlError(f"{where}: the grid {size} is past the limits of 2^31, 65535, 65535")
        self.records.append(
            Launch(
                file,
                name,
                size,
                _dim3(where, block),
                pack(args),
                shared,
                None if cluster is None else _dim3(where, cluster),
                self.device.overlaps,
            )
        )

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
        alpha: float = 1.0,
        beta: float = 0.0,
    ) -> None:
        """Record a product by cuBLAS, which is column-major: C [m, n] = op(A) [m, k] op(B) [k, n].

        The defaults are ggml's y = a b: A is `a` [k, m] transposed, B is `b` [k, n].
        a, b, c           device addresses
        types             of A, B, C: "f32", "f16", "bf16"; sums are f32
        leading, strides  in elements; strides are those of the batch
        """
        self.records.append(
            Gemm(
                m,
                n,
                k,
                (a, b, c),
                types,
                leading,
                transposed,
                batch,
                strides,
                alpha,
                beta,
            )
        )

    def memset(self, ptr: int, byte: int, nbytes: int) -> None:
        """Record: fill `nbytes` with a byte."""
        self.records.append(Memset(ptr, byte, nbytes))

    def memcpy(self, target: int, source: int, nbytes: int) -> None:
        """Record: copy `nbytes` inside the device."""
        self.records.append(Memcpy(target, source, nbytes))


def _dim3(where: str, size: tuple[int, ...] | int) -> Dim3:
    sizes = (size,) if isinstance(size, int) else tuple(int(n) for n in size)
    full = sizes + (1,) * (3 - len(sizes))
    if len(full) != 3 or min(full) < 1:
        raise PyggmlError(f"{where}: {size} is no geometry; it takes one to three sizes from 1")
    return full[0], full[1], full[2]

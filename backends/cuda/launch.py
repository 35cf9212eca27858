"""What a kernel's host function records: launches, products by cuBLAS, copies. Needs no GPU.

A `.cu` file says which instances of its kernels are compiled ahead (tools/compile_kernels.py), one
a line; braces stand for one line with each word, `hot` forbids spills, and an architecture
restricts it to that one:

    // @kernel hot add<{float|__half}, 4>
    // @kernel 90a attention<192, 128>
"""

from __future__ import annotations

import ctypes
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


class Struct(ctypes.Structure):
    """A C++ struct as a kernel's argument; `_fields_` follow its declaration, name by name.

    All fields are given by keyword, arrays as tuples. PyggmlError for a number that does not fit:
    ctypes alone would cut it off.
    """

    def __init__(self, **values: Any) -> None:
        kind = type(self).__name__
        names = {field[0] for field in self._fields_}
        if values.keys() != names:
            raise PyggmlError(f"{kind} takes {', '.join(sorted(names))}; got {', '.join(values)}")
        super().__init__(**values)
        for name, value in values.items():
            field = getattr(self, name)
            numbers = tuple(field) if isinstance(field, ctypes.Array) else (field,)
            if isinstance(numbers[0], int) and numbers != (
                value if isinstance(value, tuple) else (value,)
            ):
                raise PyggmlError(f"{kind}.{name}: {value} does not fit")


class Tensor(Struct):
    """The struct `Tensor` of common.cuh: address, byte strides, sizes."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("nb", ctypes.c_int64 * 4),
        ("ne", ctypes.c_int32 * 4),
    )


Argument = Struct | np.generic


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
    def tensor(self) -> Tensor:
        """The operand as kernels take it."""
        return Tensor(data=self.ptr, nb=self.nb, ne=self.ne)

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
    overlap: bool = False


@dataclass(frozen=True, slots=True)
class Gemm:
    """cublasGemmStridedBatchedEx, in its words (column-major): C = op(A) op(B).

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
    """A copy inside the device."""

    target: int
    source: int
    nbytes: int


Record = Launch | Gemm | Memcpy


def pack(args: Sequence[Argument]) -> bytes:
    """Arguments as the driver takes them: each at a multiple of its own alignment."""
    packed = bytearray()
    for arg in args:
        if isinstance(arg, np.generic):
            data, align = arg.tobytes(), arg.dtype.itemsize
        elif isinstance(arg, Struct):
            data, align = bytes(arg), ctypes.alignment(arg)
        else:
            raise PyggmlError(
                f"a kernel's argument is a NumPy scalar (np.int32(3)) or a Struct, not {arg!r}: "
                "its size must be known"
            )
        packed += bytes(-len(packed) % align) + data
    return bytes(packed)


class Call:
    """A step being bound: its operands by name, and a list of what it launches.

    call["b"] is an operand by the op's name for it (for a fused step, by the name that its pattern
    gives), or a further result of a fused step; call.get("mask") is None where it is absent.

    node, attrs  the node; in a loop the attributes are those of this piece
    out          the result
    device       what the kernels may depend on
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
        self.records: list[Record] = []
        self._operands = operands
        self._scratch, self._limit = scratch
        self._used = 0

    def __getitem__(self, name: str) -> Operand:
        """The operand of that name, which is there."""
        operand = self._operands.get(name)
        if operand is None:
            names = ", ".join(self._operands) or "none"
            raise PyggmlError(f"the step has no operand {name!r}; its operands are: {names}")
        return operand

    def get(self, name: str) -> Operand | None:
        """The operand of that name, None where it is absent."""
        return self._operands.get(name)

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
    ) -> None:
        """Record one kernel.

        file, name  kernels/`file`, and the C++ expression of the instance: "add<float, 4>"
        args        NumPy scalars (np.int32, np.int64, np.float32, np.uint64 for an address),
                    or a Struct
        shared      bytes of dynamic shared memory
        """
        where = f"{self.node.op.name}: launch of {name}"
        size = _dim3(where, grid)
        if size[1] > 65535 or size[2] > 65535 or size[0] > 2**31 - 1:
            raise PyggmlError(f"{where}: the grid {size} is past the limits of 2^31, 65535, 65535")
        launch = Launch(
            file, name, size, _dim3(where, block), pack(args), shared, self.device.overlaps
        )
        self.records.append(launch)

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
        """Record a product by cuBLAS, which is column-major: C [m, n] = op(A) [m, k] op(B) [k, n].

        The defaults are ggml's y = a b: A is `a` [k, m] transposed, B is `b` [k, n].
        a, b, c           device addresses
        types             of A, B, C: "f32", "f16", "bf16"; sums are f32
        leading, strides  in elements; strides are those of the batch
        """
        self.records.append(Gemm(m, n, k, (a, b, c), types, leading, transposed, batch, strides))

    def memcpy(self, target: int, source: int, nbytes: int) -> None:
        """Record: copy `nbytes` inside the device."""
        self.records.append(Memcpy(target, source, nbytes))


def _dim3(where: str, size: tuple[int, ...] | int) -> Dim3:
    sizes = (size,) if isinstance(size, int) else tuple(int(n) for n in size)
    full = sizes + (1,) * (3 - len(sizes))
    if len(full) != 3 or min(full) < 1:
        raise PyggmlError(f"{where}: {size} is no geometry; it takes one to three sizes from 1")
    return full[0], full[1], full[2]

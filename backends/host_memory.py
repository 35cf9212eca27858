"""Host memory: tensors as NumPy arrays, and the scratch of kernels.

Scratch starts at multiples of `ALIGNMENT`. Operands and results may not: weights are read from the
file's memory map and a caller's arrays where they are, and a view or a part of a larger result
starts anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.step import Address
from pyggml.dtypes import F32, TYPES, DType
from pyggml.errors import OutOfMemoryError, PyggmlError
from pyggml.spec import Spec

#: Bytes; blocks of memory, tensors with their own place in an arena and arrays of scratch start at
#: multiples of it.
ALIGNMENT = 64

#: The layout of a weight of another type that is stored as f32.
DECODED = "f32"

Raw = NDArray[Any]
Floats = NDArray[np.float32]

_PLAIN = {np.dtype(t.numpy): t for t in TYPES.values() if t.numpy}


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor of a type that NumPy lacks: bf16 or a block type.

    raw  bf16:   uint16 [ne3, ne2, ne1, ne0]
         blocks: uint8  [ne3, ne2, ne1, ne0 / block, bytes of a block]
    """

    dtype: DType
    raw: Raw
    ne: tuple[int, int, int, int]


Array = Raw | Packed


def raw_of(x: Array) -> tuple[DType, Raw]:
    """The type of an operand, and the array whose first three axes are ne3, ne2 and ne1."""
    return (x.dtype, x.raw) if isinstance(x, Packed) else (_PLAIN[x.dtype], x)


def shape_of(x: Array) -> tuple[int, ...]:
    """The four sizes in NumPy's order: ne3, ne2, ne1, ne0."""
    return x.ne[::-1] if isinstance(x, Packed) else x.shape


def allocated(nbytes: int) -> NDArray[np.uint8]:
    """`nbytes` zero bytes, aligned."""
    try:
        raw = np.zeros(nbytes + ALIGNMENT, np.uint8)
    except (MemoryError, ValueError) as error:
        raise OutOfMemoryError(f"the host cannot allocate {nbytes} bytes: {error}") from None
    skip = -raw.ctypes.data % ALIGNMENT
    return raw[skip : skip + nbytes]


def address_of(array: NDArray[Any]) -> int:
    """The address of an array's first byte."""
    return int(array.__array_interface__["data"][0])


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Scratch:
    """A bump allocator over the scratch bytes that a kernel declared."""

    __slots__ = ("_memory", "used")

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self._memory = memory
        self.used = 0

    def array(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> NDArray[Any]:
        """An uninitialized C-contiguous array inside the declared bytes."""
        shape = (shape,) if isinstance(shape, int) else shape
        count = 1
        for extent in shape:
            count *= extent
        nbytes = count * np.dtype(dtype).itemsize
        start, end = self.used, self.used + nbytes
        if end > self._memory.nbytes:
            raise PyggmlError(
                f"a kernel asked for {end} bytes of scratch but declared {self._memory.nbytes}"
            )
        self.used = aligned(end)
        array: NDArray[Any] = self._memory[start:end].view(dtype).reshape(shape)
        return array


def array_at(at: Address, spec: Spec) -> Array:
    """The four-dimensional array (or `Packed`) at an address."""
    if at.layout == DECODED:
        at, spec = _as_f32(at, spec)
    dtype, ne, nb = spec.dtype, spec.ne, at.nb
    outer = (ne[3], ne[2], ne[1])
    steps = (nb[3], nb[2], nb[1])
    if dtype.numpy is not None:
        return _strided((*outer, ne[0]), dtype.numpy, at, (*steps, nb[0]))
    if dtype.block == 1:
        return Packed(dtype, _strided((*outer, ne[0]), np.uint16, at, (*steps, nb[0])), ne)
    shape = (*outer, ne[0] // dtype.block, dtype.nbytes)
    return Packed(dtype, _strided(shape, np.uint8, at, (*steps, nb[0], 1)), ne)


def _as_f32(at: Address, spec: Spec) -> tuple[Address, Spec]:
    """The address and the type of a decoded weight, or of a view of one, whose offset and strides
    are planned for the weight's own type."""
    block, nbytes = spec.dtype.block, spec.dtype.nbytes
    offset, *nb = (n // nbytes * block * F32.nbytes for n in (at.offset, *at.nb))
    nb0 = F32.nbytes if block > 1 else nb[0]
    return Address(at.buffer, offset, (nb0, nb[1], nb[2], nb[3])), Spec(F32, spec.ne, spec.rank)


def _strided(
    shape: tuple[int, ...], dtype: Any, at: Address, strides: tuple[int, ...]
) -> NDArray[Any]:
    array: NDArray[Any] = np.ndarray(shape, dtype, at.buffer, at.offset, strides)
    return array

"""DLPack: what a capsule of another library says of a tensor. Needs neither CuPy nor a GPU.

CuPy takes no bf16 from a capsule, and PyTorch calls its bf16 "<f2" in __cuda_array_interface__; the
capsule alone tells the two 16-bit floats apart.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import prod
from typing import Any

#: Kinds of devices: memory of a GPU, and memory that it shares with the host.
CUDA, MANAGED = 2, 13
_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat"}


class _Device(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("index", ctypes.c_int32)]


class _Type(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    """DLTensor, with which the unversioned DLManagedTensor begins."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("type", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of another library.

    address  of its first byte
    shape    NumPy's; strides in bytes, None for no gaps in C order
    type     NumPy's name of the element type, or "bfloat16"; `size` its bytes
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    type: str
    size: int

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.size * prod(self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether it lies without gaps, in C order."""
        size = self.size
        for n, step in zip(self.shape[::-1], (self.strides or ())[::-1]):
            if n > 1 and step != size:
                return False
            size *= n
        return True


def described(capsule: Any) -> Tensor:
    """The tensor of a "dltensor" capsule, valid while the capsule lives: it stays its owner."""
    held = _Tensor.from_address(_pointer(capsule, b"dltensor"))
    size = held.type.bits * held.type.lanes // 8
    name = _CODES.get(held.type.code, f"type {held.type.code}, bits ")
    lanes = "" if held.type.lanes == 1 else f"x{held.type.lanes}"
    return Tensor(
        address=(held.data or 0) + held.byte_offset,
        shape=tuple(held.shape[: held.ndim]),
        strides=tuple(size * n for n in held.strides[: held.ndim]) if held.strides else None,
        type=f"{name}{held.type.bits}{lanes}",
        size=size,
    )

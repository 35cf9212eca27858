"""DLPack: the description of a tensor in another library's capsule. Needs neither CuPy nor a GPU.

CuPy rejects bf16 in a capsule, and PyTorch reports bf16 as "<f2" in __cuda_array_interface__, so
only the capsule distinguishes the two 16-bit floats.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import prod
from typing import Any

#: Device types: GPU memory, and memory managed for GPU and host.
CUDA, MANAGED = 2, 13
_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat"}


class _Device(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("index", ctypes.c_int32)]


class _Type(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    """DLTensor, the first member of the unversioned DLManagedTensor."""

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
    type     NumPy's name of the element type, or "bfloat16"; size: its bytes
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    type: str
    size: int

    @property
    def nbytes(self) -> int:
        """Size of its elements in bytes."""
        return self.size * prod(self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether it has no gaps, in C order."""
        size = self.size
        for n, step in zip(self.shape[::-1], (self.strides or ())[::-1]):
            if n > 1 and step != size:
                return False
            size *= n
        return True


def described(capsule: Any) -> Tensor:
    """The tensor of a "dltensor" capsule. The capsule keeps ownership: the tensor is valid while it
    lives."""
    tensor = _Tensor.from_address(_pointer(capsule, b"dltensor"))
    size = tensor.type.bits * tensor.type.lanes // 8
    name = _CODES.get(tensor.type.code, f"type {tensor.type.code}, bits ")
    lanes = "" if tensor.type.lanes == 1 else f"x{tensor.type.lanes}"
    return Tensor(
        address=(tensor.data or 0) + tensor.byte_offset,
        shape=tuple(tensor.shape[: tensor.ndim]),
        strides=tuple(size * n for n in tensor.strides[: tensor.ndim]) if tensor.strides else None,
        type=f"{name}{tensor.type.bits}{lanes}",
        size=size,
    )

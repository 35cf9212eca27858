"""Kernel arguments: C++ structs as ctypes, and how arguments are packed for a launch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyggml.errors import PyggmlError


class Struct(ctypes.Structure):
    """A C++ struct as a kernel argument; `_fields_` match its declaration name by name.

    Pass every field by keyword, arrays as tuples. A number that does not fit its field raises
    PyggmlError; ctypes alone would truncate it.
    """

    def __init__(self, **values: Any) -> None:
        struct = type(self).__name__
        names = {field[0] for field in self._fields_}
        if values.keys() != names:
            raise PyggmlError(f"{struct} takes {', '.join(sorted(names))}; got {', '.join(values)}")
        super().__init__(**values)
        for name, value in values.items():
            field = getattr(self, name)
            numbers = tuple(field) if isinstance(field, ctypes.Array) else (field,)
            if isinstance(numbers[0], int) and numbers != (
                value if isinstance(value, tuple) else (value,)
            ):
                raise PyggmlError(f"{struct}.{name}: {value} does not fit")


class Tensor(Struct):
    """The struct `Tensor` of common.cuh: address, byte strides, sizes."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("nb", ctypes.c_int64 * 4),
        ("ne", ctypes.c_int32 * 4),
    )


Argument = Struct | np.generic


def pack(args: Sequence[Argument]) -> bytes:
    """Pack arguments the way the driver expects: each at a multiple of its own alignment."""
    packed = bytearray()
    for arg in args:
        if isinstance(arg, np.generic):
            data, align = arg.tobytes(), arg.dtype.itemsize
        elif isinstance(arg, Struct):
            data, align = bytes(arg), ctypes.alignment(arg)
        else:
            raise PyggmlError(
                "a kernel argument must be a NumPy scalar (np.int32(3)) or a Struct, so that its "
                f"size is known; got {arg!r}"
            )
        packed += bytes(-len(packed) % align) + data
    return bytes(packed)

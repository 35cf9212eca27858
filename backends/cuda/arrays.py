"""Arrays of other libraries on the device: taken and given without a copy through the host."""

from __future__ import annotations

from typing import Any

from pyggml.backends.base import Address
from pyggml.backends.cuda.driver import Context, guarded
from pyggml.backends.cuda.memory import operand_at, units
from pyggml.errors import DTypeError, ShapeError
from pyggml.graph import Spec


def on_device(array: object) -> bool:
    """Whether it is a device array of CuPy, PyTorch, pycuda or whoever speaks the interface."""
    return hasattr(array, "__cuda_array_interface__")


def view(context: Context, at: Address, spec: Spec) -> Any:
    """A CuPy array over a tensor: NumPy shape, uint16 for bf16, [.., blocks, bytes] for blocks.

    It is valid until the store's next run, and its memory until the plan is let go.
    """
    import cupy

    kind, size = spec.dtype, max(at.buffer.nbytes, 1)
    block = cupy.cuda.UnownedMemory(at.buffer.ptr, size, at.buffer, context.index)
    memory = cupy.cuda.MemoryPointer(block, at.offset)
    shape, strides = units(spec)[::-1], at.nb[::-1]
    if kind.block > 1:
        made = cupy.ndarray((*shape, kind.nbytes), "u1", memory, (*strides, 1))
        return made.reshape(made.shape[4 - spec.rank :])
    made = cupy.ndarray(shape, kind.numpy or "u2", memory, strides)
    return made.reshape(spec.shape)


def copy_in(context: Context, at: Address, spec: Spec, array: Any) -> None:
    """Write a device array (a tensor's NumPy shape and stored type) at an address.

    Errors: ShapeError, DTypeError where it is not what the tensor takes.
    """
    import cupy

    target = view(context, at, spec)
    with context.external:
        given = cupy.asarray(array)
        if given.dtype != target.dtype:
            raise DTypeError(f"a device array of {given.dtype} is no {spec}: cast it first")
        if given.size != target.size:
            raise ShapeError(f"a device array of shape {given.shape} is no {spec}")
        here = operand_at(at, spec)
        if here.contiguous and given.flags.c_contiguous:
            with guarded("copying a device array"):
                context.driver.memcpy_dtod_async(
                    here.ptr, given.data.ptr, spec.nbytes, context.stream
                )
        else:
            target[...] = given.reshape(target.shape)

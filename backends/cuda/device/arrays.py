"""Arrays of other libraries in GPU memory, and tensors in a form that those libraries accept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.base import Given
from pyggml.backends.cuda.device import dlpack
from pyggml.backends.cuda.device.context import Context
from pyggml.backends.cuda.device.driver import guarded
from pyggml.backends.step import Address
from pyggml.errors import DTypeError, GraphError
from pyggml.spec import Spec

#: The alignment in bytes of an array that is used as an input's memory: the widest load.
ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Borrowed:
    """Memory owned by someone else, in place of a `memory.Buffer`; `owner` keeps it alive."""

    ptr: int
    nbytes: int
    owner: Any


def on_device(array: object) -> bool:
    """Whether it may be in GPU memory: it supports a protocol of such arrays."""
    return hasattr(array, "__dlpack_device__") or hasattr(array, "__cuda_array_interface__")


def given(context: Context, array: Any) -> Given | None:
    """The array, by DLPack or __cuda_array_interface__, if it is in this GPU's memory, else None.

    Its `ready` makes the context's stream wait for pending work of the array's library.
    """
    if isinstance(array, DeviceArray):  # its run is over
        if array.index != context.index:
            return None
        owner, tensor, ready = array, _described(array.__cuda_array_interface__), lambda: None
    elif hasattr(array, "__dlpack_device__"):
        device_type, index = _call(array.__dlpack_device__)
        if device_type not in (dlpack.CUDA, dlpack.MANAGED) or index != context.index:
            return None
        owner = _export(context, array)  # exporting a capsule makes the stream wait
        tensor = dlpack.described(owner)
        ready = partial(_share_again, context, array, tensor.address)
    elif hasattr(array, "__cuda_array_interface__"):
        interface = array.__cuda_array_interface__
        if _device_of(interface["data"][0]) != context.index:
            return None
        owner, tensor = array, _described(interface)
        ready = partial(_follow, context, array, tensor.address)
    else:
        return None
    return Given(
        buffer=Borrowed(tensor.address, tensor.nbytes, (array, owner)),
        offset=0,
        address=tensor.address,
        alignment=ALIGNMENT,
        shape=tensor.shape,
        type=tensor.type,
        contiguous=tensor.contiguous,
        ready=ready,
    )


def _call(call: Callable[..., Any], **options: Any) -> Any:
    try:
        return call(**options)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise DTypeError(f"its library refuses to share it: {error}") from None


def _export(context: Context, array: Any) -> Any:
    with context:  # the library makes our stream wait for its current stream on this GPU
        return _call(array.__dlpack__, stream=context.stream.handle)


def _share_again(context: Context, array: Any, address: int) -> None:
    """Wait for the array's library again; GraphError if its memory has moved."""
    _require_same(dlpack.described(_export(context, array)).address, address)


def _require_same(address: int, bound: int) -> None:
    if address != bound:
        raise GraphError("the array's memory has moved since it was bound; bind it again")


def _described(interface: dict[str, Any]) -> dlpack.Tensor:
    """The tensor of a __cuda_array_interface__; DTypeError if it has a mask."""
    if interface.get("mask") is not None:
        raise DTypeError("masked arrays are not supported; fill the masked values first")
    dtype = np.dtype(interface["typestr"])
    return dlpack.Tensor(
        address=interface["data"][0],
        shape=tuple(interface["shape"]),
        strides=interface.get("strides"),
        type=dtype.name if dtype.isnative else dtype.str,
        size=dtype.itemsize,
    )


def _device_of(ptr: int) -> int:
    """The GPU whose memory an address is in."""
    import cupy

    return int(cupy.cuda.runtime.pointerGetAttributes(ptr).device)


def _follow(context: Context, array: Any, address: int) -> None:
    """Make the context's stream wait for the array's stream, if it names one (version 3 of the
    interface). GraphError if its memory has moved."""
    interface = array.__cuda_array_interface__
    _require_same(interface["data"][0], address)
    stream = interface.get("stream")
    if stream is not None:
        import cupy

        with context, guarded("waiting for the stream of an array"):
            producer = cupy.cuda.ExternalStream(stream, context.index)
            context.external.wait_event(producer.record())


class DeviceArray:
    """A tensor in GPU memory that other libraries can read in place: `cupy.asarray`,
    `torch.from_dlpack`, `torch.as_tensor`, ... `np.asarray` copies it to the host.

    shape, dtype  NumPy's; uint16 for bf16, uint8 [.., bytes of a row] for block types
    It is valid until the store's next run; it keeps its memory alive.
    """

    def __init__(
        self, context: Context, at: Address, spec: Spec, download: Callable[[], NDArray[Any]]
    ) -> None:
        dtype = spec.dtype
        self.dtype = np.dtype(dtype.numpy or ("u2" if dtype.block == 1 else "u1"))
        row = spec.ne[0] if dtype.block == 1 else dtype.row_bytes(spec.ne[0])
        self.shape = (*spec.shape[:-1], row)
        inner = at.nb[0] if dtype.block == 1 else 1  # rows of blocks are contiguous
        self.strides = (*at.nb[spec.rank - 1 : 0 : -1], inner)
        self.index = context.index
        self._ptr, self._buffer, self._download = at.buffer.ptr + at.offset, at.buffer, download

    def __repr__(self) -> str:
        return f"<{self.dtype} array {self.shape} on cuda:{self.index}>"

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.dtype.str,
            "strides": self.strides,
            "data": (self._ptr, False),  # PyTorch rejects read-only arrays
            "stream": None,  # nothing to wait for
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.index

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
        **options: Any,
    ) -> Any:
        """CuPy's capsule: its destructor needs no Python, and capsules can outlive the
        interpreter."""
        import cupy

        if dl_device not in (None, self.__dlpack_device__()):
            raise BufferError(f"the array is on cuda:{self.index}, not on device {dl_device}")

        size = max(self._buffer.nbytes, 1)
        block = cupy.cuda.UnownedMemory(self._buffer.ptr, size, self, self.index)
        memory = cupy.cuda.MemoryPointer(block, self._ptr - self._buffer.ptr)
        array = cupy.ndarray(self.shape, self.dtype, memory, self.strides)
        if copy:
            with cupy.cuda.Device(self.index):
                array = array.copy()
        return array.__dlpack__(stream=stream)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("GPU memory cannot be read without a copy; drop copy=False")
        array = self._download()
        return array if dtype is None else array.astype(dtype)

"""Arrays of other libraries in a GPU's memory, and tensors as those libraries take them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.base import Address, Given
from pyggml.backends.cuda.device import dlpack
from pyggml.backends.cuda.device.driver import Context, guarded
from pyggml.errors import DTypeError, GraphError
from pyggml.node import Spec

#: What the address of an array that stays an input's memory must be a multiple of: the widest load.
ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Borrowed:
    """Memory that somebody else owns, in the place of a `memory.Buffer`; `owner` keeps it."""

    ptr: int
    nbytes: int
    owner: Any


def on_device(array: object) -> bool:
    """Whether it may be in the memory of a GPU: it speaks a protocol by which such arrays do."""
    return hasattr(array, "__dlpack_device__") or hasattr(array, "__cuda_array_interface__")


def given(context: Context, array: Any) -> Given | None:
    """The array in this GPU's memory, by DLPack or __cuda_array_interface__; None elsewhere.

    Its `ready` lets our stream wait for what the library that made it has begun.
    """
    if isinstance(array, DeviceArray):  # a run is over when its outputs are given
        if array.index != context.index:
            return None
        owner, tensor, ready = array, _described(array.__cuda_array_interface__), lambda: None
    elif hasattr(array, "__dlpack_device__"):
        kind, index = _asked(array.__dlpack_device__)
        if kind not in (dlpack.CUDA, dlpack.MANAGED) or index != context.index:
            return None
        owner = _shared(context, array)  # whoever gives a capsule makes our stream wait
        tensor = dlpack.described(owner)
        ready = partial(_share_again, context, array, tensor.address)
    elif hasattr(array, "__cuda_array_interface__"):
        about = array.__cuda_array_interface__
        if _device_of(about["data"][0]) != context.index:
            return None
        owner, tensor = array, _described(about)
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


def _asked(call: Callable[..., Any], **options: Any) -> Any:
    try:
        return call(**options)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise DTypeError(f"its library does not share it: {error}") from None


def _shared(context: Context, array: Any) -> Any:
    with context:  # its library makes ours wait for the stream that is current on this GPU
        return _asked(array.__dlpack__, stream=context.stream.handle)


def _share_again(context: Context, array: Any, address: int) -> None:
    """Wait for the array's library once more; GraphError where its memory is another by now."""
    _want_same(dlpack.described(_shared(context, array)).address, address)


def _want_same(address: int, bound: int) -> None:
    if address != bound:
        raise GraphError("the array's memory has moved since it was bound: bind it again")


def _described(about: dict[str, Any]) -> dlpack.Tensor:
    """What __cuda_array_interface__ says; DTypeError for values behind a mask."""
    if about.get("mask") is not None:
        raise DTypeError("arrays with a mask are not taken")
    kind = np.dtype(about["typestr"])
    return dlpack.Tensor(
        address=about["data"][0],
        shape=tuple(about["shape"]),
        strides=about.get("strides"),
        type=kind.name if kind.isnative else kind.str,
        size=kind.itemsize,
    )


def _device_of(ptr: int) -> int:
    """The GPU whose memory an address is in."""
    import cupy

    return int(cupy.cuda.runtime.pointerGetAttributes(ptr).device)


def _follow(context: Context, array: Any, address: int) -> None:
    """Let the stream wait for the one that the array says it is in use on; before version 3 of
    the interface, and for None, there is none to wait for. GraphError where its memory moved."""
    about = array.__cuda_array_interface__
    _want_same(about["data"][0], address)
    stream = about.get("stream")
    if stream is not None:
        import cupy

        with context, guarded("waiting for the stream of an array"):
            producer = cupy.cuda.ExternalStream(stream, context.index)
            context.external.wait_event(producer.record())


class DeviceArray:
    """A tensor where it stands on a GPU, for whoever reads there: `cupy.asarray`,
    `torch.from_dlpack`, `torch.as_tensor`, ... `np.asarray` copies it to the host.

    shape, dtype  NumPy's; uint16 for bf16, uint8 [.., bytes of a row] for block types
    It is valid until the store's next run; its memory stays as long as somebody holds it.
    """

    def __init__(
        self, context: Context, at: Address, spec: Spec, download: Callable[[], NDArray[Any]]
    ) -> None:
        kind = spec.dtype
        self.dtype = np.dtype(kind.numpy or ("u2" if kind.block == 1 else "u1"))
        row = spec.ne[0] if kind.block == 1 else kind.row_bytes(spec.ne[0])
        self.shape = (*spec.shape[:-1], row)
        inner = at.nb[0] if kind.block == 1 else 1  # rows of blocks lie together
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
            "data": (self._ptr, False),  # PyTorch takes nothing that says it is read-only
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
        """CuPy's capsule, freed by code that needs no Python: capsules outlive interpreters."""
        import cupy

        if dl_device not in (None, self.__dlpack_device__()):
            raise BufferError(f"the array is on cuda:{self.index}, not on device {dl_device}")

        size = max(self._buffer.nbytes, 1)
        block = cupy.cuda.UnownedMemory(self._buffer.ptr, size, self, self.index)
        memory = cupy.cuda.MemoryPointer(block, self._ptr - self._buffer.ptr)
        made = cupy.ndarray(self.shape, self.dtype, memory, self.strides)
        if copy:
            with cupy.cuda.Device(self.index):
                made = made.copy()
        return made.__dlpack__(stream=stream)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("memory of a GPU cannot be seen without a copy")
        found = self._download()
        return found if dtype is None else found.astype(dtype)

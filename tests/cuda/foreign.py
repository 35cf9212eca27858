"""Arrays of other libraries on a fake GPU (see fake_pycuda)."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

View = Callable[[np.ndarray], np.ndarray]


def on_device(values: np.ndarray, view: View, offset: int) -> np.ndarray:
    """A view of these values in device memory, `offset` bytes into a block."""
    import pycuda.driver

    block = pycuda.driver.DeviceAllocation(values.nbytes + offset)
    raw = block.memory[block.ptr - block.memory.ctypes.data + offset :][: values.nbytes]
    array = raw.view(values.dtype).reshape(values.shape)
    array[...] = values
    return view(array)


class Interface:
    """An array that has only __cuda_array_interface__, like pycuda's."""

    def __init__(
        self, values: np.ndarray, view: View = np.asarray, offset: int = 0, **more: Any
    ) -> None:
        self.values, self.more = on_device(values, view, offset), more

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        array = self.values
        strides = None if array.flags.c_contiguous else array.strides
        return {
            "version": 3,
            "shape": array.shape,
            "typestr": array.dtype.str,
            "strides": strides,
            "data": (array.ctypes.data, False),
            **self.more,
        }


class Capsule:
    """An array with DLPack, like CuPy's and PyTorch's. `streams` lists those of its exports."""

    def __init__(self, values: np.ndarray, view: View = np.asarray, index: int = 0) -> None:
        self.values, self.index, self.streams = on_device(values, view, 0), index, list[Any]()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.index

    def __dlpack__(self, *, stream: Any = None) -> Any:
        self.streams.append(stream)
        return self.values.__dlpack__()


class CuPy:
    """The functions of CuPy that find the GPU of an address and make a stream wait.

    index   the GPU of every address
    waited  the streams that were waited for
    """

    def __init__(self) -> None:
        self.index, self.waited = 0, list[int]()
        self.cuda = SimpleNamespace(
            runtime=SimpleNamespace(
                pointerGetAttributes=lambda ptr: SimpleNamespace(device=self.index)
            ),
            ExternalStream=lambda handle, index: SimpleNamespace(
                record=lambda: handle, wait_event=self.waited.append
            ),
        )

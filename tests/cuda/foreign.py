"""Arrays of other libraries on a GPU that is not there (see fake_pycuda)."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

Look = Callable[[np.ndarray], np.ndarray]


def on_device(values: np.ndarray, look: Look, offset: int) -> np.ndarray:
    """What `look` shows of these values in device memory, `offset` bytes into a block."""
    import pycuda.driver

    block = pycuda.driver.DeviceAllocation(values.nbytes + offset)
    raw = block.memory[block.ptr - block.memory.ctypes.data + offset :][: values.nbytes]
    held = raw.view(values.dtype).reshape(values.shape)
    held[...] = values
    return look(held)


class Interface:
    """An array that speaks __cuda_array_interface__ alone, as pycuda's do."""

    def __init__(
        self, values: np.ndarray, look: Look = np.asarray, offset: int = 0, **more: Any
    ) -> None:
        self.held, self.more = on_device(values, look, offset), more

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        held = self.held
        strides = None if held.flags.c_contiguous else held.strides
        return {
            "version": 3,
            "shape": held.shape,
            "typestr": held.dtype.str,
            "strides": strides,
            "data": (held.ctypes.data, False),
            **self.more,
        }


class Capsule:
    """An array that speaks DLPack, as CuPy's and PyTorch's do; `asked` are the streams."""

    def __init__(self, values: np.ndarray, look: Look = np.asarray, index: int = 0) -> None:
        self.held, self.index, self.asked = on_device(values, look, 0), index, list[Any]()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.index

    def __dlpack__(self, *, stream: Any = None) -> Any:
        self.asked.append(stream)
        return self.held.__dlpack__()


class CuPy:
    """The functions of CuPy that say where memory is and let a stream wait; `waited` are the
    streams that were waited for, `index` the GPU on which addresses are."""

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

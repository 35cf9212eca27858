"""The NumPy backend: the default, and the plain meaning of every operation in arrays."""

from __future__ import annotations

from pyggml.backends.numpy.backend import NumpyBackend
from pyggml.backends.numpy.table import kernel
from pyggml.errors import DeviceError

_host = NumpyBackend()


def device(index: int) -> NumpyBackend:
    """The host: index 0."""
    if index:
        raise DeviceError(f"numpy:{index}: there is one host; its place is 'numpy'")
    return _host


__all__ = ["device", "kernel"]

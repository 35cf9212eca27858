"""The NumPy backend: the default, and the reference for all others."""

from __future__ import annotations

from pyggml.backends.numpy.backend import NumpyBackend
from pyggml.backends.numpy.table import kernel
from pyggml.errors import DeviceError

_host = NumpyBackend()


def device(index: int) -> NumpyBackend:
    """The host, which has index 0.

    Errors: DeviceError for any other index.
    """
    if index:
        raise DeviceError(f"numpy:{index}: there is only one host; use 'numpy'")
    return _host


__all__ = ["device", "kernel"]
